"""The one index of a data set: image, patient, split, labels, boxes, mask. And its pixels.

Two kinds of folder are read. A *prepared* one (``prepare/``) holds grey PNGs and ``index.csv``, whatever the data
set was. ChestX-ray14's official layout is also read as users have it on disk: images flat in ``images/`` or in
``images_001/images/`` and so on, partial downloads, Windows line ends, some PNGs in RGBA. Phantoms are written in
that layout (``layout.py``), so nothing after this file knows where an image came from.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..errors import CommandError
from .images import open_grey
from .nih_format import BOX_FILE, BOX_SPACE, ENTRY_FILE, OLD_ENTRY_FILE, TEST_FILE, TRAIN_FILE

NIH_CLASSES = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
    "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip

#: The files of a prepared folder; the index is written last, so that its presence says that the rest is there.
INDEX_FILE, BOXES_FILE, PREPARED_FILE = "index.csv", "boxes.csv", "prepare.json"
IMAGE_FOLDER, MASK_FOLDER = "images", "masks"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Box:
    """A finding's rectangle, as fractions of the image's width and height."""

    label: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class ChestIndex:
    """What is known about every image, row by row; pixels are read by :class:`ImageStore`."""

    root: Path
    names: NDArray[np.str_]
    paths: list[Path]
    patients: NDArray[np.str_]
    splits: NDArray[np.str_]
    labels: NDArray[np.uint8]
    sources: NDArray[np.str_] | None = None
    boxes: dict[str, list[Box]] = field(default_factory=dict)
    classes: tuple[str, ...] = NIH_CLASSES

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: NDArray[np.intp]) -> ChestIndex:
        """The index restricted to these rows."""
        return ChestIndex(
            self.root, self.names[rows], [self.paths[i] for i in rows], self.patients[rows], self.splits[rows],
            self.labels[rows], None if self.sources is None else self.sources[rows], self.boxes, self.classes,
        )  # fmt: skip

    def split(self, name: str) -> ChestIndex:
        """The rows of ``"train"``, ``"val"`` or ``"test"``."""
        rows = np.flatnonzero(self.splits == name)
        if not len(rows):
            raise ValueError(f"{self.root} has no image in split {name!r}")
        return self.take(rows)

    def mask(self, row: int, label: str) -> NDArray[np.bool_] | None:
        """The outline of a finding on the file ``paths[row]``, where the data set has one.

        ``None`` where it has none; an image whose label says that the finding is absent has no outline either.
        """
        path = mask_path(self.root, label, str(self.names[row]))
        return np.asarray(open_grey(path)) > 0 if path.exists() else None

    def fingerprint(self) -> str:
        """Changes when names, splits or labels change; not with pixels, outlines, boxes, sources or patients."""
        digest = hashlib.sha256(self.labels.tobytes())
        digest.update("\n".join(f"{n} {s}" for n, s in zip(self.names, self.splits, strict=True)).encode())
        return digest.hexdigest()[:16]


def mask_path(root: Path, label: str, name: str) -> Path:
    """Where a finding's outline on an image is kept."""
    return root / MASK_FOLDER / re.sub(r"[^\w .+-]|^\.+", "_", label) / name


def read_index(root: Path | str, val_fraction: float = 0.14, split_seed: int = 0, *, quiet: bool = False) -> ChestIndex:
    """Read a prepared folder, or one in NIH's official layout.

    Test is the official list. Where there is no official validation set, it is cut from the training list by a
    hash of the patient, so that it depends on the seed alone and not on which images happen to be present; a
    prepared folder whose split was drawn for want of an official one has its validation set in the index, and
    the two arguments have no effect.
    """
    root = Path(root)
    if (root / PREPARED_FILE).is_file():
        index = _read_prepared(root)
    else:
        index = _read_nih(root, quiet)
    patients, splits = index.patients, index.splits
    if shared := set(patients[splits == "train"]) & set(patients[splits == "test"]):
        raise ValueError(f"{root}: {len(shared)} patients have images on both lists, e.g. {min(shared)}")
    if not (splits == "val").any():
        held_out = {p for p in set(patients[splits == "train"]) if patient_share(f"{split_seed}:{p}") < val_fraction}
        splits[np.isin(patients, list(held_out)) & (splits == "train")] = "val"
    return index


def open_index(root: Path, val_fraction: float = 0.14, split_seed: int = 0) -> ChestIndex:
    """:func:`read_index` for commands: what is wrong with the folder ends them with one line."""
    try:
        index = read_index(root, val_fraction, split_seed)
        index.split("train")  # there is nothing to do without
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    return index


def with_all_splits(index: ChestIndex) -> ChestIndex:
    """The same index; ends the command where nothing could be fitted, chosen or scored."""
    if missing := [name for name in SPLITS if name not in index.splits]:
        raise CommandError(f"{index.root} has no image in split {missing[0]!r}; needed are {', '.join(SPLITS)}")
    return index


def with_findings(index: ChestIndex) -> ChestIndex:
    """The same index; ends the command where there is nothing to evaluate."""
    if not index.classes:
        raise CommandError(
            f"{index.root} has no findings to evaluate: it was prepared without --label-columns; name them and prepare "
            "into another --out"
        )
    return index


