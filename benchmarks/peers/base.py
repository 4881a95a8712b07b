"""What a peer is: a name, what it computes, and how to make one of its steps."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import otloss
from benchmarks.workloads import Leaves, Workload

Step = Callable[[Any], tuple[Any, Any]]
"""From inputs in the peer's own arrays to one number for each problem, and gradients or None. Finished on return."""


def _as_it_is(_: Workload, leaves: Leaves) -> Any:
    return leaves


def _fits(_: Workload) -> str | None:
    return None


@dataclass(frozen=True)
class Peer:
    """A library in one mode.

    Attributes:
        library: its key in plots and lists of versions.
        build: makes a step for the shape of a workload. It may compile in the first call of the step.
        exact: whether the gradient is that of the sharp cost <T, C>, by costs or features *and* marginals.
        number: what it returns: ``"cost"`` <T, C>, ``"value"`` <T, C> + eps KL(T | ab') or ``"entropy"``
            <T, C> - eps H(T).
        passes: ``"backward"`` or ``"forward"`` where it serves only with or only without a backward, else ``"both"``.
        stops: whether it can stop at a tolerance.
        needs: modules that must import.
        native: turns torch tensors into the peer's arrays.
        unfit: why it cannot take a workload, or None.
        quick: whether it also runs in the quick suite.
        main_only: whether it runs on the main workloads only, which keeps the suite short.
        warm_in_full: whether the first call compiles for the exact shape.
        streams: whether it stores no cost, so that smaller calls would gain it nothing.
    """

    name: str
    library: str
    build: Callable[[Workload], Step]
    exact: bool = False
    number: str = "cost"
    passes: str = "both"
    stops: bool = False
    needs: tuple[str, ...] = ()
    native: Callable[[Workload, Leaves], Any] = _as_it_is
    unfit: Callable[[Workload], str | None] = _fits
    quick: bool = False
    main_only: bool = False
    warm_in_full: bool = False
    streams: bool = False

    def missing(self) -> str | None:
        """Why it cannot be used here at all, or None."""
        try:
            for module in self.needs:
                importlib.import_module(module)
        except Exception as error:  # a broken install of a peer must not stop the suite
            return f"does not import: {type(error).__name__}: {error}"
        return None

    def applies(self, workload: Workload) -> bool:
        """Whether the mode is meant for such a workload."""
        if self.main_only and not workload.main:
            return False
        return self.passes == "both" or (self.passes == "backward") == workload.backward

    def skip(self, workload: Workload) -> str | None:
        """Why it cannot run a workload that it applies to, or None."""
        if workload.tol and not self.stops:
            return "cannot stop at a tolerance"
        return self.missing() or self.unfit(workload)


def torch_build(loss: Callable[[Workload, Leaves], Tensor]) -> Callable[[Workload], Step]:
    """Make a step from a PyTorch loss that returns one number for each problem."""

    def build(workload: Workload) -> Step:
        def step(leaves: Leaves) -> tuple[Tensor, tuple[Tensor | None, ...] | None]:
            if not workload.backward:
                with torch.no_grad():
                    return loss(workload, leaves), None
            with torch.enable_grad():  # geomloss turns gradients off for a while, and after an error for good
                numbers = loss(workload, leaves)
            # A lesser mode may give the marginals no gradient. It is timed all the same.
            return numbers, torch.autograd.grad(numbers.sum(), leaves, allow_unused=True)

        return step

    return build


def dense(workload: Workload, leaves: Leaves) -> tuple[Tensor, Tensor, Tensor]:
    """Cost and log-marginals, for peers that take a matrix."""
    if workload.inputs == "samples":
        cost = squared_distances(*leaves)
        return cost, *(cost.new_full((len(cost), k), -math.log(k)) for k in cost.shape[1:])
    *points, logits_a, logits_b = leaves
    cost = points[0] if workload.inputs == "dense" else otloss.cosine_cost(*points)
    return cost, log_masses(logits_a), log_masses(logits_b)


def log_masses(logits: Tensor) -> Tensor:
    """Log-softmax, in float32 for half precision, as autocast takes it."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None, :] - 2 * x @ y.mT


def only_features(workload: Workload) -> str | None:
    """For peers that take points."""
    return None if workload.inputs == "features" else "takes points, not a cost"
