"""ChestMNIST and PneumoniaMNIST: one ``.npz`` file of MedMNIST or MedMNIST+, at any of its sizes.

An ``.npz`` file is a zip archive of ``.npy`` members. The members of films are read as streams, piece by piece and at
most once, so that memory holds a few films and never an array, whether the archive is compressed or not.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ..index import NIH_CLASSES, SPLITS
from .grey import Grey
from .listing import DamagedSource, Film, Listing
from .settings import PrepareConfig

#: Findings by the beginning of the file's name: the file itself does not say what its labels mean.
FINDINGS = {"chestmnist": NIH_CLASSES, "pneumoniamnist": ("Pneumonia",)}
#: Bytes of films to read at once.
PIECE = 2**20
#: What reading a damaged archive raises.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)

PATIENTS_NOTE = (
    "MedMNIST does not say which films are of one patient: every film counts as its own patient. So intervals over "
    "patients are intervals over films, and too narrow, and nothing here can tell whether a patient has films in two "
    "splits (DATA.md says what is known)."
)


@dataclass(frozen=True)
class Member:
    """An array of the archive: what its header says, before any of its values is read."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    digest: str
    """Its check sum as the archive's directory has it."""


def read_medmnist(config: PrepareConfig) -> Listing:
    """The films of the three splits, as the file divides them, in its order."""
    path = config.folder
    classes = _classes(path)
    records: list[Film] = []
    digests: dict[str, str] = {}
    with _opened(path) as archive:
        films = {split: _member(archive, path, f"{split}_images") for split in SPLITS}
        for member in films.values():
            _check_films(path, member, films["train"])
        for split, member in films.items():
            marks = _member(archive, path, f"{split}_labels")
            digests |= {array.name: array.digest for array in (member, marks)}
            _check_labels(path, marks, len(classes), member)
            labels = _labels(archive, path, marks)
            for row, name in zip(labels, film_names(split, len(labels)), strict=True):
                found = tuple(classes[column] for column in np.flatnonzero(row))
                records.append(Film(name, path, split=split, labels=found))
    _, height, width = films["train"].shape
    notes = [f"Films of {width} x {height} pixels, divided as the file divides them.", PATIENTS_NOTE]

    def pixels(wanted: list[Film]) -> Iterator[Grey]:
        rows: dict[str, list[int]] = {split: [] for split in SPLITS}
        for film in wanted:
            rows[film.split].append(int(film.name.removesuffix(".png").rpartition("-")[2]))
        with _opened(path) as archive:
            for split in SPLITS:
                yield from _stream(archive, path, films[split], rows[split])

    return Listing(classes, records, digests=digests, notes=notes, pixels=pixels)


def film_names(split: str, count: int) -> list[str]:
    """A file name for each film of a split: its place in the array."""
    return [f"{split}-{row:06d}.png" for row in range(count)]


def _classes(path: Path) -> tuple[str, ...]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; --root must be the file itself, such as {path / 'chestmnist_64.npz'}")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; DATA.md says where MedMNIST's files are downloaded")
    for name, classes in FINDINGS.items():
        if path.name.lower().startswith(name):
            return classes
    raise ValueError(
        f"{path.name}: the name must begin with {' or '.join(FINDINGS)}, since the file does not say what its labels "
        "mean; other sets of MedMNIST are not chest X-rays"
    )


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever shows that it is damaged becomes one error."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except DAMAGE as error:
        raise DamagedSource(f"{path} is cut off or damaged ({error}); download it again") from error


