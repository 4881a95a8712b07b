"""The soak test finds no fault in some problems, finds a planted one, and makes its problem again from the seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.soak import tally as report
from benchmarks.soak.__main__ import show, soak
from benchmarks.soak.problems import tensors
from benchmarks.soak.settings import setting_of, settings
from benchmarks.soak.tally import Tally
from otloss.backends import cpu
from otloss.backends.protocol import Gradients

pytestmark = pytest.mark.skipif(cpu.status() is not None, reason=f"cpu backend: {cpu.status()}")

SEED, PROBLEMS = 5, 100


def test_no_fault_is_found_in_some_problems(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Tally(SEED)
    soak(tally, PROBLEMS, say=False)
    assert tally.problems == PROBLEMS and not tally.failures
    monkeypatch.setattr(report, "RESULTS", tmp_path / "soak.json")
    monkeypatch.setattr(report, "PAGE", tmp_path / "soak.md")
    tally.save()
    assert "**0 beyond a bound**" in report.PAGE.read_text()
    assert report.load(SEED) == tally and report.load(SEED + 1).problems == 0


def test_a_planted_fault_is_reported_with_what_makes_its_problem_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each hundredth of the gradient by a is 1e5 roundings of float32: far above what the room allows."""
    right = cpu.implicit_gradient

    def wrong(*arguments: Any, **options: Any) -> tuple[Gradients, torch.Tensor]:
        gradients, residual = right(*arguments, **options)
        return gradients._replace(a=1.01 * gradients.a), residual

    monkeypatch.setattr(cpu, "implicit_gradient", wrong)
    tally = Tally(SEED)
    soak(tally, PROBLEMS, say=False)
    assert any("by a: " in found or "by log_a: " in found for failure in tally.failures for found in failure["found"])
    assert all(failure["problem"] in capsys.readouterr().out for failure in tally.failures[:1])
    seed, index = map(int, tally.failures[0]["problem"].split(":"))
    assert not show(seed, index)
    assert "***" in capsys.readouterr().out
    monkeypatch.undo()
    assert show(seed, index)


@pytest.mark.parametrize("index", [24, 29])
def test_gradients_by_tiny_masses(index: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Problems in which those by masses of 1e-10 of the total were once off by some percent."""
    s = setting_of(0, index)
    assert s.dtype == "float32" and s.spread == 12 and any(s.rho) and not all(s.rho)
    assert show(0, index)
    assert "compared" in capsys.readouterr().out


def test_a_problem_is_made_again_by_itself() -> None:
    for s in settings(SEED, 300):
        place = s.count - 1
        again = setting_of(SEED, s.first + place)
        group, alone = tensors(s), tensors(again.alone(place))
        assert group.keys() == alone.keys()
        for name, x in group.items():
            assert torch.equal(x[place : place + 1].nan_to_num(), alone[name].nan_to_num()), name
