"""The parts of the suite in order. Each result is written at once, so that a run can be stopped and continued."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import limits, memory, results, step, sweeps, timing
from benchmarks.check import check
from benchmarks.machine import environment
from benchmarks.peers import PEERS, Peer
from benchmarks.workloads import MAIN, Workload


@dataclass(frozen=True)
class Plan:
    """How thorough a run is.

    Beside each rival at most ``rounds`` are made, in about ``budget`` seconds. ``quick`` keeps few peers, see
    `Peer.quick`. ``resume`` keeps what was measured at the same commit.
    """

    path: Path
    rounds: int = 7
    budget: float = 2.5
    quick: bool = False
    with_memory: bool = True
    resume: bool = False
    peers: tuple[Peer, ...] = PEERS


QUICK = Plan(results.QUICK, rounds=5, budget=1.5, quick=True, with_memory=False)


def known(plan: Plan, section: str, name: str) -> bool:
    """Whether a resumed run has this already, measured at this very commit."""
    if not plan.resume:
        return False
    entry = results.load(plan.path).get(section, {}).get(name)
    commit = environment()["commit"]
    done = entry is not None and entry["environment"]["commit"] == commit and not commit.endswith("-dirty")
    if done:
        print(f"{name}: kept, measured at {commit}")
    return done


def workload(w: Workload, plan: Plan) -> dict[str, Any]:
    """Check, measure the memory of, and time one workload."""
    began = time.perf_counter()
    print(f"{w.name}: {w.describe()}", flush=True)
    entry: dict[str, Any] = {"workload": asdict(w), "environment": environment(), "skipped": {}}
    peers = tuple(peer for peer in plan.peers if peer.applies(w) and (peer.quick or not plan.quick))
    for peer in peers:
        if reason := peer.skip(w):
            entry["skipped"][peer.name] = reason
    entry["checks"] = check(w, peers)
    for name, found in entry["checks"].items():
        if not found["same"]:
            entry["skipped"][name] = _not_the_same(found)
    peers = tuple(peer for peer in peers if peer.name not in entry["skipped"])
    for name, reason in entry["skipped"].items():
        print(f"  skipped: {name}: {reason}", flush=True)
    rivals = timing.entrants(w, peers, plan.quick)
    if plan.with_memory and w.main:
        rivals = _memory(w, rivals, entry)
    entry["times"] = timing.measure(w, rivals, plan.rounds, plan.budget, say=lambda text: print(text, flush=True))
    entry["took_s"] = round(time.perf_counter() - began)
    return entry


def _not_the_same(found: dict[str, Any]) -> str:
    if "error" in found:
        return found["error"]
    parts = ", ".join(f"{name} off by {found[name]:.1e}" for name in ("number", "gradient") if name in found)
    return f"does not compute the same: {parts}"


def _memory(w: Workload, rivals: list[timing.Rival], entry: dict[str, Any]) -> list[timing.Rival]:
    """Measure peak memory of otloss and of every rival on the whole batch; return the rivals that fit into memory."""
    entry["memory"], left = [], []
    for peer, problems, per_call in [(timing.OURS, w.batch, w.batch), *rivals]:
        if per_call < w.batch:
            left.append((peer, problems, per_call))
            continue
        found: dict[str, Any] = {"name": peer.name, "library": peer.library, "problems_per_call": per_call}
        try:
            found["gib"] = memory.measure(peer, w, problems, per_call)
        except memory.MemoryExhausted as error:
            found["stopped"] = str(error)
            entry["skipped"][f"{peer.name}, {per_call} problems a call"] = str(error)
        except RuntimeError as error:
            found["stopped"] = str(error)
        entry["memory"].append(found)
        amount = f"{found['gib']:.3f} GiB" if "gib" in found else found["stopped"]
        print(f"  memory of {peer.name}, {per_call} problems a call: {amount}", flush=True)
        if peer is not timing.OURS and entry["skipped"].get(f"{peer.name}, {per_call} problems a call") is None:
            left.append((peer, problems, per_call))
    return left


def run_workloads(chosen: list[Workload], plan: Plan) -> None:
    for w in chosen:
        if not known(plan, "workloads", w.name):
            results.put(plan.path, "workloads", w.name, workload(w, plan))


def run_limits(plan: Plan, names: list[str] | None = None) -> None:
    """Measure floors and shares of the main workloads, and the fixed cost of a call."""
    for name in names or [*MAIN, limits.CALL.name]:
        if known(plan, "limits", name):
            continue
        found = limits.in_own_process(name)
        print(f"limits of {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items() if isinstance(v, float)))
        if found.get("probes", "") is None:
            print("  otloss._C has no probes of the machine's rates: no floor and no shares", flush=True)
        results.put(plan.path, "limits", name, {"environment": environment(), **found})


def run_sweeps(plan: Plan, names: list[str] | None = None) -> None:
    """Measure the curves of the plots."""
    for name in names or list(sweeps.SWEEPS):
        if not known(plan, "sweeps", name):
            curve = sweeps.SWEEPS[name]()
            results.put(plan.path, "sweeps", name, {"environment": environment(), "curve": curve})


def run_step(plan: Plan) -> None:
    """Measure the share of a training step that the loss takes."""
    if known(plan, "step", "optiml"):
        return
    try:
        found = step.measure()
    except ImportError as error:
        print(f"share of a training step: skipped, {error}; pip install 'otloss[bench]'")
        return
    for match in ("channel", "position"):
        print(f"OPTiML step by {match}: {found[match]}", flush=True)
    results.put(plan.path, "step", "optiml", {"environment": environment(), **found})
