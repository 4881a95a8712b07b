"""otloss, POT, and the iteration in plain PyTorch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import otloss
from benchmarks.peers.base import Peer, Step, dense, log_masses, squared_distances, torch_build
from benchmarks.workloads import Leaves, Workload


def _ours(w: Workload, leaves: Leaves) -> Tensor:
    options: dict[str, Any] = {"eps": w.eps, "max_iter": w.iterations, "tol": w.tol}
    if not w.backward:
        options["gradient"] = "none"
    if w.inputs == "samples":
        return otloss.sinkhorn(squared_distances(*leaves), **options).transport_cost
    *points, logits_a, logits_b = leaves
    options |= {"log_a": log_masses(logits_a), "log_b": log_masses(logits_b)}
    solve = otloss.sinkhorn if w.inputs == "dense" else otloss.cosine_sinkhorn
    return solve(*points, **options).transport_cost


def _pot(method: str, grad: str) -> Callable[[Workload, Leaves], Tensor]:
    def loss(w: Workload, leaves: Leaves) -> Tensor:
        import ot.batch

        cost, log_a, log_b = dense(w, leaves)
        result = ot.batch.solve_batch(
            cost, w.eps, log_a.exp(), log_b.exp(), max_iter=w.iterations, tol=w.tol, method=method, grad=grad
        )
        return result.value if grad == "envelope" else result.value_linear

    return loss


def _pot_as_published(w: Workload) -> Step:
    """The lines that POT's example times, on NumPy arrays."""
    import ot.batch

    def step(arrays: Any) -> tuple[Any, None]:
        cost = ot.batch.dist_batch(*arrays)
        solved = ot.batch.solve_batch(cost, reg=w.eps, max_iter=w.iterations, tol=w.tol, reg_type="entropy")
        return solved.value_linear, None

    return step


def _half_steps(cost: Tensor, log_a: Tensor, log_b: Tensor, g: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    f = -eps * torch.logsumexp((g[:, None, :] - cost) / eps + log_b[:, None, :], -1)
    return f, -eps * torch.logsumexp((f[:, :, None] - cost) / eps + log_a[:, :, None], -2)


def _sharp_cost(cost: Tensor, log_a: Tensor, log_b: Tensor, f: Tensor, g: Tensor, eps: float) -> Tensor:
    log_plan = (f[:, :, None] + g[:, None, :] - cost) / eps + log_a[:, :, None] + log_b[:, None, :]
    return (log_plan.exp() * cost).sum((-1, -2))


def _plain(half_steps: Callable[..., Any], sharp_cost: Callable[..., Tensor]) -> Callable[[Workload, Leaves], Tensor]:
    """Log-domain iterations, differentiated by autograd."""

    def loss(w: Workload, leaves: Leaves) -> Tensor:
        cost, log_a, log_b = dense(w, leaves)
        g = torch.zeros_like(log_b)
        for _ in range(w.iterations):
            f, g = half_steps(cost, log_a, log_b, g, w.eps)
        return sharp_cost(cost, log_a, log_b, f, g, w.eps)

    return loss


def _compiled(w: Workload) -> Step:
    """Compile one iteration and call it in a loop, because an unrolled loop takes far too long to compile."""
    torch._dynamo.config.recompile_limit = 256  # each shape is compiled by itself
    compiled = (torch.compile(f, dynamic=False) for f in (_half_steps, _sharp_cost))
    return torch_build(_plain(*compiled))(w)


OURS = Peer("otloss", "otloss", torch_build(_ours), exact=True, stops=True, quick=True)


def _pot_peer(method: str, grad: str, **options: Any) -> Peer:
    options = {"passes": "backward", "stops": True, "needs": ("ot.batch",), **options}
    return Peer(f"POT {method}, {grad}", "POT", torch_build(_pot(method, grad)), **options)


PEERS = (
    _pot_peer("log_sinkhorn", "autodiff", exact=True, quick=True),
    _pot_peer("sinkhorn", "autodiff", exact=True),
    _pot_peer("log_sinkhorn", "last_step", main_only=True),
    _pot_peer("sinkhorn", "last_step", main_only=True),
    _pot_peer("log_sinkhorn", "envelope", number="entropy", main_only=True),
    _pot_peer("sinkhorn", "envelope", number="entropy", quick=True),
    _pot_peer("log_sinkhorn", "detach", passes="forward"),
    _pot_peer("sinkhorn", "detach", passes="forward"),
    Peer(
        "POT on NumPy, as published",
        "POT",
        _pot_as_published,
        passes="forward",
        stops=True,
        needs=("ot.batch",),
        native=lambda _, leaves: [t.detach().numpy() for t in leaves],
        unfit=lambda w: None if w.inputs == "samples" else "is for POT's own example",
    ),
    Peer("PyTorch, log-domain", "PyTorch", torch_build(_plain(_half_steps, _sharp_cost)), exact=True),
    Peer("PyTorch, log-domain, compiled", "PyTorch", _compiled, exact=True, warm_in_full=True, main_only=True),
)
