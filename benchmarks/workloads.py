"""The problems that are timed, in one table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Leaves = tuple[Tensor, ...]


@dataclass(frozen=True)
class Workload:
    """A batch of problems, as a model hands them over.

    ``inputs`` says what is handed over: ``"features"`` (x, y and the logits of both marginals, under the cosine cost),
    ``"dense"`` (the cost and the logits) or ``"samples"`` (points under the squared distance, uniform marginals).
    Exactly ``iterations`` are run, unless ``tol`` is positive: then they are a bound, and a peer that cannot stop at a
    tolerance is left out. With ``chunk``, peers also get the batch in calls of that many problems, because their
    tensors of the whole batch outgrow the caches; otloss always gets the whole batch. ``main`` workloads have targets,
    see `benchmarks.targets`.
    """

    name: str
    batch: int
    n: int
    m: int
    d: int
    eps: float = 0.05
    iterations: int = 50
    tol: float = 0.0
    inputs: str = "features"
    dtype: str = "float32"
    backward: bool = True
    chunk: int | None = None
    main: bool = False

    def leaves(self, dtype: torch.dtype | None = None) -> Leaves:
        """The inputs, which require gradients if there is a backward. Features are post-ReLU, as in a ResNet's maps."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(self.batch, *shape, generator=generator, dtype=torch.float64)

        tensors: list[Tensor]
        if self.inputs == "samples":
            x = normal(self.n, self.d)
            tensors = [x, x[:, : self.m] + 0.1 * normal(self.m, self.d)]
        else:
            x, y = normal(self.n, self.d).relu(), normal(self.m, self.d).relu()
            points = [x, y] if self.inputs == "features" else [1 - unit(x) @ unit(y).mT]
            tensors = [*points, normal(self.n), normal(self.m)]
        wanted = getattr(torch, self.dtype) if dtype is None else dtype
        return tuple(t.to(wanted).requires_grad_(self.backward) for t in tensors)

    def part(self, problems: int, points: int | None = None) -> Workload:
        """The same kind of problem with a smaller batch and at most ``points`` points a side."""
        n, m = (k if points is None else min(k, points) for k in (self.n, self.m))
        return replace(self, batch=min(self.batch, problems), n=n, m=m, chunk=None)

    def describe(self) -> str:
        """One line that describes the workload."""
        what = {"features": f"features of dimension {self.d}", "dense": "a stored cost"}.get(
            self.inputs, f"points of dimension {self.d}, squared distance, uniform marginals"
        )
        stop = f"{self.iterations} iterations" if not self.tol else f"until the error is below {self.tol:g}"
        passes = "forward + backward" if self.backward else "forward only"
        return f"{self.batch} × {self.n} × {self.m}, {what}, eps {self.eps:g}, {stop}, {self.dtype}, {passes}"


def unit(x: Tensor) -> Tensor:
    """Rows of length one."""
    return torch.nn.functional.normalize(x, dim=-1)


def split(leaves: Leaves, per_call: int) -> list[Leaves]:
    """The batch in parts of ``per_call`` problems. Each part has leaves of its own."""
    whole = [t.detach() for t in leaves]
    parts = zip(*(t.split(per_call) for t in whole), strict=True)
    return [tuple(t.clone().requires_grad_(leaves[0].requires_grad) for t in part) for part in parts]


def table(workloads: Iterable[Workload]) -> dict[str, Workload]:
    return {w.name: w for w in workloads}


_CHANNELS = Workload("channels", batch=64, n=512, m=512, d=49, chunk=8, main=True)
_TOKENS = Workload("tokens", batch=64, n=196, m=196, d=384, chunk=8, main=True)
_POSITIONS = Workload("positions", batch=256, n=49, m=49, d=512, chunk=32, main=True)

WORKLOADS = table(
    (
        _CHANNELS,
        _TOKENS,
        _POSITIONS,
        Workload("tiny", batch=4096, n=8, m=8, d=32, main=True),
        Workload("large", batch=1, n=4096, m=4096, d=64, main=True),
        replace(_TOKENS, name="tokens-197", n=197, m=197, main=False),
        replace(_POSITIONS, name="positions-64", batch=64, chunk=None, main=False),
        replace(_POSITIONS, name="positions-1024", batch=1024, main=False),
        Workload("superglue", batch=8, n=1024, m=1024, d=256, chunk=1),
        Workload("rectangular", batch=64, n=196, m=49, d=384, chunk=16),
        replace(_TOKENS, name="tokens-eps0.005", eps=0.005, main=False),
        replace(_TOKENS, name="tokens-eps0.5", eps=0.5, main=False),
        replace(_TOKENS, name="tokens-tol", tol=1e-3, iterations=1000, main=False),
        replace(_TOKENS, name="tokens-forward", backward=False, main=False),
        replace(_TOKENS, name="tokens-dense", inputs="dense", main=False),
        replace(_TOKENS, name="tokens-float64", dtype="float64", main=False),
        replace(_CHANNELS, name="channels-forward", backward=False, main=False),
        replace(_CHANNELS, name="channels-dense", inputs="dense", main=False),
        # What POT times in its own example of batches, examples/backends/plot_ot_batch.py.
        Workload(
            "pot-example",
            batch=128,
            n=8,
            m=8,
            d=2,
            eps=10.0,
            iterations=1000,
            tol=1e-3,
            inputs="samples",
            dtype="float64",
            backward=False,
        ),
    )
)
MAIN = table(w for w in WORKLOADS.values() if w.main)
