"""The benchmark suite's plumbing, on problems that take no time. Nothing here asserts a speed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_problems import needs_cpu

from benchmarks import capabilities, phases, readme, report, results, suite, targets, timing, tolerance
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


def test_the_details_say_what_is_met_and_what_is_not_measured() -> None:
    known = _results()
    text = report.details(known, ["memory.png"])
    assert "400× (≥ 300×, met); 30× by 8" in text
    assert "14× (≥ 15×, **missed**), OTT-JAX kernel, implicit" in text
    assert "![Peak memory](results/memory.png)" in text
    assert "not measured" in "\n".join(report.limits(known))
    assert "* KeOps: no compiler" in report.full(known)
    json.dumps(known)


def test_the_readme_says_how_many_times_as_fast_and_names_no_target() -> None:
    known = _results()
    text = report.readme(known)
    assert "otloss is 400 times as fast as POT's exact gradient and 9 times as fast as the fastest peer." in text
    assert (
        "| channels: 64 × 512 × 512, d 49 | 100 ms | 400× (30× in calls of 8) | 9.0×, POT sinkhorn, envelope |" in text
    )
    assert "Over all rows" not in text  # there is one
    assert "missed" not in text and "≥" not in text and "target" not in text
    for row in known["workloads"]["channels"]["times"][1:]:
        row["exact"] = False
    assert "9.0×, POT sinkhorn, envelope\\* |" in report.readme(known)
    del known["workloads"]["channels"]["times"][1:]
    assert "no peer was timed" in report.readme(known) and "| not measured | not measured |" in report.readme(known)


def test_the_readme_says_where_a_peer_is_faster() -> None:
    known = _results()
    assert "No peer is faster at any point" in report.readme(known)

    def point(library: str, n: int, seconds: float) -> dict[str, Any]:
        return {"library": library, "name": library, "n": n, "seconds": seconds}

    curve = [point("otloss", n, 0.1) for n in (8, 16, 32)]
    curve += [point("OTT-JAX", 8, 0.05), point("POT", 16, 0.05), point("POT", 32, 0.2), point("POT", 64, 0.01)]
    known["sweeps"] = {"n": {"curve": curve}}
    assert "on 16 problems of up to 16 × 16, OTT-JAX or POT is faster." in report.readme(known)


def test_gpu_text_counts_what_spills() -> None:
    made = [
        {
            "triton": triton,
            "kernel": "k",
            "tile": "I 4",
            "arch": arch,
            "spilled": 8 * (triton == "3.10.0" and arch == 90),
        }
        for triton in ("3.10.0", "3.8.0")
        for arch in (90, 80)
    ]
    assert report.static(made).splitlines()[2:] == [
        "| 3.8.0 | sm_80, sm_90 | 2 | none |",
        "| 3.10.0 | sm_80, sm_90 | 2 | 1: `k` (I 4) 8 bytes |",
    ]


def test_pages_are_what_the_results_files_say() -> None:
    """After a change of results, or of what is written from them: ``python -m benchmarks readme``."""
    for (page, name), text in readme.sections().items():
        assert readme.section(page, name) == text, f"{page}, {name}"
    assert readme.ALL_ROWS.read_text() == report.full(results.load(results.FULL))
    assert readme.ALL_CAPABILITIES.read_text() == capabilities.page(results.load(results.CAPABILITIES))
    figures = {*report.PLOTS, tolerance.PICTURE.name}
    assert figures == {path.name for path in results.FOLDER.glob("*.png")}


def test_pages_are_written_from_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what is between the markers changes, and it comes out as it was."""
    before: dict[str, str] = {}
    for name in ("README", "BENCHMARKS", "GPU", "PERFORMANCE", "ALL_ROWS", "ALL_CAPABILITIES"):
        page: Path = getattr(readme, name)
        copy = tmp_path / f"{name}.md"
        before[name] = page.read_text()
        copy.write_text(
            re.sub(
                r"(<!-- (bench|peers|capabilities|static|fixed|tolerance|sweeps):begin -->\n).*?(<!-- \2:end)",
                r"\1old\n\3",
                before[name],
                flags=re.S,
            )
        )
        monkeypatch.setattr(readme, name, copy)
    assert (tmp_path / "README.md").read_text().count("\nold\n") == 3
    for part in ("run_workloads", "run_limits", "run_sweeps", "run_step"):
        monkeypatch.setattr(suite, part, lambda *_: pytest.fail("this measures"))
    dispatch(parse(["readme"]))
    assert {name: (tmp_path / f"{name}.md").read_text() for name in before} == before
    assert "times as fast" in capsys.readouterr().out
    readme.README.write_text("no markers")
    with pytest.raises(SystemExit, match="must have <!-- peers:begin --> once"):
        readme.write_pages()


def test_a_whole_workload_is_measured_checked_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = suite.Plan(tmp_path / "r.json", rounds=1, budget=1, with_memory=False, peers=(PLAIN,))
    suite.run_workloads([SMALL], plan)
    entry = results.load(plan.path)["workloads"]["small"]
    assert entry["checks"]["otloss"]["gradient"] < 1e-4
    assert "commit" in entry["environment"]
    assert "## small" in report.full(results.load(plan.path))
    assert PLAIN.name in capsys.readouterr().out


@needs_cpu
def test_the_products_of_each_shape_reach_a_share_of_the_multiply_adds() -> None:
    found = phases.products([SMALL], budget=0.0)
    assert set(found) == set(phases.DTYPES)
    for threads in ("1", "2"):
        entry = found["float32"][threads]
        assert entry["fma_gflop_s"] > 0
        assert set(entry["products"]["small"]) == set(phases.PARTS)
        assert all(share > 0 for share in entry["products"]["small"].values())
    assert set(found["float32"]["1"]["step"]["small"]) == {"cost_and_values", "contraction"}


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


def test_a_solver_is_timed_once_it_reaches_the_tolerance() -> None:
    """Small settings that do not reach it are tried first; a solver that fails is named, and not tried again."""
    shape, lost = tolerance.Shape("small", 3, 12, 4), {"lost"}

    def broken(*_: object) -> Iterator[tolerance.Run]:
        def run() -> tolerance.Potentials:
            raise RuntimeError("no")

        yield run

    solvers = (
        tolerance.Solver("plain", "otloss", tolerance._ours("plain"), backward=True),
        tolerance.Solver("log-domain", "PyTorch", tolerance._log_domain, backward=False),
        tolerance.Solver("broken", "none", broken, backward=False),
        tolerance.Solver("lost", "none", broken, backward=False),
    )
    rows = {row["name"]: row for row in tolerance.measure(shape, 0.05, 1e-5, solvers, lost, 5.0)}
    for name in ("otloss", "plain", "log-domain"):
        assert rows[name]["seconds"] > 0 and rows[name]["error"] <= tolerance.allowed(0.05, 1e-5)
    assert [tolerance.cell(rows[name]) for name in ("broken", "lost")] == ["fails", "–"] and lost == {"lost", "broken"}
    far = tuple(torch.zeros(3, 12) for _ in range(2))
    assert tolerance.error(shape, 0.05, far) > 0.01  # type: ignore[arg-type]
