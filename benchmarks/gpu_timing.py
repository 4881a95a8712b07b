"""Ours beside the peers on a CUDA device.

The peers are those of the CPU suite that take torch tensors. Each gets the whole batch in one call; flash-sinkhorn
loops over the problems by itself. A peer whose numbers on the device are wrong is left out. The first call, which
includes compilation, is timed by the clock (for a cold one, empty ``TRITON_CACHE_DIR`` first), the following calls by
CUDA events. All are timed in turn, so that a change of clock rates affects all. A call that takes a second is not
repeated between two events, and one that takes longer is timed once. The kernels of one warm call are counted last.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import otloss
from benchmarks.check import GRADIENT_LIMIT, NUMBER_LIMIT, check, difference, leaves_on
from benchmarks.peers import OURS, PEERS, Peer
from benchmarks.workloads import Leaves, Workload

DEAR = 1.0
"""Seconds between two events, about; who takes longer for one call is timed once."""
ENTRANTS = (OURS, *(peer for peer in PEERS if peer.native is OURS.native))


def errors(workload: Workload, device: str = "cuda", iterations: int = 400) -> dict[str, float]:
    """Largest relative differences of ours from the reference in float64, on a few problems that have converged.

    Raises:
        ArithmeticError: they are larger than those that a peer of the CPU suite may have, divided by ten.
    """
    few = replace(workload.part(4), iterations=max(iterations, workload.iterations), tol=0.0)
    step = OURS.build(few)
    with otloss.use_backend("triton"):
        number, grads = step(leaves_on(device, few))
    with otloss.use_backend("reference"):
        want, wanted = step(leaves_on(device, few, torch.float64))
    found = {"number": difference(number, want.detach())}
    if grads is not None:
        found["gradient"] = max(difference(one, other) for one, other in zip(grads, wanted, strict=True))
    if not (found["number"] <= NUMBER_LIMIT / 10 and found.get("gradient", 0.0) <= GRADIENT_LIMIT / 10):
        raise ArithmeticError(f"otloss does not agree with float64 on {workload.name}: {found}")
    return found


def event_ms(run: Callable[[], Any], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def kernels(run: Callable[[], Any]) -> list[Any]:
    """Profiler events of one call, one for each kernel and copy with its number and its time on the device.

    The profiler also lists the host's calls to CUDA, which are left out here.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]


def launches(events: list[Any]) -> int:
    """How many of these are launches of kernels; copies and fills of memory are none."""
    return sum(event.count for event in events if not event.key.startswith(("Memcpy", "Memset")))


def _first_calls(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the cold call and of a warm one, and the peak memory of that."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    cold = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    warm = time.perf_counter() - start
    return {"cold_s": cold, "warm_s": warm, "peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}


def measure(workload: Workload, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Cold and warm times and peak memory of everyone whom the workload suits, and what failed."""
    leaves = leaves_on("cuda", workload)
    rows: list[dict[str, Any]] = []
    runs: list[tuple[dict[str, Any], Callable[[], Any]]] = []
    for peer in ENTRANTS:
        if not peer.applies(workload):
            continue
        row: dict[str, Any] = {"name": peer.name, "exact": peer.exact, "number": peer.number}
        rows.append(row)
        if reason := peer.skip(workload):
            row["skipped"] = reason
            continue
        try:
            run = _bind(peer, workload, leaves)
            row.update(_first_calls(run))
        except Exception as error:
            if peer is OURS:
                raise
            row["skipped"] = f"{type(error).__name__}: {str(error)[:200]}"  # a peer's failure is a result
            torch.cuda.empty_cache()
            continue
        runs.append((row, run))
    checks = check(workload, tuple(peer for peer in ENTRANTS if peer is not OURS), device="cuda")
    for row, _ in runs:
        row["check"] = checks[row["name"]]
        if not row["check"]["same"]:
            row["skipped"] = f"does not compute the same: {row['check']}"
    runs = [(row, run) for row, run in runs if "skipped" not in row]
    times: list[list[float]] = [[] for _ in runs]
    for k in range(rounds):
        for found, (row, run) in zip(times, runs, strict=True):
            if k == 0 or row["warm_s"] < DEAR:
                found.append(event_ms(run, max(1, min(repeats, int(DEAR / row["warm_s"])))))
    for found, (row, run) in zip(times, runs, strict=True):
        row.update(warm_ms=found, median_ms=statistics.median(found), launches=launches(kernels(run)))
    return rows


def _bind(peer: Peer, workload: Workload, leaves: Leaves) -> Callable[[], Any]:
    step = peer.build(workload)
    return lambda: step(leaves)
