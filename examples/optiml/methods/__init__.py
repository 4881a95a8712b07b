"""The table of methods. A new one is one file beside these and one entry here."""

from .base import Method, StepOutput
from .byol import BYOL
from .densecl import DenseCL
from .moco import MoCo
from .optiml import OPTiML
from .pcrlv2 import PCRLv2
from .simclr import SimCLR
from .simsiam import SimSiam
from .vicreg import VICReg

METHODS: dict[str, type[Method]] = {
    "optiml": OPTiML,
    "vicreg": VICReg,
    "simclr": SimCLR,
    "moco": MoCo,
    "densecl": DenseCL,
    "byol": BYOL,
    "simsiam": SimSiam,
    "pcrlv2": PCRLv2,
}

__all__ = ["METHODS", "Method", "StepOutput"]
