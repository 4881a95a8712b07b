"""Penalties on the marginals, what of them is vectors: ``relaxed.py`` has the equations and the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from otloss.backends.massless import known, live
from otloss.backends.protocol import Gradients, Solution, Upstream
from otloss.backends.relaxed import Penalty
from otloss.backends.triton.gradient import Side, by_cost, multipliers
from otloss.backends.triton.launch import DeviceProblem
from otloss.checks import wide


def both(problem: DeviceProblem) -> tuple[Penalty, Penalty]:
    """The penalties of a problem that has some."""
    assert problem.penalties is not None
    return problem.penalties


def asked(problem: DeviceProblem, f: Tensor, g: Tensor) -> tuple[DeviceProblem, Tensor, Tensor]:
    """The problem with constraints that has the same plan, and its potentials F and G.

    Its masses are the marginals that f and g ask for, 0 where they do not count.
    """
    of_a, of_b = both(problem)
    a, b = _asked(problem.a, f, of_a), _asked(problem.b, g, of_b)
    return problem.with_masses(a, b), f * of_a.stiffness, g * of_b.stiffness


def _asked(mass: Tensor, potential: Tensor, penalty: Penalty) -> Tensor:
    wanted = torch.where(live(mass), mass * penalty.share(potential), 0.0)
    return torch.where(live(wanted), wanted, 0.0)


def finish(problem: DeviceProblem, f: Tensor, g: Tensor, n_iter: Tensor) -> Solution:
    """Potentials where there is no mass, cost, value and error."""
    of_a, of_b = both(problem)
    f = torch.where(live(problem.a), f, of_a.damping * problem.potential(problem.rows, g, problem.b))
    g = torch.where(live(problem.b), g, of_b.damping * problem.potential(problem.columns, f, problem.a))
    hard, whole_f, whole_g = asked(problem, f, g)
    by_row, by_cost = problem.sums(problem.rows, whole_f, whole_g, hard.b, hard.b)
    (by_column,) = problem.sums(problem.columns, whole_g, whole_f, hard.a)
    row, column = hard.a * by_row, hard.b * by_column  # the marginals of the plan
    total = row.sum(-1)
    error = (row - hard.a).abs().sum(-1) + (column - hard.b).abs().sum(-1)
    cost = known(hard.a * by_cost, live(hard.a)).sum(-1)
    value = _part(of_a, problem.a, hard.a, f, by_row) + _part(of_b, problem.b, hard.b, g, by_column)
    value = value - problem.eps * (total - problem.a.sum(-1) * problem.b.sum(-1))
    return Solution(f, g, cost, value, n_iter, error / torch.where(live(total), total, 1.0))


def _part(penalty: Penalty, mass: Tensor, wanted: Tensor, potential: Tensor, ratio: Tensor) -> Tensor:
    """<T1, f> + rho KL(T1 | a), whose marginal is ``ratio`` times the one asked for, see ``relaxed.marginal_value``."""
    if penalty.rho is None:
        return known(wanted * ratio * potential, live(mass)).sum(-1)
    lost = torch.where(live(mass), mass * penalty.slope(potential), 0.0).sum(-1)
    exact = Penalty(wide(penalty.rho), penalty.eps)
    return lost + exact.divergence(wide(wanted) * wide(ratio), wide(wanted)).to(lost.dtype)


def implicit_gradient(
    problem: DeviceProblem,
    f: Tensor,
    g: Tensor,
    upstream: Upstream,
    use_adjoint: bool,
    need_cost: bool,
) -> tuple[Gradients, Tensor]:
    """Gradients of left, right, a, b and both penalties, and the relative residual of the adjoint system.

    They are those of ``otloss/backends/relaxed.py``. The multipliers and the gradient of the cost come from the problem
    with constraints. It reduces the cost by F and G, and C - f - g = (C - F - G) + s_a f + s_b g. The last two terms
    act like p and q there: p / m_a - w a~ f / rho_a stands for p, with a~ the marginal that f asks for; likewise q.
    """
    of_a, of_b = both(problem)
    w, w_value = problem.scalars(upstream.cost), problem.scalars(upstream.value)
    f, g = f.contiguous(), g.contiguous()
    hard, whole_f, whole_g = asked(problem, f, g)
    share_a, share_b = of_a.share(f), of_b.share(g)
    direct, total_a, total_b = w_value.unsqueeze(-1), problem.a.sum(-1, True), problem.b.sum(-1, True)
    by_a = direct * (of_a.slope(f) - problem.eps * (share_a - total_b))
    by_b = direct * (of_b.slope(g) - problem.eps * (share_b - total_a))
    by_rho = [w_value * _by_rho(of_a, problem.a, hard.a), w_value * _by_rho(of_b, problem.b, hard.b)]
    row: Side = (whole_f, hard.a, None, None)
    column: Side = (whole_g, hard.b, None, None)
    residual = problem.zeros(problem.count)
    if use_adjoint:
        sharp = w.unsqueeze(-1)
        p = torch.zeros_like(f) if upstream.f is None else upstream.f / of_a.stiffness
        q = torch.zeros_like(g) if upstream.g is None else upstream.g / of_b.stiffness
        pull_f, pull_g = p - sharp * of_a.inverse * (hard.a * f), q - sharp * of_b.inverse * (hard.b * g)
        u, v, by_p, by_q, residual, constant = multipliers(hard, whole_f, whole_g, w, pull_f, pull_g, with_g=True)
        assert constant is not None
        row, column = (whole_f, hard.a, u, by_p), (whole_g, hard.b, v, by_q)
        of_f, of_g = u - constant + sharp * f, v + constant + sharp * g
        by_a = by_a + share_a * of_a.stiffness * of_f
        by_b = by_b + share_b * of_b.stiffness * of_g
        by_rho[0] = by_rho[0] + ((hard.a * of_f + problem.eps * p) * f * of_a.inverse**2).sum(-1)
        by_rho[1] = by_rho[1] + ((hard.b * of_g + problem.eps * q) * g * of_b.inverse**2).sum(-1)
    left, right = problem.empty(0), problem.empty(0)
    if need_cost:
        left, right = by_cost(hard, row, column, w, w_value, None)
    return Gradients(left, right, by_a, by_b, torch.stack(by_rho, -1)), residual


def _by_rho(penalty: Penalty, mass: Tensor, wanted: Tensor) -> Tensor:
    """The derivative of the value by rho, KL(T1 | a), at the solution; 0 for a constraint."""
    if penalty.rho is None:
        return mass.new_zeros(len(mass))
    return penalty.by_rho(wide(wanted), wide(mass)).to(mass.dtype)
