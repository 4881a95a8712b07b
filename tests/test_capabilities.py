"""The table of capabilities: what it says of otloss is found again, and what a library does wrong shows as that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import capabilities, results
from benchmarks.capability_rows import ROWS, Row, case, gradient
from benchmarks.peers.cases import Case, Missing, NoDevice, truth
from benchmarks.peers.ways import LIBRARIES, Library

OURS = LIBRARIES[0]
FOUND = results.load(results.CAPABILITIES)
#: Run as processes or compile, which tests of their own do.
DEAR = ("stream", "compiled")


@pytest.mark.parametrize("key", [key for key in FOUND["rows"] if key not in DEAR])
def test_what_otloss_can_do_it_still_can(key: str) -> None:
    """In the mode that the results name; what it cannot do yet is not asserted."""
    entry = FOUND["rows"][key]["otloss"]
    if entry["state"] == "yes":
        mode = capabilities.modes(ROWS[key], OURS)[entry["by"]]
        assert capabilities.tried(ROWS[key].check, mode)["state"] == "yes"
    else:
        assert entry["state"] == "no", "what otloss does wrong is a bug, not a row of a table"


def test_every_library_is_in_the_results() -> None:
    assert set(FOUND["rows"]) <= set(ROWS)
    names = [column.name for column in capabilities.COLUMNS]
    assert all(list(cells) == names for cells in FOUND["rows"].values())
    for cells in FOUND["rows"].values():
        for entry in cells.values():
            assert entry["state"] in ("yes", "wrong") or entry["why"]


def _exact(case: Case, name: str) -> Tensor:
    return truth(case, name)


def _raises(case: Case, name: str) -> Tensor:
    raise TypeError("no such thing\nat all")


def _lacks(case: Case, name: str) -> Tensor:
    case.options()
    raise Missing(f"returns no {name}")


def _no_device(case: Case, name: str) -> Tensor:
    raise NoDevice("needs another machine")


def _ten_percent_off(case: Case, name: str) -> Tensor:
    return 1.1 * truth(case, name)


def _not_finite(case: Case, name: str) -> Tensor:
    return torch.nan * truth(case, name)


@pytest.mark.parametrize(
    ("ways", "state", "shown", "by"),
    [
        ({"a": _raises, "b": _exact}, "yes", "yes", "b"),
        ({"a": _raises, "b": _ten_percent_off}, "wrong", "**wrong by 10 %**", "b"),
        ({"a": _not_finite, "b": _lacks}, "wrong", "**NaN**", "a"),
        ({"a": _lacks, "b": _raises}, "no", "no", "a"),
        ({}, "no", "no", None),
        ({"a": _lacks, "b": _no_device, "c": _ten_percent_off}, "not run here", "not run here", "b"),
        ({"a": _no_device, "b": _exact}, "yes", "yes", "b"),
    ],
)
def test_a_cell_is_that_of_the_best_mode(ways: dict[str, Any], state: str, shown: str, by: str | None) -> None:
    entry = capabilities.cell(ROWS["unbalanced"], Library("x", ways))
    assert (entry["state"], capabilities.shown(entry), entry.get("by")) == (state, shown, by)
    if state == "no" and ways:
        assert entry["modes"]["a"]["why"] == "has no argument for rho_a and rho_b"
        assert entry["modes"]["b"]["why"] == "TypeError: no such thing"


def test_a_wrong_gradient_is_measured() -> None:
    """The envelope's derivative of <T, C> by the cost, which takes the plan as a constant."""

    def envelope(given: Case, name: str) -> Tensor:
        detached = replace(given, cost=given.matrix().detach())
        return (given.matrix() * truth(detached, "plan")).sum((-1, -2))

    row = Row("", lambda way: gradient(way, case(1, dense=True), "cost", "cost"))
    assert capabilities.tried(row.check, envelope)["error"] > 0.05
    assert capabilities.tried(row.check, OURS.ways["sinkhorn"])["error"] < 1e-6


def test_what_is_not_installed_or_has_no_device_is_not_run() -> None:
    absent = Library("x", {"a": _exact}, needs=("no_such_module",))
    entry = capabilities.cell(ROWS["batch"], absent)
    assert entry["state"] == "not run here" and "no_such_module" in entry["why"] and "modes" not in entry
    if not torch.cuda.is_available():
        assert Library("x", {"a": _exact}, cuda=True).lacking() == "needs a CUDA device"


def test_without_a_device_a_library_still_shows_what_it_refuses() -> None:
    pytest.importorskip("flash_sinkhorn")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    states = {key: capabilities.cell(ROWS[key], LIBRARIES[-1]) for key in ROWS if key not in DEAR}
    refused = {key for key, entry in states.items() if entry["state"] == "no"}
    assert {"masks", "ragged", "forbidden", "partial", "eps_each", "by_eps", "started"} <= refused
    unknown = {"batch", "unbalanced", "semi", "value_masses", "value_points", "twice", "vmapped"}
    assert {key: states[key]["state"] for key in unknown} == dict.fromkeys(unknown, "not run here")


def test_rows_that_are_run_again_go_into_the_results() -> None:
    entry = {"state": "yes", "error": 0.0, "by": "a", "modes": {}}
    again = {
        "environment": {**FOUND["environment"], "commit": "later"},
        "libraries": FOUND["libraries"],
        "rows": {"masks": dict.fromkeys(FOUND["libraries"], entry)},
    }
    merged = capabilities.updated(FOUND, again)
    assert list(merged["rows"]) == list(FOUND["rows"]) and merged["environment"] == FOUND["environment"]
    assert merged["rows"]["masks"] == again["rows"]["masks"] and merged["rows"]["batch"] == FOUND["rows"]["batch"]
    assert merged["later"]["masks"]["commit"] == "later"
    versions = {**FOUND["environment"]["versions"], "torch": "1.0"}
    with pytest.raises(SystemExit, match="other versions: run all rows again"):
        capabilities.updated(FOUND, {**again, "environment": {**again["environment"], "versions": versions}})


def test_a_mode_that_takes_too_long_is_stopped() -> None:
    def endless(_: Any) -> float:
        while True:
            pass

    assert capabilities.tried(endless, _exact, seconds=1)["why"] == "TimeoutError: took longer than 1 s"
