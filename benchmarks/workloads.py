"""The problems that are timed: features and marginal logits, as a self-supervised model hands them over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workload:
    """A batch of problems under the cosine cost; ``iterations`` Sinkhorn iterations are run, with no early stop.

    ``chunk``: peers also get the batch in calls of so many problems, where their tensors of a whole batch outgrow the
    caches and the allocator. Ours always gets the whole batch.
    """

    name: str
    batch: int
    n: int
    m: int
    d: int
    eps: float = 0.05
    iterations: int = 50
    chunk: int | None = None

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """x, y (post-ReLU, as a ResNet's maps are) and the logits of both marginals, requiring gradients."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(self.batch, *shape, generator=generator, dtype=torch.float64).to(dtype)

        x, y = normal(self.n, self.d).relu(), normal(self.m, self.d).relu()
        return tuple(t.requires_grad_() for t in (x, y, normal(self.n), normal(self.m)))


WORKLOADS = {
    w.name: w
    for w in (
        Workload("channels", batch=64, n=512, m=512, d=49, chunk=8),
        Workload("positions", batch=256, n=49, m=49, d=512),
        Workload("tokens", batch=64, n=196, m=196, d=384),
    )
}
