"""What a reader of one layout hands over: a record per image, before any pixel is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..index import Box
from ..tables import some
from .grey import Grey

DICOM_SUFFIXES = (".dcm", ".dicom")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".jp2")


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
            there = some((path.name for path in sorted((root / name).parent.glob("*.csv"))), 8)
            raise FileNotFoundError(f"{root} has no {name}" + (f"; of tables it has {there}" if there else ""))
    return [root / name for name in names]


def unlisted(root: Path, listing: Listing, out: Path) -> list[tuple[str, str]]:
    """Image files below ``root``, but for those in ``out``, that no film is read from and ``skipped`` does not name."""
    if not root.is_dir():
        return []
    masks = (origin for film in listing.records for _, origin in film.masks if isinstance(origin, Path))
    used = {os.path.normpath(path) for path in (*(film.path for film in listing.records), *masks)}
    named = {item.replace("\\", "/") for item, _ in listing.skipped}
    ours, found = os.path.realpath(out), []
    for parent, below, names in os.walk(root):
        below[:] = sorted(name for name in below if os.path.realpath(os.path.join(parent, name)) != ours)
        for name in sorted(names):
            path = Path(parent, name)
            item = path.relative_to(root).as_posix()
            if os.path.normpath(path) not in used and not named & {item, name, path.stem} and is_film(path):
                found.append((item, "an image file that the tables do not list"))
    return found


def is_film(path: Path) -> bool:
    """By the suffix; a hospital's DICOM file without one by its mark."""
    suffix = path.suffix.lower()
    if suffix in DICOM_SUFFIXES + IMAGE_SUFFIXES:
        return True
    try:
        return not suffix and path.is_file() and has_dicom_mark(path)
    except OSError:
        return False


def has_dicom_mark(path: Path) -> bool:
    """Whether a file begins as DICOM files do."""
    with path.open("rb") as file:
        file.seek(128)
        return file.read(4) == b"DICM"
