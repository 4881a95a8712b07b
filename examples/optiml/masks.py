"""Images with outlines: a finding of a chest index, or a folder of image and mask pairs."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .data import ChestIndex, ImageStore
from .features import Rows, grey_batch
from .start import Start

#: Label of a finding's outline when every film has lungs and the folder holds pairs.
PAIRS = "pairs"


@dataclass(frozen=True)
class MaskSet:
    """A chest index seen as a segmentation task; ``files`` holds the masks of a folder of pairs."""

    index: ChestIndex
    label: str
    files: dict[str, Path] | None = None

    def __len__(self) -> int:
        return len(self.index)

    def split(self, name: str) -> MaskSet:
        return dataclasses.replace(self, index=self.index.split(name))

    def masks(self, size: int) -> NDArray[np.bool_]:
        """All outlines, (n, size, size); empty where there is none."""
        return np.stack([self._mask(row, size) for row in range(len(self))])

    def _mask(self, row: int, size: int) -> NDArray[np.bool_]:
        if self.files is None:
            found = self.index.mask(row, self.label)
        else:
            with Image.open(self.files[str(self.index.names[row])]) as file:
                found = np.asarray(file.convert("L")) > 127
        if found is None:
            return np.zeros((size, size), bool)
        resized = Image.fromarray(found).resize((size, size), Image.Resampling.NEAREST)
        return np.asarray(resized)


class MaskTask:
    """Images and outlines of one split, at network size; outlines stay in memory, images as far as they fit."""

    def __init__(self, part: MaskSet, size: int) -> None:
        self.images, self.size = ImageStore(part.index.paths, size), size
        self.masks = part.masks(size)
        self.patients = part.index.patients

    def load(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and outlines (B, 1, H, W)."""
        return grey_batch(self.images, rows, self.size), torch.from_numpy(self.masks[rows])[:, None].float()


def mask_set(start: Start, label: str) -> MaskSet:
    """The task of a data folder: pairs if its ``labels.csv`` has a column ``mask``, else a finding of its index."""
    table = start.data / "labels.csv"
    if table.is_file() and "mask" in (columns := pd.read_csv(table, nrows=0).columns):
        return read_pairs(start.data, set(columns))
    index = start.index()
    if label not in index.classes:
        raise SystemExit(f"{start.data} has no class {label!r}; choose --label among {', '.join(index.classes)}")
    if not has_outlines(index, label):
        raise SystemExit(f"{start.data} has no outlines of {label}: segmentation needs masks")
    return MaskSet(index, label)


def has_outlines(index: ChestIndex, label: str) -> bool:
    """Whether films with the finding come with its outline; a hundred are looked at."""
    if label not in index.classes:
        return False
    positive = np.flatnonzero(index.labels[:, index.classes.index(label)])
    return any(index.mask(int(row), label) is not None for row in positive[:100])


def read_pairs(root: Path, columns: set[str]) -> MaskSet:
    """``labels.csv`` with columns image, mask, split (train, val, test) and, where known, patient_id."""
    if missing := {"image", "mask", "split"} - columns:
        raise SystemExit(f"{root / 'labels.csv'} lacks the column(s) {', '.join(sorted(missing))}")
    table = pd.read_csv(root / "labels.csv", dtype=str).sort_values("image", ignore_index=True)
    names = table["image"].to_numpy(str)
    patients: NDArray[Any] = table["patient_id" if "patient_id" in table else "image"].to_numpy(str)
    index = ChestIndex(
        root, names, [root / name for name in names], patients, table["split"].to_numpy(str),
        np.ones((len(table), 1), np.uint8), classes=(PAIRS,),
    )  # fmt: skip
    return MaskSet(index, PAIRS, {name: root / mask for name, mask in zip(names, table["mask"], strict=True)})


def fingerprint(task: MaskSet) -> str:
    """Changes with the images, the splits and which outlines are meant."""
    return hashlib.sha256(f"{task.index.fingerprint()} {task.label}".encode()).hexdigest()[:16]
