"""No error of the cpu backend is above its bound in benchmarks/results/accuracy.json (see benchmarks/accuracy.py)."""

from __future__ import annotations

import json

import pytest

from benchmarks import accuracy
from otloss.backends import cpu

pytestmark = pytest.mark.skipif(cpu.status() is not None, reason=f"cpu backend: {cpu.status()}")

BOUNDS: accuracy.Table = json.loads(accuracy.RESULTS.read_text())["bounds"]
HINT = "if that is meant, `python -m benchmarks.accuracy --update` raises the bounds"


def test_no_error_is_above_its_bound() -> None:
    found = accuracy.measure(accuracy.cases())
    above = accuracy.exceeded(found, BOUNDS)
    assert not above, "\n".join([*above, HINT])
    measured = {(row, name) for row, quantities in found.items() for name in quantities}
    assert measured == {(row, name) for row, quantities in BOUNDS.items() for name in quantities}


def test_an_error_above_its_bound_is_said() -> None:
    bounds = {"dense float32 eps 0.5": {"plan": 1e-6, "value": 1e-6}}
    found = {"dense float32 eps 0.5": {"plan": 2e-6, "value": 1e-6, "new": 0.0}, "dense float64 eps 0.5": {"plan": 0.0}}
    above = accuracy.exceeded(found, bounds)
    assert len(above) == 3 and "plan: 2.00e-06 is above the bound 1.00e-06" in above[0]
    assert accuracy.exceeded({"dense float32 eps 0.5": {"plan": float("nan")}}, bounds)
