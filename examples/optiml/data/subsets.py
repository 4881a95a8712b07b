"""Label fractions: which training patients' labels may be used. Nested, seeded, by patient, written to disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from .index import ChestIndex


def label_fraction(train: ChestIndex, fraction: float, seed: int) -> ChestIndex:
    """The rows of the first patients, in an order that (seed, patient) alone give, up to ``fraction`` of the images.

    Whole patients are taken until the share is reached, so there is at least one, and a smaller fraction's
    images are among those of a larger one under the same seed. Labels are not looked at: a rare class may be
    absent, as it would be if somebody labelled so few films.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], not {fraction}")
    patients, of_image, counts = np.unique(train.patients, return_inverse=True, return_counts=True)
    order = np.argsort([_place(str(patient), seed) for patient in patients])
    wanted = fraction * len(train)
    before = np.cumsum(counts[order]) - counts[order]  # images of the patients in front of each
    chosen = order[before < wanted - 1e-9]
    return train.take(np.flatnonzero(np.isin(of_image, chosen)))


def write_ids(subset: ChestIndex, folder: Path, fraction: float, seed: int) -> Path:
    """One image name per line, under a name that says which subset it is."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"fraction-{fraction:g}-seed{seed}.txt"
    path.write_text("\n".join(map(str, subset.names)) + "\n")
    return path


def _place(patient: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}/{patient}".encode()).hexdigest()