def _member(archive: zipfile.ZipFile, path: Path, name: str) -> Member:
    """Read a member's header."""
    arrays = [entry.removesuffix(".npy") for entry in archive.namelist()]
    if name not in arrays:
        wanted = ", ".join(f"{split}_images, {split}_labels" for split in SPLITS)
        raise ValueError(f"{path} has no array {name!r}; a file of MedMNIST holds {wanted}, this one {_list(arrays)}")
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as stream:
        shape, by_columns, dtype = _header(stream, path, name)
        start = stream.tell()
    if dtype.hasobject:
        raise ValueError(f"{path}: {name} holds Python objects, which are not read; it must be uint8")
    if by_columns and len(shape) > 1:
        raise ValueError(f"{path}: {name} is stored in Fortran order; save it again from np.ascontiguousarray")
    if info.file_size != start + math.prod(shape) * dtype.itemsize:
        raise DamagedSource(f"{path}: {name} is not as long as its shape {shape} says; download the file again")
    return Member(name, shape, dtype, f"{info.CRC:08x}")


def _header(stream: IO[bytes], path: Path, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and type."""
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        version = npy.read_magic(stream)
        if version not in readers:  # 3.0 is for field names outside Latin-1, which plain arrays do not have
            raise ValueError(f"format {version[0]}.{version[1]}")
        return readers[version](stream)
    except ValueError as error:
        raise ValueError(f"{path}: {name} has no header that NumPy wrote ({error}); download the file again") from error


def _check_films(path: Path, member: Member, first: Member) -> None:
    if len(member.shape) == 4:
        raise ValueError(
            f"{path}: {member.name} has the shape {member.shape}, so colour or volumes; films are grey, "
            "(number, height, width), as in chestmnist and pneumoniamnist"
        )
    if len(member.shape) != 3 or 0 in member.shape[1:]:
        raise ValueError(f"{path}: {member.name} has the shape {member.shape}; it must be (number, height, width)")
    if member.dtype != np.uint8:
        raise ValueError(f"{path}: {member.name} is {member.dtype}; it must be uint8, grey values from 0 to 255")
    if member.shape[1:] != first.shape[1:]:
        raise ValueError(f"{path}: films are {member.shape[1:]} in {member.name} but {first.shape[1:]} in {first.name}")


def _check_labels(path: Path, member: Member, columns: int, films: Member) -> None:
    if member.shape != (wanted := (films.shape[0], columns)):
        raise ValueError(f"{path}: {member.name} has the shape {member.shape}; beside {films.name} it must be {wanted}")
    if member.dtype.kind not in "bui":
        raise ValueError(f"{path}: {member.name} is {member.dtype}; it must be uint8, 0 or 1")


def _labels(archive: zipfile.ZipFile, path: Path, member: Member) -> NDArray[np.bool_]:
    """All labels of a split."""
    with archive.open(f"{member.name}.npy") as stream:
        _header(stream, path, member.name)
        values = np.frombuffer(stream.read(), member.dtype).reshape(member.shape)
    if len(strange := np.argwhere((values != 0) & (values != 1))):
        row, column = strange[0]
        raise ValueError(f"{path}: {member.name} holds {values[row, column]} for film {row}; labels must be 0 or 1")
    return values == 1


def _stream(archive: zipfile.ZipFile, path: Path, member: Member, rows: list[int]) -> Iterator[Grey]:
    """The films of these rows, which ascend, each a copy of its own; skips the array where there are none.

    The archive tells damage by a check sum at the member's end. The last films come after it, so that a preparation
    that has them all has read the whole member undamaged.
    """
    if not rows:
        return
    count, height, width = member.shape
    step = max(1, PIECE // (height * width))
    wanted = iter(rows)
    row = next(wanted, None)
    with archive.open(f"{member.name}.npy") as stream:
        _header(stream, path, member.name)
        for start in range(0, count, step):
            if row is None:
                return
            films = min(step, count - start)
            values = stream.read(films * height * width)
            if len(values) < films * height * width:
                raise EOFError(f"{member.name} ends early")
            if start + films == count:
                stream.read(1)  # the end, where the check sum is compared
            piece = np.frombuffer(values, np.uint8).reshape(films, height, width)
            while row is not None and row < start + films:
                yield piece[row - start].copy()
                row = next(wanted, None)


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