def patient_share(key: str) -> float:
    """A number in [0, 1) that belongs to a patient and a purpose."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _read_prepared(root: Path) -> ChestIndex:
    """Read what ``prepare`` wrote."""
    if not (root / INDEX_FILE).is_file():
        raise FileNotFoundError(f"{root} was not prepared to the end: run the same prepare command again")
    classes = tuple(json.loads((root / PREPARED_FILE).read_text())["classes"])
    table = pd.read_csv(root / INDEX_FILE, dtype=str, keep_default_na=False)
    present = {entry.name for entry in os.scandir(root / IMAGE_FOLDER)}
    if missing := [name for name in table["name"] if name not in present]:
        raise FileNotFoundError(f"{root}: {len(missing)} images are gone, e.g. {missing[0]}; run prepare again")
    boxes: dict[str, list[Box]] = {}
    rows = pd.read_csv(root / BOXES_FILE, dtype={"name": str, "label": str}, keep_default_na=False)
    for name, *box in rows.itertuples(index=False):
        boxes.setdefault(name, []).append(Box(*box))
    names = table["name"].to_numpy(str)
    sources = table["source"].to_numpy(str)
    return ChestIndex(
        root, names, [root / IMAGE_FOLDER / name for name in names], table["patient"].to_numpy(str),
        table["split"].to_numpy("<U5"), _label_matrix(table["labels"], classes),
        sources if len(set(sources)) > 1 else None, boxes, classes,
    )  # fmt: skip


def nih_images(root: Path) -> dict[str, Path]:
    """Every film in ``images*/``, at any depth, by name."""
    return {path.name: path for folder in sorted(root.glob("images*")) for path in sorted(folder.rglob("*.png"))}


def entry_file(root: Path) -> Path:
    """NIH's table of labels, under either of its names."""
    old = root / OLD_ENTRY_FILE
    return old if old.is_file() and not (root / ENTRY_FILE).is_file() else root / ENTRY_FILE


def nih_entries(root: Path) -> pd.DataFrame:
    """The official table's rows by name: findings, patient, split and path; the last two are NaN where unknown."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder")
    for path in (entry_file(root), root / TRAIN_FILE, root / TEST_FILE):
        if not path.is_file():
            raise FileNotFoundError(
                f"{root} is no prepared data set (run prepare first), and not in NIH's layout: {path.name} is missing"
            )
    # The header's "OriginalImage[Width,Height]" splits at its comma, so columns are taken by position.
    with _named(
        entry_file(root), "table of labels, which begins with Image Index, Finding Labels, Follow-up #, Patient ID"
    ):
        entry = pd.read_csv(
            entry_file(root), header=None, skiprows=1, usecols=[0, 1, 3], names=["name", "findings", "patient"],
            index_col=False, encoding="utf-8-sig", dtype={"name": str, "findings": str},
        )  # fmt: skip
        if entry.isna().any(axis=None):
            raise ValueError("a cell is blank")
        entry["patient"] = pd.to_numeric(entry["patient"]).astype(int)
    listed = dict.fromkeys(_read_list(root / TRAIN_FILE), "train")
    test = _read_list(root / TEST_FILE)
    if both := sorted(set(listed) & set(test)):
        raise ValueError(f"{root}: {len(both)} images are on both lists, e.g. {both[0]}")
    listed.update(dict.fromkeys(test, "test"))
    entry = entry.drop_duplicates("name").sort_values("name", ignore_index=True)
    return entry.assign(split=entry["name"].map(listed), path=entry["name"].map(nih_images(root)))


@contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    """What is wrong in reading a table becomes one line that names it."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not NIH's {what} ({' '.join(str(error).split())[:200]})") from error


def _read_nih(root: Path, quiet: bool) -> ChestIndex:
    entry = nih_entries(root)
    usable = entry["path"].notna() & entry["split"].notna()
    if not usable.all() and not quiet:
        missing = int((~usable).sum())
        warnings.warn(f"{root}: {missing} of {len(entry)} entries have no image file or no split", stacklevel=3)
    entry = entry[usable]
    if entry.empty:
        raise FileNotFoundError(f"{root}: no image of {entry_file(root).name} was found under images*/")
    names = entry["name"].to_numpy(str)
    return ChestIndex(
        root, names, entry["path"].tolist(), entry["patient"].to_numpy().astype(str),
        entry["split"].to_numpy("<U5"), _label_matrix(entry["findings"], NIH_CLASSES), _sources(root, names),
        _boxes(root),
    )  # fmt: skip


def _label_matrix(findings: pd.Series[str], classes: tuple[str, ...]) -> NDArray[np.uint8]:
    """Names joined by | -> one row of 0 and 1 per image."""
    rows = findings.str.split("|")
    return np.array([[name in row for name in classes] for row in rows], np.uint8).reshape(len(findings), len(classes))


def _read_list(path: Path) -> list[str]:
    return path.read_text().split()  # also eats Windows line ends


def _sources(root: Path, names: NDArray[np.str_]) -> NDArray[np.str_] | None:
    """Where each image came from, if ``labels.csv`` (columns image, source) says so."""
    path = root / "labels.csv"
    if not path.is_file():
        return None
    table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    if "source" not in table or "image" not in table:
        return None
    known = dict(zip(table["image"].map(lambda p: Path(p).name), table["source"].astype(str), strict=True))
    return np.array([known.get(str(name), "unknown") for name in names])


def _boxes(root: Path) -> dict[str, list[Box]]:
    path = root / BOX_FILE
    boxes: dict[str, list[Box]] = {}
    if path.is_file():
        with _named(path, "table of boxes, which begins with Image Index, Finding Label and four numbers"):
            table = pd.read_csv(path, header=None, skiprows=1, usecols=range(6), index_col=False)
            for name, label, *rect in table.itertuples(index=False):
                label = {"Infiltrate": "Infiltration"}.get(label, label)  # NIH's two files differ in this word
                boxes.setdefault(name, []).append(Box(label, *(float(r) / BOX_SPACE for r in rect)))
    return boxes
