"""The contract between the solver and its backends: what goes in, what comes out, and the functions of a backend.

A backend is a module that fits :class:`Backend`; it knows nothing of ``nn.Module`` or autograd. The type checker holds
each of the modules against the protocol where they are registered (``otloss/backends/__init__.py``).
``otloss/backends/reference.py`` defines what each function must return, ``otloss/gradients.py`` derives it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "COLD",
    "NOTHING",
    "Backend",
    "Given",
    "Gradients",
    "Problem",
    "Shift",
    "Solution",
    "Start",
    "Upstream",
    "is_relaxed",
]


#: Stands for a gradient that there is not.
NOTHING = torch.empty(0)


class Problem(NamedTuple):
    """A batch of B problems: a dense cost or two sets of features, masses, and the strength of the entropy.

    The operators take its fields in this order, see ``otloss/operators.py``.
    """

    left: Tensor
    """The cost ``(B, n, m)``, or the features x ``(B, n, d)``."""
    right: Tensor | None
    """None for a dense cost, or the features y ``(B, m, d)``; then the cost of x and y that ``kind`` names is meant."""
    a: Tensor
    """Masses ``(B, n)`` of total 1. Before ``normalise`` they are as they were given, see :class:`Given`."""
    b: Tensor
    """Masses ``(B, m)`` likewise."""
    eps: float
    rho_a: Tensor | None = None
    """Strength ``(B,)`` of the penalty on the marginal a; None makes it a constraint. With a penalty on either marginal
    the masses have any total."""
    rho_b: Tensor | None = None
    """Likewise of the marginal b."""
    kind: str = "cosine"
    """The cost of features: "cosine" is 1 - cos(x, y), "sqeuclidean" |x - y|^2, "dot" -<x, y>."""

    def with_masses(self, a: Tensor, b: Tensor) -> Problem:
        """The same with other masses; the compiler of PyTorch 2.6 does not follow ``_replace``."""
        return Problem(self.left, self.right, a, b, self.eps, self.rho_a, self.rho_b, self.kind)


def is_relaxed(problem: Problem) -> bool:
    """Whether a marginal has a penalty in place of a constraint; the compiler of PyTorch 2.6 follows no property."""
    return problem.rho_a is not None or problem.rho_b is not None


class Given(NamedTuple):
    """How a problem was given. Masses came as "masses", as "logs" of masses, or not, as "uniform" ones."""

    a: str
    b: str
    tolerance: float
    """How far the totals of a and b may lie apart, relatively."""
    tensor_eps: bool = False
    """Whether eps came as a tensor: the problem is then in units of it, and its own eps is 1."""


class Start(NamedTuple):
    """Potentials to start from, of the cost as it was given; those of points without mass do not count."""

    f: Tensor | None = None
    """``(B, n)``, or None for a start without any."""
    g: Tensor | None = None
    """``(B, m)`` likewise."""


#: A start without potentials.
COLD = Start()


class Shift(NamedTuple):
    """What a backend took out of a dense cost before anything else: the minima of its rows, then of its columns.

    A constant of a row or column changes one potential and nothing else. Where it is large, the digits of a sum with it
    would be lost. Minima are taken over points with mass.
    """

    rows: Tensor
    """``(B, n)``."""
    columns: Tensor
    """``(B, m)``."""


class Solution(NamedTuple):
    """What a solve returns."""

    f: Tensor
    """Potentials ``(B, n)`` of the cost that is left after the shift."""
    g: Tensor
    """Potentials ``(B, m)``, with <a, f> = <b, g>."""
    transport_cost: Tensor
    """``(B,)`` <T, C>."""
    value: Tensor
    """``(B,)`` <T, C> + eps KL(T | ab')."""
    n_iter: Tensor
    """``(B,)`` iterations that each problem took, int64."""
    error: Tensor
    """``(B,)`` L1 distance of both marginals of the plan from a and b. The plan is that of the f and g returned."""
    shift: Shift | None = None
    """What the cost was shifted by; None where it was not."""


class Upstream(NamedTuple):
    """Gradients of the loss by the outputs of a solve; None stands for zero."""

    cost: Tensor | None = None
    """``(B,)``, by the transport cost."""
    value: Tensor | None = None
    """``(B,)``, by the value."""
    f: Tensor | None = None
    """``(B, n)``, by f."""
    g: Tensor | None = None
    """``(B, m)``, by g. Of each problem, the totals of ``f`` and ``g`` are equal."""


class Gradients(NamedTuple):
    """Gradients of the loss by the inputs of a solve; those by a and b take them as free, whatever their total."""

    left: Tensor
    """By the cost or by x; empty where it was not asked for."""
    right: Tensor
    """By y; empty for a dense cost, and where it was not asked for."""
    a: Tensor
    b: Tensor
    rho: Tensor = NOTHING
    """``(B, 2)`` by the penalties on both marginals; empty for a problem without any, 0 for a constraint."""


class Backend(Protocol):
    """The functions and constants of a backend's module."""

    TWICE_DIFFERENTIABLE: bool
    """Whether unrolled gradients are made of differentiable PyTorch operations. Implicit ones are differentiated by the
    reference's formula for them, whatever the backend."""
    KEEPS_COST: bool
    """Whether ``solve`` and ``implicit_gradient`` make use of ``kept``."""
    RELAXES: bool
    """Whether problems may have penalties rho_a, rho_b."""
    KINDS: tuple[str, ...]
    """The kinds of cost that are made from features inside, see `Problem.kind`; others are made before, and stored."""
    READS_HALF: bool
    """Whether cost or features may be float16 or bfloat16 beside float32 masses; if not, they are converted before."""

    def status(self) -> str | None:
        """Why the backend cannot be used here, or None."""

    def normalise(self, problem: Problem, given: Given, check: bool) -> tuple[Problem, bool]:
        """The problem with masses of total 1, and whether every point is known to have mass.

        With penalties masses keep their totals. A share too small to count becomes exactly 0. With ``check``, invalid
        masses raise a ValueError.
        """

    def by_given(
        self, problem: Problem, given: Given, a: Tensor, b: Tensor, by_a: Tensor, by_b: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients by the masses as they were given, from those by a and b of total 1; empty by uniform ones."""

    def worst_error(self, solution: Solution) -> float:
        """The largest error of a solution, 0 of no problems; NaN where a potential or a cost is not finite."""

    def solve(
        self,
        problem: Problem,
        max_iter: int,
        tol: float,
        kept: Tensor | None = None,
        accelerate: bool = False,
        start: Start = COLD,
    ) -> Solution:
        """Iterate until the L1 error of the marginals falls below ``tol``, at most ``max_iter`` times.

        Iterations are the plain ones. With ``accelerate`` a backend may take any steps to the solution; a sweep over
        the cost counts as an iteration.

        ``kept (B, n, m)`` has the dtype of the masses; the cost of features is written to it for the gradient to come.

        ``start`` has the dtype of the masses. An iteration is a half-step of f and then one of g, so that g alone
        decides where it leads. A start from which the way would be longer than from none is left aside.
        """

    def implicit_gradient(
        self,
        problem: Problem,
        f: Tensor,
        g: Tensor,
        upstream: Upstream,
        adjoint: bool,
        need_cost: bool,
        kept: Tensor | None = None,
        shift: Shift | None = None,
    ) -> tuple[Gradients, Tensor]:
        """The gradients of the converged problem, and the relative residual ``(B,)`` of its adjoint system.

        Without ``adjoint`` the plan is a constant: the multipliers are 0. ``need_cost`` asks for the gradients of left
        and right. ``kept`` is what ``solve`` has written there, ``shift`` that of a dense cost's solution, or zeros
        where the solution has none.
        """

    def unrolled_gradient(
        self, problem: Problem, n_iter: Tensor, upstream: Upstream, need_cost: bool, max_iter: int
    ) -> Gradients:
        """The gradients through the ``n_iter (B,)`` iterations that were run; ``upstream`` has neither f nor g.

        No problem took more than ``max_iter`` iterations.
        """
