"""Films with outlines, as a segmentation task."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import CommandError
from .batches import Rows, grey_batch
from .images import ImageStore, resize_mask
from .index import MASK_FOLDER, ChestIndex, mask_path, with_all_splits


@dataclass(frozen=True)
class MaskSet:
    """The films of an index on which the outline of ``label`` is known; it is empty where there is no file."""

    index: ChestIndex
    label: str

    def __len__(self) -> int:
        return len(self.index)

    def split(self, name: str) -> MaskSet:
        return dataclasses.replace(self, index=self.index.split(name))

    def masks(self, size: int) -> NDArray[np.bool_]:
        """All outlines, (n, size, size)."""
        return np.stack([self._mask(row, size) for row in range(len(self))])

    def _mask(self, row: int, size: int) -> NDArray[np.bool_]:
        found = self.index.mask(row, self.label)
        if found is None:
            return np.zeros((size, size), bool)
        small = np.asarray(Image.fromarray(found).resize((size, size), Image.Resampling.NEAREST))
        return small if small.any() else resize_mask(found, (size, size))  # an outline between the points is one still


class MaskTask:
    """Images and outlines of one split, at network size; outlines stay in memory, images as far as they fit."""

    def __init__(self, part: MaskSet, size: int) -> None:
        self.images, self.size = ImageStore(part.index.paths, size), size
        self.masks = part.masks(size)
        self.patients = part.index.patients

    def load(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and outlines (B, 1, H, W)."""
        return grey_batch(self.images, rows, self.size), torch.from_numpy(self.masks[rows])[:, None].float()


def mask_set(index: ChestIndex, label: str) -> MaskSet:
    """The task of outlining ``label``, a finding or anything else that the folder has masks of (lungs).

    Where it is a finding, films without it take part with an empty outline, and films that have it but no mask do
    not take part: nobody said where it is. Of anything else, films with a mask take part and no others.
    """
    drawn = _drawn(index, label)
    if not drawn.any():
        known = ", ".join(folder.name for folder in sorted((index.root / MASK_FOLDER).glob("*")))
        has = f"it has those of {known}" if known else "segmentation needs masks"
        raise CommandError(f"{index.root} has no outlines of {label}; {has}")
    if label in index.classes:
        drawn |= index.labels[:, index.classes.index(label)] == 0
    return MaskSet(with_all_splits(index.take(np.flatnonzero(drawn))), label)


def has_outlines(index: ChestIndex, label: str) -> bool:
    """Whether any film comes with an outline of ``label``."""
    return bool(_drawn(index, label).any())


def _drawn(index: ChestIndex, label: str) -> NDArray[np.bool_]:
    """Which films have a mask."""
    folder = mask_path(index.root, label, "")
    files = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return np.isin(index.names, np.array(files, dtype=str))


def fingerprint(task: MaskSet) -> str:
    """Changes with the images, the splits and which outlines are meant."""
    return hashlib.sha256(f"{task.index.fingerprint()} {task.label}".encode()).hexdigest()[:16]
