"""One small interface over ours and the peers: inputs to (transport cost or value, what the gradient is)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

import otloss
from benchmarks.workloads import Workload

Loss = Callable[[Workload, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """``exact``: whether the gradient is that of the sharp cost <T, C>, by features *and* marginals.

    ``whole``: whether it is timed on the whole batch in one call also where a workload names a chunk.
    """

    name: str
    loss: Loss
    exact: bool
    needs: str | None = None
    whole: bool = False

    @property
    def installed(self) -> bool:
        return self.needs is None or find_spec(self.needs) is not None


def _ours(w: Workload, x: Tensor, y: Tensor, za: Tensor, zb: Tensor) -> Tensor:
    out = otloss.cosine_sinkhorn(
        x, y, log_a=za.log_softmax(-1), log_b=zb.log_softmax(-1), eps=w.eps, max_iter=w.iterations, tol=0.0
    )
    return out.transport_cost


def _pot(method: str, grad: str) -> Loss:
    def loss(w: Workload, x: Tensor, y: Tensor, za: Tensor, zb: Tensor) -> Tensor:
        import ot.batch

        result = ot.batch.solve_batch(
            otloss.cosine_cost(x, y),
            w.eps,
            za.softmax(-1),
            zb.softmax(-1),
            max_iter=w.iterations,
            tol=0.0,
            method=method,
            grad=grad,
        )
        return result.value if grad == "envelope" else result.value_linear

    return loss


def _geomloss(w: Workload, x: Tensor, y: Tensor, za: Tensor, zb: Tensor) -> Tensor:
    import geomloss.ot

    cost = otloss.cosine_cost(x, y)
    return geomloss.ot.solve_batch(cost, reg=w.eps, a=za.softmax(-1), b=zb.softmax(-1), max_iter=w.iterations).value


def _plain(w: Workload, x: Tensor, y: Tensor, za: Tensor, zb: Tensor) -> Tensor:
    """Log-domain iterations in plain PyTorch, differentiated by autograd."""
    cost, log_a, log_b = otloss.cosine_cost(x, y), za.log_softmax(-1), zb.log_softmax(-1)
    g = torch.zeros_like(log_b)
    for _ in range(w.iterations):
        f = -w.eps * torch.logsumexp((g[:, None, :] - cost) / w.eps + log_b[:, None, :], -1)
        g = -w.eps * torch.logsumexp((f[:, :, None] - cost) / w.eps + log_a[:, :, None], -2)
    plan = torch.exp((f[:, :, None] + g[:, None, :] - cost) / w.eps + log_a[:, :, None] + log_b[:, None, :])
    return (plan * cost).sum((-1, -2))


OURS = Peer("otloss", _ours, exact=True)
PEERS = (
    Peer("POT log_sinkhorn, autodiff", _pot("log_sinkhorn", "autodiff"), exact=True, needs="ot", whole=True),
    Peer("POT sinkhorn, autodiff", _pot("sinkhorn", "autodiff"), exact=True, needs="ot", whole=True),
    Peer("plain PyTorch, log-domain", _plain, exact=True),
    Peer("POT log_sinkhorn, last_step", _pot("log_sinkhorn", "last_step"), exact=False, needs="ot"),
    Peer("POT sinkhorn, last_step", _pot("sinkhorn", "last_step"), exact=False, needs="ot"),
    Peer("POT log_sinkhorn, envelope", _pot("log_sinkhorn", "envelope"), exact=False, needs="ot"),
    Peer("POT sinkhorn, envelope", _pot("sinkhorn", "envelope"), exact=False, needs="ot"),
    Peer("geomloss solve_batch", _geomloss, exact=False, needs="geomloss", whole=True),
)
