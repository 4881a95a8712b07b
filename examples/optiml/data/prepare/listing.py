"""What a reader of one layout hands over: a record per image, before any pixel is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..index import Box
from .grey import Grey

DICOM_SUFFIXES = (".dcm", ".dicom")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


class DamagedSource(ValueError):
    """A file that holds many films is cut off or damaged: what was read from it cannot be trusted either."""


@dataclass(frozen=True)
class Film:
    """One image and what the tables say of it."""

    name: str
    """The file to write, ending in ``.png``."""
    path: Path
    """The file it is read from; many films have one where ``Listing.pixels`` reads them."""
    patient: str = ""
    """Empty: take the DICOM header's PatientID, or else the image for a patient of its own."""
    split: str = ""
    """Empty: to be drawn."""
    labels: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    box_space: int | None = None
    """The width and height that box coordinates refer to; ``None`` means the file's own pixels."""
    masks: tuple[tuple[str, tuple[str, ...] | Path], ...] = ()
    """Per finding, run lengths to unite or an image to read."""
    source: str = ""


@dataclass
class Listing:
    """All records of a data set."""

    classes: tuple[str, ...]
    records: list[Film]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """What the tables or the folder hold but the preparation cannot use, and why."""
    tables: list[Path] = field(default_factory=list)
    """The files that labels and splits came from."""
    notes: list[str] = field(default_factory=list)
    """What a user must know before trusting a figure made from this."""
    digests: dict[str, str] = field(default_factory=dict)
    """What else makes two preparations the same, where labels and splits do not come from ``tables``."""
    pixels: Callable[[list[Film]], Iterator[Grey]] | None = None
    """Reads the films that are left to convert, in their order, where they have no files of their own."""


def files_by_stem(root: Path, folders: Iterable[str], suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Every file with one of these suffixes below ``root/folder``, whatever the nesting, by name without suffix."""
    found: dict[str, Path] = {}
    for folder in folders:
        for parent, below, names in os.walk(root / folder):
            below.sort()
            for name in sorted(names):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in suffixes:
                    found.setdefault(stem, Path(parent, name))
    return found


def require(root: Path, *names: str) -> list[Path]:
    """The paths of these files, or an error that names the first that is missing."""
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    for name in names:
        if not (root / name).is_file():
            raise FileNotFoundError(f"{root} has no {name}")
    return [root / name for name in names]


def not_in_table(found: Iterable[str], listed: Iterable[str]) -> list[tuple[str, str]]:
    """Image files that no table speaks of."""
    return [(name, "an image file that the tables do not list") for name in sorted({*found} - {*listed})]
