"""Check that all compute the same number, and that otloss and the exact peers compute the same gradient as float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import otloss
from benchmarks.peers import OURS, PEERS, Peer
from benchmarks.peers.base import dense
from benchmarks.workloads import Leaves, Workload

PROBLEMS, POINTS, ITERATIONS = 2, 196, 250
"""The implicit gradient is that of the solution; a peer's may be that of its iterates. So a few problems of at most
this many points are iterated until both agree."""

GRADIENT_LIMIT, NUMBER_LIMIT, LESSER_NUMBER_LIMIT = 2e-2, 1e-3, 5e-3
"""Largest relative differences from float64 at which a peer counts as the same. otloss gets a tenth of each."""


def tensor(array: Any) -> Tensor:
    """A peer's array as a float64 tensor."""
    if isinstance(array, Tensor):
        return array.detach().double().cpu()
    return torch.from_numpy(np.array(array, dtype=np.float64))


def difference(one: Any, other: Tensor) -> float:
    """Largest absolute difference, relative to the largest entry of ``other``; infinite where ``one`` is not finite."""
    got = tensor(one)
    if not got.isfinite().all():
        return float("inf")
    other = tensor(other)
    return float((got - other).abs().max() / other.abs().max())


def reference(workload: Workload) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The numbers that peers may return, and the gradients of the first, in float64, of the inputs as they are handed
    over: rounded to the workload's dtype."""
    leaves = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in workload.leaves())
    cost, log_a, log_b = dense(workload, leaves)
    with otloss.use_backend("reference"):
        out = otloss.sinkhorn(cost, log_a=log_a, log_b=log_b, eps=workload.eps, max_iter=50 * ITERATIONS, tol=1e-9)
    entropies = sum((log.exp() * log).sum(-1) for log in (log_a, log_b))
    numbers = {"cost": out.transport_cost, "value": out.value, "entropy": out.value + workload.eps * entropies}
    grads = torch.autograd.grad(out.transport_cost.sum(), leaves) if workload.backward else ()
    return {name: number.detach() for name, number in numbers.items()}, list(grads)


def _rounding(workload: Workload) -> float:
    """What a gradient in half precision is off by, because it is rounded to the dtype of its input."""
    precision = torch.finfo(getattr(torch, workload.dtype))
    return precision.eps / 2 if precision.bits == 16 else 0.0


def leaves_on(device: str, workload: Workload, dtype: torch.dtype | None = None) -> Leaves:
    """The inputs on a device."""
    return tuple(t.detach().to(device).requires_grad_(t.requires_grad) for t in workload.leaves(dtype))


def check(workload: Workload, peers: tuple[Peer, ...] = PEERS, device: str = "cpu") -> dict[str, dict[str, Any]]:
    """For each peer that takes the workload: its relative errors on a device, and whether they pass.

    Raises:
        SystemExit: ours does not pass.
    """
    small = replace(workload.part(PROBLEMS, POINTS), iterations=ITERATIONS, tol=workload.tol and 1e-5)
    numbers, grads = reference(small)
    found: dict[str, dict[str, Any]] = {}
    for peer in (OURS, *peers):
        if not peer.applies(workload) or peer.skip(workload):
            continue
        try:
            got, got_grads = peer.build(small)(peer.native(small, leaves_on(device, small)))
        except Exception as error:
            found[peer.name] = {"same": False, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
            continue
        entry: dict[str, Any] = {"number": difference(got, numbers[peer.number])}
        worst = entry["number"] / (NUMBER_LIMIT if peer.exact else LESSER_NUMBER_LIMIT)
        if peer.exact and got_grads is not None:
            pairs = zip(got_grads, grads, strict=True)
            entry["gradient"] = max(difference(one, other) for one, other in pairs)
            worst = max(worst, (entry["gradient"] - _rounding(workload)) / GRADIENT_LIMIT)
        found[peer.name] = entry | {"same": worst < (0.1 if peer is OURS else 1)}
    if not found[OURS.name]["same"]:
        raise SystemExit(f"otloss does not agree with float64 on {workload.name}: {found[OURS.name]}")
    return found
