"""geomloss's two generations, KeOps through geomloss, and flash-sinkhorn, which shares geomloss's interface."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.base import Peer, dense, only_features, torch_build
from benchmarks.workloads import Leaves, Workload, unit

SCALING = 0.9
"""Ratio of one blur to the next in `SamplesLoss`, which anneals: about 25 iterations on unit vectors at eps 0.05."""


def _solve_batch(w: Workload, leaves: Leaves) -> Tensor:
    import geomloss.ot

    cost, log_a, log_b = dense(w, leaves)
    return geomloss.ot.solve_batch(cost, reg=w.eps, a=log_a.exp(), b=log_b.exp(), max_iter=w.iterations).value


def _samples_loss(backend: str) -> Callable[[Workload, Leaves], Tensor]:
    """On unit vectors |x - y|^2 / 2 is the cosine cost, and blur = sqrt(eps)."""

    def loss(w: Workload, leaves: Leaves) -> Tensor:
        from geomloss import SamplesLoss

        x, y, logits_a, logits_b = leaves
        solver = SamplesLoss("sinkhorn", p=2, blur=w.eps**0.5, scaling=SCALING, debias=False, backend=backend)
        return solver(logits_a.softmax(-1), unit(x), logits_b.softmax(-1), unit(y))

    return loss


def _keops_fits(w: Workload) -> str | None:
    if w.d > 64:
        return "KeOps unrolls the dimension in C++; above 64 compiling takes minutes and the code spills"
    return only_features(w)


def _flash(w: Workload, leaves: Leaves) -> Tensor:
    from flash_sinkhorn import SamplesLoss

    x, y, logits_a, logits_b = leaves
    # The iterations and the precision of the others; by default it anneals, and multiplies in TF32.
    options = {"backend": "alternating", "use_epsilon_scaling": False, "eps": w.eps, "n_iters": w.iterations}
    solver = SamplesLoss("sinkhorn", debias=False, half_cost=True, allow_tf32=False, **options)
    return solver(logits_a.softmax(-1), unit(x), logits_b.softmax(-1), unit(y))


def _flash_fits(w: Workload) -> str | None:
    return only_features(w) if torch.cuda.is_available() else "needs CUDA tensors"


PEERS = (
    Peer("geomloss solve_batch", "geomloss", torch_build(_solve_batch), number="value", needs=("geomloss.ot",)),
    Peer(
        f"geomloss SamplesLoss, scaling {SCALING}",
        "geomloss",
        torch_build(_samples_loss("tensorized")),
        number="value",
        needs=("geomloss",),
        unfit=only_features,
        main_only=True,
    ),
    Peer(
        f"geomloss SamplesLoss on KeOps, scaling {SCALING}",
        "KeOps",
        torch_build(_samples_loss("online")),
        number="value",
        needs=("pykeops", "geomloss"),
        unfit=_keops_fits,
        main_only=True,
        warm_in_full=True,
        streams=True,
    ),
    Peer(
        "flash-sinkhorn",
        "flash-sinkhorn",
        torch_build(_flash),
        number="value",
        needs=("flash_sinkhorn",),
        unfit=_flash_fits,
        main_only=True,
    ),
)
