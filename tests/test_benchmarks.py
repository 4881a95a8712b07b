"""The benchmark suite's plumbing, on problems that take no time. Nothing here asserts a speed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report, results, suite, targets, timing
from benchmarks.__main__ import NAMES, dispatch, parse, plan_of
from benchmarks.check import check, difference, reference
from benchmarks.peers import OURS, PEERS, by_name
from benchmarks.workloads import MAIN, WORKLOADS, Workload, split

SMALL = Workload("small", batch=4, n=9, m=7, d=5, chunk=2, main=True)
PLAIN = by_name("PyTorch, log-domain")


def test_every_main_workload_has_targets() -> None:
    assert list(MAIN) == list(targets.SPEEDUPS)


def test_names_of_peers_are_unique() -> None:
    names = [peer.name for peer in (OURS, *PEERS)]
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="there is no peer 'POTT'; there are: otloss, POT"):
        by_name("POTT")


@pytest.mark.parametrize("inputs", ["features", "dense", "samples"])
def test_leaves_are_the_same_each_time_and_split_into_calls(inputs: str) -> None:
    w = Workload("w", batch=5, n=4, m=4, d=3, inputs=inputs)
    one, other = w.leaves(), w.leaves(torch.float64)
    assert all(torch.equal(a, b.float()) and a.requires_grad for a, b in zip(one, other, strict=True))
    parts = split(one, 2)
    assert [len(part[0]) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part[-1] for part in parts]), one[-1])


@pytest.mark.parametrize("change", [{}, {"inputs": "dense"}, {"backward": False}, {"tol": 1e-4}, {"dtype": "float64"}])
def test_ours_and_plain_pytorch_pass_the_check(change: dict[str, Any]) -> None:
    found = check(Workload(**{**asdict(SMALL), **change}), (PLAIN,))
    assert all(entry["same"] for entry in found.values())
    assert (PLAIN.name in found) == ("tol" not in change)


def test_the_check_finds_a_wrong_number_and_a_wrong_gradient() -> None:
    wrong = replace(PLAIN, number="value")
    assert not check(SMALL, (wrong,))[PLAIN.name]["same"]
    lesser = replace(by_name("POT log_sinkhorn, last_step"), exact=True)
    if lesser.missing() is None:
        found = check(SMALL, (lesser,))[lesser.name]
        assert found["number"] < 1e-5 and found["gradient"] > 0.1 and not found["same"]


def test_reference_values_differ_as_defined() -> None:
    numbers, grads = reference(SMALL)
    assert len(grads) == 4
    assert (numbers["value"] > numbers["cost"]).all()
    assert (numbers["entropy"] < numbers["value"]).all()
    assert difference(torch.tensor([float("nan")]), numbers["cost"]) == float("inf")


def test_timing_gives_a_row_for_each_rival() -> None:
    rivals = timing.entrants(SMALL, (PLAIN,))
    assert rivals == [(PLAIN, 4, 2), (PLAIN, 4, 4)]
    rows = timing.measure(SMALL, rivals, rounds=2, budget=60, say=lambda _: None)
    found = [(row["name"], row["problems_per_call"]) for row in rows]
    assert found == [("otloss", 4), (PLAIN.name, 2), (PLAIN.name, 4)]
    for row in rows[1:]:
        assert row["runs"] == 2
        assert row["min_s"] <= row["q1_s"] <= row["median_s"] <= row["q3_s"] <= row["max_s"]
        assert row["ratio"] == pytest.approx(row["median_s"] / row["ours_beside_s"])
        assert row["number_off"] < 1e-4


def test_a_dear_run_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "DEAR", 0.0)
    rival, ours = timing.Entrant(PLAIN, SMALL, 4), timing.Entrant(OURS, SMALL, 4)
    timing.alternate(rival, ours, rounds=3, budget=60)
    assert len(rival.seconds) == 1


def test_a_short_budget_is_one_round_but_ours_runs_often_enough_for_a_median() -> None:
    rows = timing.measure(SMALL, [(PLAIN, 4, 4)], rounds=3, budget=0, say=lambda _: None)
    assert [row["runs"] for row in rows] == [timing.FEWEST, 1]


def test_quick_unrolls_only_a_chunk() -> None:
    pot = by_name("POT log_sinkhorn, autodiff")
    if pot.missing() is not None:
        pytest.skip("POT is not installed")
    assert timing.entrants(SMALL, (pot,), quick=True) == [(pot, 2, 2)]


def test_results_keep_what_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for name, value in (("a", 1), ("b", 2), ("a", 3)):
        results.put(path, "workloads", name, value)
    assert results.load(path) == {"workloads": {"a": 3, "b": 2}}
    assert list(tmp_path.iterdir()) == [path]
    path.write_text("{")
    with pytest.raises(SystemExit, match="cannot be read"):
        results.load(path)


def _results() -> dict[str, Any]:
    def row(name: str, library: str, per_call: int, median: float) -> dict[str, Any]:
        return {
            "name": name,
            "library": library,
            "exact": True,
            "problems": 64,
            "problems_per_call": per_call,
            "ratio": median / 0.1,
            **timing.spread([median]),
        }

    rows = [
        row("otloss", "otloss", 64, 0.1),
        row(targets.POT, "POT", 8, 3.0),
        row(targets.POT, "POT", 64, 40.0),
        row("OTT-JAX kernel, implicit", "OTT-JAX", 64, 1.4),
        row("POT sinkhorn, envelope", "POT", 8, 0.9),
    ]
    environment = {"cpu": "x", "cores": 2, "caches": {}, "level": "v4", "memory_gib": 1, "versions": {}}
    environment |= {"commit": "abc", "date": "2026-01-01T00:00"}
    entry = {"workload": asdict(MAIN["channels"]), "environment": environment, "skipped": {"KeOps": "no compiler"}}
    return {"workloads": {"channels": {**entry, "checks": {}, "times": rows}}}


def test_targets_are_judged_from_the_rows() -> None:
    pot, ott, fastest = targets.speedups("channels", _results()["workloads"]["channels"])
    assert (pot.found, pot.met) == (pytest.approx(400), True)
    assert (ott.found, ott.met) == (pytest.approx(14), False)
    assert (fastest.who, fastest.met) == ("POT sinkhorn, envelope", True)
    rows = [row for row in _results()["workloads"]["channels"]["times"] if row["ratio"] != 400]
    assert targets.speedups("channels", {**_results()["workloads"]["channels"], "times": rows})[0].met is None
    call, _ = targets.others({"limits": {"call": {"extra_us": 151.0}}})
    assert call.met is False


def test_tables_say_what_is_met_and_what_is_not_measured() -> None:
    known = _results()
    text = report.section(known, ["memory.png"])
    assert "400× (≥ 300×, met); 30× by 8" in text
    assert "14× (≥ 15×, **missed**), OTT-JAX kernel, implicit" in text
    assert "benchmarks/results/memory.png" in text
    assert "not measured" in "\n".join(report.limits(known))
    assert "* KeOps: no compiler" in report.full(known)
    json.dumps(known)


def test_a_whole_workload_is_measured_checked_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = suite.Plan(tmp_path / "r.json", rounds=1, budget=1, with_memory=False, peers=(PLAIN,))
    suite.run_workloads([SMALL], plan)
    entry = results.load(plan.path)["workloads"]["small"]
    assert entry["checks"]["otloss"]["gradient"] < 1e-4
    assert "commit" in entry["environment"]
    assert "## small" in report.full(results.load(plan.path))
    assert PLAIN.name in capsys.readouterr().out


@pytest.mark.parametrize(("command", "name"), [("sweeps", "accuracy"), ("limits", "call"), ("run", "tiny")])
def test_each_command_gets_its_names(command: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(suite, "run_workloads", lambda chosen, plan: called.extend(w.name for w in chosen))
    for part in ("run_limits", "run_sweeps"):
        monkeypatch.setattr(suite, part, lambda plan, names: called.extend(names))
    dispatch(parse([command, name]))
    assert called == [name]


def test_the_command_line_names_what_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_of(parse(["quick"])).quick
    assert plan_of(parse(["run", "tiny", "--rounds", "2"])).rounds == 2
    assert set(NAMES["run"]) == set(WORKLOADS)
    with pytest.raises(SystemExit):
        parse(["run", "channel"])
    assert "run does not know channel; possible names: channels, tokens" in capsys.readouterr().err
