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


def _once(peer: Peer, workload: Workload) -> float:
    """Seconds for the whole batch; a peer whose graph would not fit runs a chunk, and that time is scaled."""
    problems = min(workload.batch, peer.chunk or workload.batch)
    leaves = workload.inputs(batch=problems)
    start = time.perf_counter()
    _step(peer, workload, leaves)
    return (time.perf_counter() - start) * workload.batch / problems


def measure(workload: Workload, rounds: int) -> list[dict[str, Any]]:
    """Medians and spread; in every round ours runs beside each peer, so that drift meets both."""
    peers = [peer for peer in PEERS if peer.installed]
    for peer in PEERS:
        if not peer.installed:
            print(f"  {peer.name}: not installed ({peer.needs}), skipped")
    for peer in (OURS, *peers):
        _once(peer, workload)  # warm-up
    seconds: dict[str, list[float]] = {peer.name: [] for peer in (OURS, *peers)}
    for _ in range(rounds):
        for peer in peers:
            seconds[OURS.name].append(_once(OURS, workload))
            seconds[peer.name].append(_once(peer, workload))
    ours = statistics.median(seconds[OURS.name])
    rows = []
    for peer in (OURS, *peers):
        times = seconds[peer.name]
        rows.append(
            {
                "name": peer.name,
                "exact": peer.exact,
                "median_s": statistics.median(times),
                "min_s": min(times),
                "max_s": max(times),
                "ratio": statistics.median(times) / ours,
                "timed_problems": min(workload.batch, peer.chunk or workload.batch),
            }
        )
        print(f"  {peer.name:28s} {rows[-1]['median_s']:9.4f} s   {rows[-1]['ratio']:7.1f}x")
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
_step(OURS, w, w.inputs(batch=2))
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
