"""What a solve returns: :class:`SinkhornOutput`, and the problem behind it, from which the plan can be built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from otloss.assignment import log_plan
from otloss.backends.protocol import Problem, Solution
from otloss.backends.reference import shifted, transport_plan, unshifted
from otloss.checks import no_autocast
from otloss.cost import cosine_cost
from otloss.operators import converged
from otloss.summary import Summary, summarise

__all__ = ["PlanSource", "SinkhornOutput"]


class SinkhornOutput:
    """What :func:`sinkhorn` and :func:`cosine_sinkhorn` return.

    Attributes:
        transport_cost: ``(B,)`` <T, C>, the sharp Sinkhorn loss.
        value: ``(B,)`` <T, C> + eps KL(T | ab').
        f: ``(B, n)`` and ``g``: ``(B, m)`` potentials, T_ij = a_i b_j exp((f_i + g_j - C_ij)/eps), <a, f> = <b, g>.
        n_iter: ``(B,)`` iterations that each problem took: sweeps over its cost.
        marginal_error: ``(B,)`` L1 distance of both marginals of the plan from a and b.
        converged: ``(B,)`` whether that is below ``tol``, but for what the rounding of f and g does to the plan: at
            most 4 u (<a, |f|> + <b, |g|>) / eps + 2 u (1 + log(n m)), with u = 2^-24 (2^-53 in float64), for f and g of
            the cost without the minima of its rows and columns.
        plan: ``(B, n, m)``, built on first use, from cost or features as they are then. That these were not changed in
            place is checked, except in a compiled function and of tensors of inference mode, which count no writes. Of
            features the cost is PyTorch's product: see :func:`cosine_cost`.

    Each output that requires a gradient carries its own exact one; what the mode cannot differentiate does not require
    any, nor does anything of a problem that was solved under ``torch.no_grad``.
    """

    def __init__(self, source: PlanSource, solution: Solution, gradient: str, tol: float) -> None:
        self._source, self._gradient, self._tol = source, gradient, tol
        self._solution = solution
        self._plan: Tensor | None = None
        self._log_plan: Tensor | None = None
        shape = source.batch
        self.transport_cost, self.value, self.n_iter, self.marginal_error = (x.reshape(shape) for x in solution[2:6])

    @property
    def f(self) -> Tensor:
        """Potentials ``(B, n)``."""
        return self._potentials()[0]

    @property
    def g(self) -> Tensor:
        """Potentials ``(B, m)``."""
        return self._potentials()[1]

    @property
    def converged(self) -> Tensor:
        """``(B,)`` whether each problem has converged."""
        return converged(self._source.problem, self._solution, self._tol).reshape(self._source.batch)

    def _potentials(self) -> tuple[Tensor, Tensor]:
        """f and g of the cost as it was given, with <a, f> = <b, g>."""
        f, g, batch = self._solution.f, self._solution.g, self._source.batch
        if self._solution.shift is not None:
            f, g = unshifted(self._solution, *self._source.masses(constant=not f.requires_grad))
        return f.reshape(*batch, f.shape[-1]), g.reshape(*batch, g.shape[-1])

    @property
    def plan(self) -> Tensor:
        """The plan ``(B, n, m)``. Any function of it is differentiable in mode "implicit"."""
        if self._plan is not None:
            return self._plan
        plan = self._source.plan(self._solution, constant=self._gradient != "implicit")
        # A plan that was built under no_grad is not stored: the next one may need a graph.
        if plan.requires_grad or not self._solution.f.requires_grad:
            self._plan = plan
        return plan

    def __repr__(self) -> str:
        done, total = int(self.converged.sum()), self.converged.numel()
        return f"SinkhornOutput(f={tuple(self.f.shape)}, g={tuple(self.g.shape)}, converged={done}/{total})"

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float, torch.Size]:
        """Cost, a, b, f, g and eps of the plan, one dimension for all problems, and the shape of the batch.

        The cost is the one after the shift, which is that of f and g. All have the gradients that this mode gives.
        """
        source, solution, constant = self._source, self._solution, self._gradient != "implicit"
        source._check_unchanged()
        f, g = (solution.f.detach(), solution.g.detach()) if constant else (solution.f, solution.g)
        with no_autocast(f):
            *points, a, b = source._differentiable(constant)
            points = [t.to(f.dtype) for t in points]
            cost = shifted(points[0], solution.shift) if len(points) == 1 else cosine_cost(points[0], points[1])
        return cost, a, b, f, g, source.problem.eps, source.batch

    @property
    def log_plan(self) -> Tensor:
        """log T_ij = log a_i + log b_j + (f_i + g_j - C_ij)/eps ``(B, n, m)``; what holds of ``plan`` holds of it.

        It is finite wherever both points have mass, also where the plan underflows, and so is its gradient. It is -inf
        with gradient 0 where a point has none: select the pairs of a loss by an index or ``torch.where``, for
        0 times -inf is NaN.

        Example:
            >>> import torch, otloss
            >>> out = otloss.sinkhorn(torch.tensor([[0.0, 9.0], [9.0, 0.0]]), eps=0.05)
            >>> out.plan[0, 1].item(), round(out.log_plan[0, 1].item(), 1)
            (0.0, -180.7)
        """
        if self._log_plan is not None:
            return self._log_plan
        cost, a, b, f, g, eps, batch = self._parts()
        with no_autocast(f):
            result = log_plan(cost, a, b, f, g, eps)
        result = result.reshape(*batch, *result.shape[1:])
        if result.requires_grad or not self._solution.f.requires_grad:  # as for the plan
            self._log_plan = result
        return result

    def summary(self) -> Summary:
        """What to look at first: convergence, iterations, perplexities, and the share of the mass that is matched.

        Print it, or read its fields. It has no gradient, builds the plan, and waits for the device.

        Example:
            >>> import torch, otloss
            >>> print(otloss.sinkhorn(1 - torch.eye(4).expand(3, 4, 4), eps=0.1).summary())
            3 of 3 problems of 4 x 4 points converged in ... iterations (median; most ...), marginal error at most ...
            perplexity: a 4 of 4, b 4 of 4, rows of the plan 1.001 of 4
            mass matched: 1
        """
        return summarise(self)


class PlanSource:
    """A problem that was solved, from which the plan can be built, and the shape of its batch."""

    def __init__(self, problem: Problem, batch: torch.Size) -> None:
        self.problem, self.batch = problem, batch
        self._versions = None if torch.compiler.is_compiling() else self._count_writes()
        self._tracked = self._tracks_gradients()

    def __getstate__(self) -> dict[str, Any]:
        self._check_unchanged()
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._versions = self._count_writes()  # a copy's tensors count from 0 again
        self._tracked = [False] * len(self._tracked)  # a copy's potentials have no graph

    def _operands(self) -> list[Tensor]:
        """Cost or features, and the masses."""
        left, right, a, b, _ = self.problem
        return [t for t in (left, right, a, b) if t is not None]

    def _tracks_gradients(self) -> list[bool]:
        """Of each operand, whether what is computed from it now gets a gradient by it."""
        return [torch.is_grad_enabled() and t.requires_grad for t in self._operands()]

    def _count_writes(self) -> list[int]:
        """How often cost or features were written in place; they may share memory with the caller's tensors."""
        return [t._version for t in (self.problem.left, self.problem.right) if t is not None and not t.is_inference()]

    def _check_unchanged(self) -> None:
        if self._versions is not None and not torch.compiler.is_compiling() and self._count_writes() != self._versions:
            what = "the cost was" if self.problem.right is None else "x or y were"
            raise RuntimeError(f"{what} changed in place after the problem was solved; read out.plan before that")

    def _differentiable(self, constant: bool) -> list[Tensor]:
        """The operands. One that did not require a gradient when the problem was solved gets none here.

        Potentials have no graph to it, so its gradient would lack their part.
        """
        tracked = zip(self._operands(), self._tracks_gradients(), self._tracked, strict=True)
        return [t.detach() if constant or (now and not then) else t for t, now, then in tracked]

    def masses(self, constant: bool) -> tuple[Tensor, Tensor]:
        """The masses a and b."""
        *_, a, b = self._differentiable(constant)
        return a, b

    def plan(self, solution: Solution, constant: bool) -> Tensor:
        self._check_unchanged()
        f, g = solution.f, solution.g
        with no_autocast(f):
            *points, a, b = self._differentiable(constant)
            if constant:
                f, g = f.detach(), g.detach()
            points = [t.to(f.dtype) for t in points]
            cost = shifted(points[0], solution.shift) if len(points) == 1 else cosine_cost(points[0], points[1])
            plan = transport_plan(cost, a, b, f, g, self.problem.eps)
        return plan.reshape(*self.batch, *plan.shape[1:])
