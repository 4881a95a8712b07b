"""The table of methods. A new one is one file beside these and one entry here."""

from .base import Method, StepOutput
from .optiml import OPTiML
from .vicreg import VICReg

METHODS: dict[str, type[Method]] = {"optiml": OPTiML, "vicreg": VICReg}

__all__ = ["METHODS", "Method", "StepOutput"]
