"""Long grids of cases: ``make test`` runs a part in which every pair comes together, ``make test-all`` all of them."""

from __future__ import annotations

import os
from collections.abc import Collection
from itertools import combinations, product
from typing import Any

EVERY_CASE = os.environ.get("OTLOSS_EVERY_CASE") == "1"


def grid(*given: Collection[Any], every: bool = EVERY_CASE) -> list[tuple[Any, ...]]:
    """Cases with a value of each axis. Each value of an axis meets each value of every other axis in one case at least.

    An error in code that two arguments lead to is found so; one that needs three may need ``every`` case.
    """
    axes = [list(axis) for axis in given]
    places = [range(len(axis)) for axis in axes]
    cases = list(product(*places))
    if not every:
        open_pairs = {
            (i, j, a, b) for i, j in combinations(range(len(axes)), 2) for a, b in product(places[i], places[j])
        }
        chosen = []
        while open_pairs:
            best = max(cases, key=lambda case: len(_pairs(case) & open_pairs))
            open_pairs -= _pairs(best)
            chosen.append(best)
        cases = sorted(chosen)
    return [tuple(axis[k] for axis, k in zip(axes, case, strict=True)) for case in cases]


def _pairs(case: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
    return {(i, j, case[i], case[j]) for i, j in combinations(range(len(case)), 2)}
