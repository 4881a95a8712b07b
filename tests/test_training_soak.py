"""The training soak tells a leak from noise, takes memory from a real training, and its page is that of its results."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pytorch_lightning", reason="the example needs otloss[examples]")

from training_soak import BATCH, BOUND, FILMS, PAGE, RESULTS, Growth, page, train

from benchmarks import results


@pytest.mark.parametrize(("kept", "flat"), [(0.0, True), (-0.5, True), (2.0, False)])
def test_a_leak_is_told_from_noise(kept: float, flat: bool) -> None:
    """2: the pooled features of every batch. The first quarter may grow as it likes."""
    noise = np.random.default_rng(0)
    epochs = [
        (float(k), 8 * k, int(1e9 + kept * BOUND * 8 * k + 2e6 * noise.standard_normal() + 5e8 * min(k, 99) / 99))
        for k in range(1, 400)
    ]
    growth = Growth.of(epochs)
    assert growth.flat == flat
    assert abs(growth.slope - kept * BOUND) < 3 * growth.deviation
    with pytest.raises(ValueError, match="too few for a slope"):
        Growth.of(epochs[:20])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_is_noted_after_every_epoch(tmp_path: Path) -> None:
    (epoch,) = train(tmp_path, 0.0)
    assert 0 < epoch[1] <= FILMS // BATCH
    assert 1e8 < epoch[2] < 1e11 and "torch" in sys.modules


def test_the_page_is_that_of_the_results() -> None:
    assert PAGE.read_text() == page(results.load(RESULTS))
