"""Areas under the ROC curve that say what they were computed on.

Three things the usual function gets wrong here. A class without positives or negatives has no AUC (it is not
0, and must not enter an average as 0). When images of several sources are mixed and the source goes with the
label, a network that recognises the source scores well without having seen any disease: the *within-source*
AUC compares only positives and negatives of one source. And images of one patient are not independent, so
intervals resample patients, not images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def pair_wins(scores: Floats, labels: NDArray[np.uint8], weights: Floats) -> tuple[Floats, Floats]:
    """For each row of ``weights`` (R, n): (positive, negative) pairs ranked right, and pairs in all.

    A tie counts half; their quotient is the AUC. An integer weight means "this image, so many times", which
    is how a bootstrap replicate is written down without copying anything.
    """
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])  # one group per distinct score
    positive = np.add.reduceat(weights[:, order] * (labels[order] == 1), starts, axis=1)
    negative = np.add.reduceat(weights[:, order] * (labels[order] == 0), starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    wins = (positive * (below + 0.5 * negative)).sum(axis=1)
    return wins, positive.sum(axis=1) * negative.sum(axis=1)


def class_aucs(
    scores: Floats,
    labels: NDArray[np.uint8],
    groups: NDArray[np.str_] | None = None,
    weights: Floats | None = None,
) -> Floats:
    """AUC of every class for every row of ``weights``: (R, classes), NaN where there is no pair to compare.

    With ``groups`` only pairs inside one group count; groups are averaged by their number of pairs.
    """
    count = len(scores)
    weights = np.ones((1, count)) if weights is None else weights
    parts = [np.arange(count)] if groups is None else [np.flatnonzero(groups == g) for g in np.unique(groups)]
    result = np.full((len(weights), labels.shape[1]), np.nan)
    for c in range(labels.shape[1]):
        wins, pairs = np.zeros(len(weights)), np.zeros(len(weights))
        for rows in parts:
            if 0 < labels[rows, c].sum() < len(rows):
                w, p = pair_wins(scores[rows, c], labels[rows, c], weights[:, rows])
                wins, pairs = wins + w, pairs + p
        np.divide(wins, pairs, out=result[:, c], where=pairs > 0)
    return result


def comparable_patients(
    labels: NDArray[np.uint8], groups: NDArray[np.str_], patients: NDArray[np.str_]
) -> NDArray[np.intp]:
    """Of how many patients each class has a positive that its own group has a negative for: what its AUC rests on."""
    mixed = np.zeros(labels.shape, bool)
    for group in np.unique(groups):
        rows = groups == group
        mixed[rows] = (labels[rows] == 1) & (labels[rows] == 0).any(axis=0)
    return np.array([len(np.unique(patients[column])) for column in mixed.T])


def macro(aucs: Floats, mask: NDArray[np.bool_] | None = None) -> Floats:
    """Mean over classes that have an AUC (and are in ``mask``): (R, classes) -> (R,)."""
    kept = aucs if mask is None else np.where(mask, aucs, np.nan)
    present = ~np.isnan(kept)
    total = np.where(present, kept, 0.0).sum(axis=1)
    counts = present.sum(axis=1)
    return np.divide(total, counts, out=np.full(len(kept), np.nan), where=counts > 0)


def patient_draws(patients: NDArray[np.str_], draws: int = 1000, seed: int = 0) -> Floats:
    """How often each image occurs when as many patients as there are are drawn with replacement: (draws, n).

    The same patients and seed give the same draws, which is what makes differences of two runs *paired*.
    """
    of_image, unique = pd.factorize(patients)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(unique), np.full(len(unique), 1.0 / len(unique)), size=draws)
    return counts[:, of_image].astype(np.float64)


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, replicates: Floats) -> Estimate:
        low, high = np.nanpercentile(replicates, (2.5, 97.5))
        return cls(float(value), float(low), float(high))


def student_quantile(share: float, freedom: float) -> float:
    """The point below which Student's t with ``freedom`` degrees of freedom (1 or more) lies with this probability.

    With t = √freedom · tan θ the density by θ is proportional to cos(θ)^(freedom - 1), which is added up here.
    """
    theta, above = _student_angles(freedom)
    found = np.interp(abs(share - 0.5), above, theta)
    return float(np.sign(share - 0.5) * np.sqrt(min(freedom, 1e6)) * np.tan(found))


def student_tails(t: float, freedom: float) -> float:
    """The probability that Student's t lies farther from 0 than this, on either side."""
    theta, above = _student_angles(freedom)
    return float(1 - 2 * np.interp(np.arctan(abs(t) / np.sqrt(min(freedom, 1e6))), theta, above))


def _student_angles(freedom: float) -> tuple[Floats, Floats]:
    """Angles from 0 to a right one, and the probability that the angle of t lies between 0 and each."""
    theta = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(theta) ** (min(freedom, 1e6) - 1)
    above = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return theta, 0.5 * above / above[-1]
