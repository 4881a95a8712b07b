"""The curves behind the plots: time against n, time against the batch, error against time."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from benchmarks import timing
from benchmarks.check import difference, reference
from benchmarks.peers import OURS, Peer, by_name
from benchmarks.workloads import Workload

PEERS = (
    "POT log_sinkhorn, autodiff",
    "POT sinkhorn, envelope",
    "OTT-JAX kernel, implicit",
    "OTT-JAX lse, implicit",
    "PyTorch, log-domain",
    "geomloss solve_batch",
)
EXACT = (
    "POT log_sinkhorn, autodiff",
    "POT sinkhorn, autodiff",
    "OTT-JAX kernel, implicit",
    "OTT-JAX lse, implicit",
    "PyTorch, log-domain",
)
SLOW = 1.5
"""A curve ends with its first point above this many seconds."""

BY_N = [Workload("by n", batch=16, n=n, m=n, d=64) for n in (8, 16, 32, 64, 128, 256, 512, 1024)]
BY_BATCH = [Workload("by batch", batch=batch, n=64, m=64, d=64) for batch in (1, 4, 16, 64, 256, 1024, 4096)]
ACCURACY = Workload("accuracy", batch=16, n=196, m=196, d=64, eps=0.02)
ITERATIONS = (10, 20, 50, 100, 200)
"""Multiples of ten: OTT-JAX iterates in blocks of ten."""


def _timed(peer: Peer, workload: Workload) -> timing.Entrant | None:
    """The peer with its timed runs. Where it fails, the reason is printed and None returned."""
    entrant = timing.Entrant(peer, workload, workload.batch)
    try:
        entrant.prepare()
        entrant.warm_up()
        while not entrant.seconds or (len(entrant.seconds) < 5 and sum(entrant.seconds) < SLOW):
            entrant.seconds.append(entrant.run()[0])
    except Exception as error:
        print(f"  {peer.name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
        return None
    return entrant


def _usable(names: tuple[str, ...], workload: Workload) -> list[Peer]:
    return [OURS, *(peer for peer in map(by_name, names) if not peer.skip(workload))]


def _over(workloads: list[Workload], axis: str) -> list[dict[str, Any]]:
    curve, done = [], set()
    for w in workloads:
        for peer in _usable(PEERS, w):
            if peer.name in done or (entrant := _timed(peer, w)) is None:
                continue
            seconds = statistics.median(entrant.seconds)
            if seconds > SLOW:
                done.add(peer.name)
            curve.append({"name": peer.name, "library": peer.library, axis: getattr(w, axis), "seconds": seconds})
            print(f"  {axis} {getattr(w, axis):5d}  {peer.name:30s} {seconds:9.5f} s", flush=True)
    return curve


def by_n() -> list[dict[str, Any]]:
    return _over(BY_N, "n")


def by_batch() -> list[dict[str, Any]]:
    return _over(BY_BATCH, "batch")


def accuracy() -> list[dict[str, Any]]:
    """For each number of iterations, the largest relative error of the gradients against the float64 solution."""
    _, grads = reference(ACCURACY)
    curve = []
    for iterations in ITERATIONS:
        w = replace(ACCURACY, iterations=iterations)
        for peer in _usable(EXACT, w):
            if (entrant := _timed(peer, w)) is None or entrant.step is None:
                continue
            seconds, (_, got) = statistics.median(entrant.seconds), entrant.step(entrant.calls[0])
            error = max(difference(one, other) for one, other in zip(got, grads, strict=True))
            point = {"name": peer.name, "library": peer.library, "iterations": iterations, "error": error}
            curve.append(point | {"seconds": seconds})
            print(f"  {iterations:4d} iterations  {peer.name:30s} {seconds:9.5f} s  error {error:.1e}", flush=True)
    return curve


SWEEPS = {"n": by_n, "batch": by_batch, "accuracy": accuracy}
