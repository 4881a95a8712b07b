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


@pytest.mark.parametrize(("kept", "verdict"), [(0.0, "flat"), (-0.5, "flat"), (2.0, "not flat")])
@pytest.mark.parametrize("alike", [0.0, 0.8])
def test_a_leak_is_told_from_noise(kept: float, verdict: str, alike: float) -> None:
    """2: the pooled features of every batch. The first quarter may grow as it likes."""
    noise = np.random.default_rng(0).standard_normal(400)
    for k in range(1, 400):
        noise[k] = alike * noise[k - 1] + (1 - alike**2) ** 0.5 * noise[k]
    epochs = [
        (float(k), 8 * k, int(1e9 + kept * BOUND * 8 * k + 2e6 * noise[k] + 5e8 * min(k, 99) / 99))
        for k in range(1, 400)
    ]
    growth = Growth.of(epochs)
    assert growth.verdict == verdict
    assert abs(growth.slope - kept * BOUND) < 3 * growth.deviation
    short = Growth.of([(t, step, memory + 10**8 * (step % 3)) for t, step, memory in epochs[100:140]])
    assert short.verdict.startswith("undecided")
    with pytest.raises(ValueError, match="too few for a slope"):
        Growth.of(epochs[:20])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_is_noted_after_every_epoch(tmp_path: Path) -> None:
    (epoch,) = train(tmp_path, 0.0)
    assert 0 < epoch[1] <= FILMS // BATCH
    assert 1e8 < epoch[2] < 1e11 and "torch" in sys.modules


def test_the_page_is_that_of_the_results() -> None:
    assert PAGE.read_text() == page(results.load(RESULTS))
