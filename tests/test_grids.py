"""The part of a grid that ``make test`` runs: no pair is left out, and the whole is there when it is asked for."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from grids import grid


@pytest.mark.parametrize("sizes", [(2, 3), (4, 3, 3), (4, 3, 2, 2), (2, 2, 2, 2, 5)])
def test_every_pair_comes_together_in_few_cases(sizes: tuple[int, ...]) -> None:
    axes = [[f"{name}{k}" for k in range(size)] for name, size in zip("abcde", sizes, strict=False)]
    some = grid(*axes, every=False)
    for (i, one), (j, other) in combinations(enumerate(axes), 2):
        assert {(case[i], case[j]) for case in some} == set(product(one, other))
    first, second = sorted(sizes)[-2:]
    assert first * second <= len(some) <= 2 * first * second and len(set(some)) == len(some)
    assert grid(*axes, every=True) == list(product(*axes)) and set(some) <= set(product(*axes))
