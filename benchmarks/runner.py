"""Checks that ours and the exact peers compute the same, times them in turn, and measures ours' peak memory."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

import otloss
from benchmarks.peers import OURS, PEERS, Peer
from benchmarks.workloads import Workload


def _step(peer: Peer, workload: Workload, leaves: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Forward and backward from features and logits."""
    cost = peer.loss(workload, *leaves)
    # A lesser mode may leave the marginals without a gradient; it is timed for what it does.
    return cost, torch.autograd.grad(cost.sum(), leaves, allow_unused=not peer.exact)


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.detach().double() - other.detach()).abs().max() / other.detach().abs().max())


def check(workload: Workload, problems: int = 4) -> dict[str, Any]:
    """Largest relative differences of value and gradients from the reference in float64, where exact.

    The implicit gradient is that of the solution, the peers' that of their iterates, so both are compared after enough
    iterations for the two to be one.
    """
    converged = Workload(
        workload.name, problems, workload.n, workload.m, workload.d, workload.eps, max(400, workload.iterations)
    )
    with otloss.use_backend("reference"):
        cost, grads = _step(OURS, converged, converged.inputs(torch.float64))
    found = {}
    for peer in (OURS, *(peer for peer in PEERS if peer.exact and peer.installed)):
        got, got_grads = _step(peer, converged, converged.inputs())
        found[peer.name] = {
            "cost": _difference(got, cost),
            "gradient": max(_difference(one, other) for one, other in zip(got_grads, grads, strict=True)),
        }
        if found[peer.name]["cost"] > 1e-4 or found[peer.name]["gradient"] > 1e-2:
            raise SystemExit(f"{peer.name} does not compute the same on {workload.name}: {found[peer.name]}")
    return found


def _once(peer: Peer, workload: Workload, per_call: int) -> float:
    """Seconds for the whole batch, in calls of ``per_call`` problems."""
    batch = [t.detach() for t in workload.inputs()]
    calls = [tuple(t.requires_grad_() for t in part) for part in zip(*(t.split(per_call) for t in batch), strict=True)]
    start = time.perf_counter()
    for leaves in calls:
        _step(peer, workload, leaves)
    return time.perf_counter() - start


def measure(workload: Workload, rounds: int) -> list[dict[str, Any]]:
    """Medians and spread; in every round ours runs beside each peer, so that drift meets both."""
    rivals: list[tuple[Peer, int]] = []
    for peer in PEERS:
        if not peer.installed:
            print(f"  {peer.name}: not installed ({peer.needs}), skipped")
            continue
        rivals.append((peer, workload.chunk or workload.batch))
        if workload.chunk and peer.whole:
            rivals.append((peer, workload.batch))
    ours = (OURS, workload.batch)
    for peer, per_call in (ours, *rivals):
        if per_call < workload.batch or not workload.chunk or peer is OURS:
            _once(peer, workload, per_call)  # warm-up
    seconds: dict[tuple[str, int], list[float]] = {(peer.name, per_call): [] for peer, per_call in (ours, *rivals)}
    for _ in range(rounds):
        for rival in rivals:
            for peer, per_call in (ours, rival):
                seconds[peer.name, per_call].append(_once(peer, workload, per_call))
    reference = statistics.median(seconds[OURS.name, workload.batch])
    rows = []
    for peer, per_call in (ours, *rivals):
        times = seconds[peer.name, per_call]
        row = {
            "name": peer.name,
            "exact": peer.exact,
            "problems_per_call": per_call,
            "median_s": statistics.median(times),
            "min_s": min(times),
            "max_s": max(times),
            "ratio": statistics.median(times) / reference,
        }
        rows.append(row)
        print(f"  {peer.name:28s} {per_call:5d} a call {row['median_s']:9.4f} s   {row['ratio']:7.1f}x", flush=True)
    return rows


_MEMORY = """
import ctypes, gc, sys
from benchmarks.peers import OURS
from benchmarks.runner import _step
from benchmarks.workloads import WORKLOADS, Workload

def status(key):
    with open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith(key)).split()[1])

w = WORKLOADS[sys.argv[1]]
w = Workload(w.name, int(sys.argv[2]), w.n, w.m, w.d, w.eps, w.iterations)
_step(OURS, w, tuple(t[:2].detach().requires_grad_() for t in w.inputs()))
leaves = w.inputs()
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
with open("/proc/self/clear_refs", "w") as reset:  # the peak starts again from what is held now
    reset.write("5")
before = status("VmRSS")
_step(OURS, w, leaves)
print((status("VmHWM") - before) / 2**20)
"""


def memory_growth(workload: Workload, problems: int) -> float:
    """GiB by which a fresh process grows at its peak over one forward and backward of ``problems`` problems (Linux)."""
    command = [sys.executable, "-c", _MEMORY, workload.name, str(problems)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout)


def environment() -> dict[str, Any]:
    """What a figure depends on."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("otloss", "torch", "POT", "geomloss")},
        "commit": commit.stdout.strip() or None,
        "date": datetime.date.today().isoformat(),
    }
