"""Grey values of any depth to 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Grey = NDArray[np.uint8]


def film_range(values: NDArray[Any]) -> tuple[float, float]:
    """The darkest and the brightest value of a film, leaving out a marker far from all else.

    Far means farther from the middle 99 % of the pixels than these are apart. So nothing of the film is clipped, and
    it gets a third of the greys at least, whatever a few pixels hold.
    """
    if not np.isfinite(values).all():
        raise ValueError("pixels are not finite")
    low, high = np.quantile(values, (0.005, 0.995))
    if high > low:
        values = values[(values >= low - (high - low)) & (values <= high + (high - low))]
    return float(values.min()), float(values.max())


def to_bytes(values: NDArray[Any], low: float, high: float) -> Grey:
    """Black at ``low``, white at ``high``, which is the smaller one where a window's slope is negative."""
    if not (np.isfinite(high - low) and np.isfinite(values).all()):
        raise ValueError("pixels are not finite")
    if high == low:
        raise ValueError("every pixel has the same value")
    return np.round(255 * np.clip((values - low) / (high - low), 0, 1)).astype(np.uint8)


def check_contrast(image: Grey) -> None:
    """Raise a ValueError for a picture that shows nothing."""
    if image.min() == image.max():
        raise ValueError("every pixel has the same value")
