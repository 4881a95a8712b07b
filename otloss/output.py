"""What a solve returns: :class:`SinkhornOutput`, and the problem behind it, from which the plan can be built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from otloss.arguments import Described
from otloss.assignment import log_plan
from otloss.backends.protocol import Problem, Solution, is_relaxed
from otloss.backends.reference import shifted, transport_plan, unshifted
from otloss.checks import no_autocast, wide
from otloss.cost import COSTS
from otloss.operators import converged
from otloss.partial import Slack, without_slack
from otloss.summary import Summary, summarise

__all__ = ["PlanSource", "SinkhornOutput"]

Result = TypeVar("Result")


class PlanParts(NamedTuple):
    """What a plan is made of, with one dimension for all problems. The cost is that after the shift, as f and g are."""

    cost: Tensor
    a: Tensor
    b: Tensor
    f: Tensor
    g: Tensor
    eps: float


class SinkhornOutput:
    """What :func:`sinkhorn` and :func:`feature_sinkhorn` return.

    Attributes:
        transport_cost: ``(B,)`` <T, C>, the sharp Sinkhorn loss.
        value: ``(B,)`` <T, C> + eps KL(T | ab'), and the penalties; with ``partial`` see :func:`sinkhorn`.
        f: ``(B, n)`` and ``g``: ``(B, m)`` potentials, T_ij = a_i b_j exp((f_i + g_j - C_ij)/eps). Without penalties a
            constant between them is free, and <a, f> = <b, g>. With ``partial`` T_ij is that divided by the total of a
            and b less what is sent.
        n_iter: ``(B,)`` iterations that each problem took: sweeps over its cost.
        marginal_error: ``(B,)`` L1 distance of both marginals of the plan from a and b; with penalties, from
            a exp(-f / rho_a) and b exp(-g / rho_b), as a share of the plan's mass.
        converged: ``(B,)`` whether that is below ``tol``, but for what the rounding of f and g does to the plan: at
            most ``4 u (<a, |f|> + <b, |g|>) / eps + 2 u (1 + log(n m))``, with u = 2^-24 (2^-53 in float64), for f and
            g of the cost without the minima of its rows and columns.
            With ``partial`` it is a share of the total of a and b less what is sent, and counts what is not sent.
        plan: ``(B, n, m)``, built on first use, from cost or features as they are then. That these were not changed in
            place is checked, except in a compiled function and of tensors of inference mode, which count no writes. Of
            features the cost is PyTorch's: see :func:`cosine_cost` and :func:`sqeuclidean_cost`.

    Each output that requires a gradient carries its own exact one; what the mode cannot differentiate does not require
    any, nor does anything of a problem that was solved under ``torch.no_grad``.
    """

    def __init__(self, source: PlanSource, solution: Solution, gradient: str, tol: float) -> None:
        self._source, self._gradient, self._tol = source, gradient, tol
        self._solution = solution
        self._made: dict[str, Any] = {}

    def _once(self, name: str, make: Callable[[], Result]) -> Result:
        """What ``make`` returns, made on first use.

        What was made under no_grad is not stored where the next use may need a graph.
        """
        if name in self._made:
            known: Result = self._made[name]
            return known
        made = make()
        if torch.is_grad_enabled() or not self._solution.transport_cost.requires_grad:
            self._made[name] = made
        return made

    def _of_batch(self, name: str, cost: bool = False) -> Tensor:
        """A field of the solution that has one number for each problem; ``cost`` says that it has the cost's unit."""
        field: Tensor = getattr(self._solution, name)
        source, batch = self._source, self._source.batch
        if cost and (source.unit is not None or source.slack is not None):
            return self._once(name, lambda: source.in_units(field).reshape(batch))
        return field if field.shape == batch else self._once(name, lambda: field.reshape(batch))

    @property
    def transport_cost(self) -> Tensor:
        """``(B,)`` <T, C>."""
        return self._of_batch("transport_cost", cost=True)

    @property
    def value(self) -> Tensor:
        """``(B,)`` <T, C> + eps KL(T | ab')."""
        return self._of_batch("value", cost=True)

    @property
    def n_iter(self) -> Tensor:
        """``(B,)`` iterations."""
        return self._of_batch("n_iter")

    @property
    def marginal_error(self) -> Tensor:
        """``(B,)`` L1 distance of the plan's marginals from a and b."""
        return self._of_batch("error")

    @property
    def f(self) -> Tensor:
        """Potentials ``(B, n)``."""
        return self._once("potentials", self._potentials)[0]

    @property
    def g(self) -> Tensor:
        """Potentials ``(B, m)``."""
        return self._once("potentials", self._potentials)[1]

    @property
    def converged(self) -> Tensor:
        """``(B,)`` whether each problem has converged."""
        return converged(self._source.problem, self._solution, self._tol).reshape(self._source.batch)

    def _potentials(self) -> tuple[Tensor, Tensor]:
        """f and g of the cost as it was given, with <a, f> = <b, g>."""
        f, g, source = self._solution.f, self._solution.g, self._source
        if self._solution.shift is not None:
            f, g = unshifted(self._solution, *source.masses(constant=not f.requires_grad))
        if source.slack is not None:
            f, g = without_slack(f, g, *source.masses(constant=not f.requires_grad))
        if source.unit is not None:
            f, g = f * source.unit.unsqueeze(-1), g * source.unit.unsqueeze(-1)
        f = f if source.mask_x is None else torch.where(source.mask_x, f, 0.0)
        g = g if source.mask_y is None else torch.where(source.mask_y, g, 0.0)
        return f.reshape(*source.batch, f.shape[-1]), g.reshape(*source.batch, g.shape[-1])

    @property
    def plan(self) -> Tensor:
        """The plan ``(B, n, m)``. Any function of it is differentiable in mode "implicit"."""
        return self._once("plan", self._plan)

    def _plan(self) -> Tensor:
        plan, total = self._matrix(transport_plan), self._total()
        return plan if total is None else plan[..., :-1, :-1] * total

    def _log_plan(self) -> Tensor:
        logs, total = self._matrix(log_plan), self._total()
        return logs if total is None else logs[..., :-1, :-1] + total.log()

    def _matrix(self, make: Callable[..., Tensor]) -> Tensor:
        """What ``make`` returns for the plan's parts, in the shape of the batch; with a slack, of the extension."""
        parts = self._parts()
        with no_autocast(parts.f):
            matrix = make(*parts)
        return matrix.reshape(*self._source.batch, *matrix.shape[1:])

    def _total(self) -> Tensor | None:
        """Of a partial problem the total of the masses of its extension, with the gradients that the plan has."""
        slack, batch = self._source.slack, self._source.batch
        if slack is None:
            return None
        return (slack.total if self._gradient == "implicit" else slack.total.detach()).reshape(*batch, 1, 1)

    def __repr__(self) -> str:
        done, total = int(self.converged.sum()), self.converged.numel()
        return f"SinkhornOutput(f={tuple(self.f.shape)}, g={tuple(self.g.shape)}, converged={done}/{total})"

    def _parts(self) -> PlanParts:
        """What the plan is made of, with the gradients that this mode gives."""
        return self._source.parts(self._solution, constant=self._gradient != "implicit")

    @property
    def log_plan(self) -> Tensor:
        """log T_ij = log a_i + log b_j + (f_i + g_j - C_ij)/eps ``(B, n, m)``; what holds of ``plan`` holds of it.

        It is finite wherever both points have mass, also where the plan underflows, and so is its gradient. It is -inf
        with gradient 0 where a point has none and where the cost is inf: select the pairs of a loss by an index or
        ``torch.where``, for 0 times -inf is NaN.

        Example:
            >>> import torch, otloss
            >>> out = otloss.sinkhorn(torch.tensor([[0.0, 9.0], [9.0, 0.0]]), eps=0.05)
            >>> out.plan[0, 1].item(), round(out.log_plan[0, 1].item(), 1)
            (0.0, -180.7)
        """
        return self._once("log_plan", self._log_plan)

    def _mass_bias(self) -> Tensor:
        """eps (m_a - m_b)^2 ``(B,)`` of the totals of the masses, for the divergence; 0 without penalties."""
        source = self._source
        a, b = source.masses(constant=False)
        if not is_relaxed(source.problem):
            return torch.zeros_like(self.value)
        bias = source.problem.eps * (a.sum(-1) - b.sum(-1)).square()
        return (bias if source.unit is None else bias * source.unit).reshape(source.batch)

    def _exact_value(self) -> Tensor:
        """The value ``(B,)`` for the divergence, in which the errors of three values must not look like a distance.

        That of a plan whose marginals are off by e is off by e times the potentials. The dual <a, f> + <b, g> of
        potentials with exact columns is below the optimum by a multiple of e^2, so it gives the number. Under penalties
        on both sides the plan's value is above the optimum by such a multiple itself. The gradient is the value's.
        """
        value, source = self.value, self._source
        if self._gradient == "unroll" or is_relaxed(source.problem):
            return value
        f, g, (a, b) = self.f.detach(), self.g.detach(), source.masses(constant=True)
        dual = (wide(a).reshape(f.shape) * wide(f)).sum(-1) + (wide(b).reshape(g.shape) * wide(g)).sum(-1)
        return value + (dual - value.detach()).to(value.dtype)

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
    """A problem that was solved, from which the plan can be built, and how it was described."""

    def __init__(self, problem: Problem, described: Described, slack: Slack | None) -> None:
        self.problem, self.batch, self.unit = problem, described.batch, described.unit
        self.mask_x, self.mask_y, self.slack = described.mask_x, described.mask_y, slack
        self._versions = None if torch.compiler.is_compiling() else self._count_writes()
        self._tracked = self._tracks_gradients()

    def __getstate__(self) -> dict[str, Any]:
        self._check_unchanged()
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A copy's potentials have no graph, so that its masses must not have one, nor cost or features.
        self.problem = self.problem.with_masses(*self.masses(constant=True))
        self.unit = None if self.unit is None else self.unit.detach()
        self.slack = None if self.slack is None else Slack(*(t.detach() for t in self.slack))
        self._versions = self._count_writes()  # a copy's tensors count from 0 again
        self._tracked = [False] * len(self._tracked)

    def _points(self) -> list[Tensor]:
        """The cost or the features."""
        return [t for t in (self.problem.left, self.problem.right) if t is not None]

    def _tracks_gradients(self) -> list[bool]:
        """Of cost or features, whether what is computed from them now gets a gradient by them."""
        return [torch.is_grad_enabled() and t.requires_grad for t in self._points()]

    def _count_writes(self) -> list[int]:
        """How often cost or features were written in place; they may share memory with the caller's tensors."""
        return [t._version for t in self._points() if not t.is_inference()]

    def _check_unchanged(self) -> None:
        if self._versions is not None and not torch.compiler.is_compiling() and self._count_writes() != self._versions:
            what = "the cost was" if self.problem.right is None else "x or y were"
            raise RuntimeError(f"{what} changed in place after the problem was solved; read out.plan before that")

    def _differentiable(self, constant: bool) -> list[Tensor]:
        """Cost or features, and the masses. What did not require a gradient when the problem was solved gets none here.

        Potentials have no graph to it, so its gradient would lack their part.
        """
        tracked = zip(self._points(), self._tracks_gradients(), self._tracked, strict=True)
        points = [t.detach() if constant or (now and not then) else t for t, now, then in tracked]
        return [*points, *self.masses(constant)]

    def in_units(self, cost: Tensor) -> Tensor:
        """What the transport of the masses as they were given costs ``(B,)``, from what it costs the solver."""
        if self.slack is not None:
            price = self.slack.price if cost.requires_grad else self.slack.price.detach()
            cost = cost * self.slack.total - price * self.slack.rest
        return cost if self.unit is None else cost * self.unit

    def masses(self, constant: bool) -> tuple[Tensor, Tensor]:
        """The masses a and b of total 1, which ``solve`` has returned together with the potentials."""
        a, b = self.problem.a, self.problem.b
        return (a.detach(), b.detach()) if constant else (a, b)

    def parts(self, solution: Solution, constant: bool) -> PlanParts:
        """What the plan of this solution is made of; with ``constant`` nothing has a gradient."""
        self._check_unchanged()
        f, g = (solution.f.detach(), solution.g.detach()) if constant else (solution.f, solution.g)
        with no_autocast(f):
            *points, a, b = self._differentiable(constant)
            points = [t.to(f.dtype) for t in points]
            make = COSTS[self.problem.kind]
            cost = shifted(points[0], solution.shift) if len(points) == 1 else make(points[0], points[1])
        return PlanParts(cost, a, b, f, g, self.problem.eps)
