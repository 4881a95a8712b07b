"""The table of methods. A new one is one file beside these and one line here.

The table names classes and does not import them, so that the command line shows every method's options at once.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import options

if TYPE_CHECKING:
    from .base import Method


@dataclass(frozen=True)
class MethodEntry:
    """One line of the table."""

    path: str
    """Where the class is, ``module:Class``; a module that begins with a dot lies in this folder."""
    options: type = options.NoOptions
    """Dataclass of its options; where it has ``presets``, they stand beside ``settings.PRESETS``."""

    @property
    def presets(self) -> options.Presets:
        """What a preset means for this method where that differs from everybody's."""
        return getattr(self.options, "presets", {})


METHODS: dict[str, MethodEntry] = {
    "optiml": MethodEntry(".optiml:OPTiML", options.OPTiMLOptions),
    "vicreg": MethodEntry(".vicreg:VICReg", options.VICRegOptions),
    "simclr": MethodEntry(".simclr:SimCLR", options.SimCLROptions),
    "moco": MethodEntry(".moco:MoCo", options.MoCoOptions),
    "densecl": MethodEntry(".densecl:DenseCL", options.DenseCLOptions),
    "byol": MethodEntry(".byol:BYOL", options.BYOLOptions),
    "simsiam": MethodEntry(".simsiam:SimSiam", options.SimSiamOptions),
    "pcrlv2": MethodEntry(".pcrlv2:PCRLv2", options.PCRLv2Options),
}


def method_class(name: str) -> type[Method]:
    """Import the class of an entry of ``METHODS``."""
    module, _, attribute = METHODS[name].path.partition(":")
    method: type[Method] = getattr(importlib.import_module(module, __package__), attribute)
    return method
