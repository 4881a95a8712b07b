"""Three Dice coefficients, because "the Dice" of a set with empty masks means nothing until one says which.

SIIM has a pneumothorax on every fifth film. Scoring an empty prediction of an empty film as 1 (Kaggle's rule)
gives 0.78 to a network that never predicts anything; over positives alone it gets 0.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..metrics import Estimate, Floats, patient_draws


@dataclass(frozen=True)
class Overlap:
    """Pixels of each image in prediction and truth, in the prediction, and in the truth."""

    both: Floats
    predicted: Floats
    true: Floats

    @classmethod
    def of(cls, predicted: NDArray[np.bool_], true: NDArray[np.bool_]) -> Overlap:
        """Of boolean masks (n, H, W)."""
        each = (predicted & true, predicted, true)
        both, mine, theirs = (np.count_nonzero(x, axis=(1, 2)).astype(np.float64) for x in each)
        return cls(both, mine, theirs)

    def each(self) -> Floats:
        """Dice per image; 1 where both are empty."""
        total = self.predicted + self.true
        return np.divide(2 * self.both, total, out=np.ones_like(total), where=total > 0)

    def positives(self, weights: Floats) -> Floats:
        """Mean over images that have something to find, per row of ``weights`` (R, n); NaN without any."""
        return weighted_mean(self.each(), weights * (self.true > 0))

    def kaggle(self, weights: Floats) -> Floats:
        """Mean over all images, an empty prediction of an empty image counting 1."""
        return weighted_mean(self.each(), weights)

    def overall(self, weights: Floats) -> Floats:
        """One Dice of all pixels of all images together."""
        total = weights @ (self.predicted + self.true)
        return np.divide(2 * (weights @ self.both), total, out=np.full(len(weights), np.nan), where=total > 0)


def dice_figures(overlap: Overlap, patients: NDArray[Any], draws: int) -> dict[str, Any]:
    """The three with their 95 % intervals over resampled patients."""
    once, weights = np.ones((1, len(patients))), patient_draws(patients, draws)
    figures: dict[str, Any] = {"images": len(patients), "positive_images": int((overlap.true > 0).sum())}
    for name, measure in (
        ("positives", overlap.positives), ("kaggle", overlap.kaggle), ("global", overlap.overall),
    ):  # fmt: skip
        value = measure(once)[0]
        found = dict.fromkeys(("value", "low", "high"))
        figures[name] = found if np.isnan(value) else dataclasses.asdict(Estimate.of(value, measure(weights)))
    return figures


def weighted_mean(values: Floats, weights: Floats) -> Floats:
    """Mean of ``values`` (n,) per row of ``weights`` (R, n); NaN where all weights are nought."""
    total = weights.sum(axis=1)
    return np.divide(weights @ values, total, out=np.full(len(weights), np.nan), where=total > 0)
