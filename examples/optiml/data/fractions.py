"""Label fractions and their seeds, as options: which are allowed, and which are usual."""

from __future__ import annotations

from collections.abc import Sequence

#: Smaller shares are a few patients, and which ones decides more than anything else: they want more seeds.
SMALL = 0.1
SMALL_SEEDS, LARGE_SEEDS = (0, 1, 2, 3, 4), (0, 1, 2)


def default_seeds(fraction: float) -> tuple[int, ...]:
    """The seeds of a fraction where nobody named any."""
    return SMALL_SEEDS if fraction < SMALL else LARGE_SEEDS


def check_fractions(name: str, fractions: Sequence[float]) -> None:
    """A ValueError unless these are shares of the training images."""
    if not fractions or len(set(fractions)) < len(fractions) or not all(0 < f <= 1 for f in fractions):
        raise ValueError(f"{name} must be one or more different numbers in (0, 1], not {_list(fractions)}")


def check_seeds(name: str, seeds: Sequence[int]) -> None:
    """A ValueError unless these are seeds."""
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"{name} must be one or more different whole numbers from 0 up, not {_list(seeds)}")


def _list(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values) or "none"
