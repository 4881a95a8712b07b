"""Conversion of a data set in its official layout, once: grey PNGs and one index (see ``DATA.md``).

The table of readers names functions and does not import them, so that a help text needs none of their libraries. A new
data set is one file beside these and one line here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .listing import Listing
    from .settings import PrepareConfig

#: Per ``--dataset``, where its reader is: ``module:function``. A module that begins with a dot lies in this folder.
READERS: dict[str, str] = {
    "nih": ".nih:read_nih",
    "vinbig": ".vinbig:read_vinbig",
    "rsna": ".rsna:read_rsna",
    "siim": ".siim:read_siim",
    "medmnist": ".medmnist:read_medmnist",
    "csv": ".table:read_table",
    "phantom": ".nih:read_phantom",
}


def reader(dataset: str) -> Callable[[PrepareConfig], Listing]:
    """Import the reader of an entry of ``READERS``."""
    module, _, attribute = READERS[dataset].partition(":")
    function: Callable[[PrepareConfig], Listing] = getattr(importlib.import_module(module, __package__), attribute)
    return function
