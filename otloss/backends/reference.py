r"""The reference backend: plain PyTorch, log-domain, one dense cost. The definition of correct.

With :math:`T_{ij} = a_i b_j k_{ij}`, :math:`k_{ij} = \exp((f_i + g_j - C_{ij})/\varepsilon)`, one iteration is

.. math:: f_i = -\varepsilon \log \sum_j b_j e^{(g_j - C_{ij})/\varepsilon}, \qquad
          g_j = -\varepsilon \log \sum_i a_i e^{(f_i - C_{ij})/\varepsilon}, \qquad f = g = 0 \text{ at the start.}

Rows and columns without mass take no part; their potentials follow from the final ones. A cost of +inf forbids a pair:
there :math:`k_{ij} = 0`. A point without mass that is forbidden to every point with mass has the potential 0 before the
gauge. Everything here is made of differentiable PyTorch operations, so the gradients of this module can be
differentiated again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from otloss.backends import quasi_newton, relaxed
from otloss.backends.adjoint import solve_adjoint
from otloss.backends.masses import by_given as by_given
from otloss.backends.masses import normalise as normalise
from otloss.backends.masses import worst_error as worst_error
from otloss.backends.massless import live, log_mass, or_one, tangent_of_no_mass, unrolled_by_mass
from otloss.backends.protocol import COLD, Gradients, Problem, Shift, Solution, Start, Upstream, is_relaxed
from otloss.backends.relaxed import penalties
from otloss.backends.start import better_start
from otloss.backends.steps import Opened, bounded_exp, log_sum, opened, without_forbidden
from otloss.checks import wide
from otloss.cost import COSTS, centred, live_rows, row_norms, unit_rows

TWICE_DIFFERENTIABLE = True
RELAXES = True
KEEPS_COST = False
KINDS: tuple[str, ...] = ("cosine", "sqeuclidean", "dot")
READS_HALF = False


def status() -> str | None:
    """Always usable."""
    return None


def _exponent(cost: Tensor, f: Tensor, g: Tensor, eps: float) -> Tensor:
    return ((f.unsqueeze(-1) + g.unsqueeze(-2)) - cost) / eps


def kernel(cost: Tensor, f: Tensor, g: Tensor, eps: float) -> Tensor:
    """k_ij = T_ij / (a_i b_j)."""
    return bounded_exp(_exponent(cost, f, g, eps))


def _normalised_kernel(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float) -> Tensor:
    """k_ij, scaled where a row or column has no mass, so that the sum with the others' masses is 1.

    By the definition of its potential, the sum of such a row or column is 1. Costs of points without mass may be huge;
    then rounding of the potential changes the sum by any factor, which this takes back.
    """
    exponent = _exponent(cost, f, g, eps)
    rows = log_sum(exponent + log_mass(b).unsqueeze(-2), -1)
    columns = log_sum(exponent + log_mass(a).unsqueeze(-1), -2)
    exponent = exponent - torch.where(live(a), 0.0, rows).unsqueeze(-1)
    return bounded_exp(exponent - torch.where(live(b), 0.0, columns).unsqueeze(-2))


def transport_plan(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float) -> Tensor:
    """T_ij = a_i b_j k_ij."""
    return a.unsqueeze(-1) * kernel(cost, f, g, eps) * b.unsqueeze(-2)


def dense_cost(left: Tensor, right: Tensor | None, kind: str = "cosine") -> Tensor:
    """The cost itself, or the cost of this kind between two feature sets."""
    if right is None:
        return left
    if kind == "cosine":
        return 1 - unit_rows(left) @ unit_rows(right).transpose(-1, -2)
    return COSTS[kind](left, right)


def _row_error(a: Tensor, f: Tensor, f_next: Tensor, eps: float) -> Tensor:
    """L1 error of the row marginals; the next f-step knows the row sums: T1 = a exp((f - f_next)/eps)."""
    drift = torch.where(live(a), (f - f_next) / eps, 0.0)
    return (a * (drift.exp() - 1).abs()).sum(dim=-1)


def _minima(cost: Tensor, a: Tensor, b: Tensor) -> Shift:
    """The minima of the rows of a cost, then those of the columns of what is left, over points with mass.

    The minimum is 0 where every one of these is forbidden.
    """
    rows = without_forbidden(cost.masked_fill(~live(b).unsqueeze(-2), torch.inf).amin(-1))
    left = cost - rows.unsqueeze(-1)
    return Shift(rows, without_forbidden(left.masked_fill(~live(a).unsqueeze(-1), torch.inf).amin(-2)))


def shifted(cost: Tensor, shift: Shift | None) -> Tensor:
    """What is left of a cost after a shift, rounded once: what the first difference loses is put back (TwoSum).

    A forbidden pair stays forbidden.
    """
    if shift is None:
        return cost
    rows, columns = shift.rows.unsqueeze(-1), shift.columns.unsqueeze(-2)
    left = cost - rows
    back = left - cost
    return torch.where(cost == torch.inf, torch.inf, (left - columns) + ((cost - (left - back)) - (rows + back)))


def unshifted(solution: Solution, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """f and g of the cost as it was given, with <a, f> = <b, g>."""
    f, g, shift = solution.f, solution.g, solution.shift
    if shift is None:
        return f, g
    constant = ((b * shift.columns).sum(-1, keepdim=True) - (a * shift.rows).sum(-1, keepdim=True)) / 2
    return f + (shift.rows + constant), g + (shift.columns - constant)


def _iterate(steps: Opened, g: Tensor, max_iter: int, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """f, g and the number of plain iterations of each problem, from this g."""
    f = torch.zeros_like(steps.a)
    n_iter = torch.zeros(len(f), dtype=torch.int64, device=f.device)
    running = torch.ones_like(n_iter, dtype=torch.bool)
    for iteration in range(max_iter):
        f_next = steps.f_step(g)
        if iteration > 0:
            running = running & ~(_row_error(steps.a, f, f_next, steps.eps) < tol)
            if not running.any():
                break
        f = torch.where(running.unsqueeze(-1), f_next, f)
        g = torch.where(running.unsqueeze(-1), steps.g_step(f), g)
        n_iter = n_iter + running
    return f, g, n_iter


def solve(
    problem: Problem,
    max_iter: int,
    tol: float,
    kept: Tensor | None = None,
    accelerate: bool = False,
    start: Start = COLD,
) -> Solution:
    """The solution of each problem, with potentials in the gauge <a, f> = <b, g>; ``kept`` is not used."""
    if is_relaxed(problem):
        return _solve_relaxed(problem, max_iter, tol, start.g)
    a, b, eps = problem.a, problem.b, problem.eps
    cost = dense_cost(problem.left, problem.right, problem.kind)
    minima = _minima(cost, a, b)
    shift = minima if problem.right is None else None
    cost = shifted(cost, shift)
    steps = opened(cost, a, b, eps)
    g = torch.zeros_like(b) if shift is None else -shift.columns  # potentials 0 of the cost given
    if accelerate:
        g = quasi_newton.start(g, torch.where(live(b), minima.columns, 0.0), eps)
    given = start.g if start.g is None or shift is None else start.g - shift.columns
    g = better_start(given, g, problem, steps.f_step)
    same = quasi_newton.is_symmetric(problem) if accelerate else a.new_zeros(len(a), 1, dtype=torch.bool)
    if accelerate:
        apart = torch.zeros_like(b) if shift is None or a.shape != b.shape else shift.columns - shift.rows
        f, g, n_iter = quasi_newton.Courses(steps, g, max_iter, tol, same, apart).run()
    else:
        f, g, n_iter = _iterate(steps, g, max_iter, tol)
    if same.any():  # f = g of the cost as it was given; to first order the error is the same, half on either side
        half = (f - apart + g) / 2
        f, g = torch.where(same, half + apart, f), torch.where(same, half, g)
    f = torch.where(live(a), f, steps.f_step(g)).masked_fill(steps.lost_a, 0.0)
    g = torch.where(live(b), g, steps.g_step(f)).masked_fill(steps.lost_b, 0.0)
    constant = ((b * g).sum(-1) - (a * f).sum(-1)).unsqueeze(-1) / 2
    f, g = f + constant, g - constant
    plan = transport_plan(cost, a, b, f, g, eps)
    rows, columns = plan.sum(-1), plan.sum(-2)
    error = (rows - a).abs().sum(-1) + (columns - b).abs().sum(-1)
    transport_cost = (plan * without_forbidden(cost)).sum((-1, -2))
    value = (rows * f).sum(-1) + (columns * g).sum(-1) - eps * (plan.sum((-1, -2)) - 1)
    if shift is not None:
        taken = (rows * shift.rows).sum(-1) + (columns * shift.columns).sum(-1)
        transport_cost, value = transport_cost + taken, value + taken
    return Solution(f, g, transport_cost, value, n_iter, error, shift)


def _solve_relaxed(problem: Problem, max_iter: int, tol: float, start: Tensor | None) -> Solution:
    """The solution under penalties; its potentials have no gauge, and nothing is taken out of the cost."""
    right, a, b, eps = problem.right, problem.a, problem.b, problem.eps
    cost = dense_cost(problem.left, right, problem.kind)
    (of_a, of_b), steps = penalties(problem), opened(cost, a, b, eps)
    g = better_start(start, torch.zeros_like(b), problem, steps.f_step)
    f, g, n_iter = relaxed.iterate(steps, g, of_a, of_b, max_iter, tol)
    f = torch.where(live(a), f, of_a.damping * steps.f_step(g)).masked_fill(steps.lost_a, 0.0)
    g = torch.where(live(b), g, of_b.damping * steps.g_step(f)).masked_fill(steps.lost_b, 0.0)
    plan = transport_plan(cost, a, b, f, g, eps)
    rows, columns, total = plan.sum(-1), plan.sum(-2), plan.sum((-1, -2))
    error = (rows - a * of_a.share(f)).abs().sum(-1) + (columns - b * of_b.share(g)).abs().sum(-1)
    whole = (rows * f).sum(-1) + (columns * g).sum(-1) - eps * (total - a.sum(-1) * b.sum(-1))
    value = whole + of_a.divergence(rows, a) + of_b.divergence(columns, b)
    shift = None if right is not None else Shift(torch.zeros_like(a), torch.zeros_like(b))
    transport_cost = (plan * without_forbidden(cost)).sum((-1, -2))
    return Solution(f, g, transport_cost, value, n_iter, error / or_one(total), shift)


def _column(weight: Tensor | None, like: Tensor) -> Tensor:
    """A weight per problem, shaped to scale a matrix; None is zero."""
    return torch.zeros_like(like[..., 0, 0])[..., None, None] if weight is None else weight[..., None, None]


def _pull_back(grad_cost: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """From the gradient of the cost to that of the cost itself or of the two feature sets."""
    left, right = problem.left, problem.right
    if right is None:
        return grad_cost, grad_cost.new_empty(0)
    if problem.kind == "cosine":
        x, y = unit_rows(left), unit_rows(right)
        by_x, by_y = -grad_cost @ y, -grad_cost.transpose(-1, -2) @ x
        return _through_unit_rows(left, x, by_x), _through_unit_rows(right, y, by_y)
    grad, x, y = wide(grad_cost), wide(left), wide(right)
    if problem.kind == "dot":
        by_x, by_y = -grad @ y, -grad.transpose(-1, -2) @ x
    else:
        x, y = centred(x, y)
        by_x = 2 * (grad.sum(-1).unsqueeze(-1) * x - grad @ y)
        by_y = 2 * (grad.sum(-2).unsqueeze(-1) * y - grad.transpose(-1, -2) @ x)
    return by_x.to(left.dtype), by_y.to(right.dtype)


def _through_unit_rows(x: Tensor, unit: Tensor, grad: Tensor) -> Tensor:
    tangent = grad - unit * (unit * grad).sum(-1, keepdim=True)
    return torch.where(live_rows(x), tangent / row_norms(x), 0.0)


def implicit_gradient(
    problem: Problem,
    f: Tensor,
    g: Tensor,
    upstream: Upstream,
    adjoint: bool,
    need_cost: bool,
    kept: Tensor | None = None,
    shift: Shift | None = None,
) -> tuple[Gradients, Tensor]:
    """Gradients and the adjoint's relative residual; see ``otloss/gradients.py``. ``kept`` is not used."""
    a, b, eps = problem.a, problem.b, problem.eps
    made = dense_cost(problem.left, problem.right, problem.kind)
    if is_relaxed(problem):
        by, residual = relaxed.gradients(made, opened(made, a, b, eps), f, g, *penalties(problem), upstream, adjoint)
        x, y = _pull_back(by.cost, problem) if need_cost else (a.new_empty(0), a.new_empty(0))
        return Gradients(x, y, by.a, by.b, by.rho), residual
    cost = shifted(made, shift)
    k = _normalised_kernel(cost, a, b, f, g, eps)
    plan = a.unsqueeze(-1) * k * b.unsqueeze(-2)
    w, w_value = _column(upstream.cost, cost), _column(upstream.value, cost)
    grad = (w + w_value) * plan
    whole_f, whole_g = (f, g) if shift is None else (f + shift.rows, g + shift.columns)
    grad_a, grad_b = w_value[..., 0] * whole_f, w_value[..., 0] * whole_g
    residual = torch.zeros_like(cost[..., 0, 0])
    if adjoint:
        p = torch.zeros_like(f) if upstream.f is None else upstream.f
        q = torch.zeros_like(g) if upstream.g is None else upstream.g
        rows = or_one((k * b.unsqueeze(-2)).sum(-1))
        columns = or_one((k * a.unsqueeze(-1)).sum(-2))
        reduced = w * torch.where(k > 0, cost - f.unsqueeze(-1) - g.unsqueeze(-2), 0.0)  # not 0 * inf
        from_q = eps * (k * q.unsqueeze(-2)).sum(-1)
        from_p = eps * (k * p.unsqueeze(-1)).sum(-2)
        r = (reduced * plan).sum(-1) - a * from_q
        s = (reduced * plan).sum(-2) - b * from_p
        v, residual = solve_adjoint(plan, r, s)
        # u by the row-normalised kernel: finite and right where a row has no mass; then v likewise.
        u = ((k * b.unsqueeze(-2) * (reduced - v.unsqueeze(-2))).sum(-1) - from_q) / rows
        v_dead = ((k * a.unsqueeze(-1) * (reduced - u.unsqueeze(-1))).sum(-2) - from_p) / columns
        v = torch.where(live(b), v, v_dead)
        grad = grad + plan * (u.unsqueeze(-1) + v.unsqueeze(-2) - reduced) / eps
        grad = grad + k * (b.unsqueeze(-2) * (p / rows).unsqueeze(-1) + a.unsqueeze(-1) * (q / columns).unsqueeze(-2))
        grad_a, grad_b = grad_a + u + w[..., 0] * whole_f, grad_b + v + w[..., 0] * whole_g
    grad_left, grad_right = _pull_back(grad, problem) if need_cost else (cost.new_empty(0), cost.new_empty(0))
    return Gradients(grad_left, grad_right, grad_a, grad_b), residual


def unrolled_gradient(
    problem: Problem, n_iter: Tensor, upstream: Upstream, need_cost: bool, max_iter: int
) -> Gradients:
    """Exact gradient of the iterations that were run: the potentials of each are kept, the kernels made again."""
    a, b, eps = problem.a, problem.b, problem.eps
    cost = dense_cost(problem.left, problem.right, problem.kind)
    steps = opened(cost, a, b, eps)
    twice = torch.is_grad_enabled()  # then a mass of 0 needs a derivative, which its logarithm does not have
    of_a, of_b = tangent_of_no_mass(a).unsqueeze(-1), tangent_of_no_mass(b).unsqueeze(-2)
    history = [(torch.zeros_like(a), torch.zeros_like(b))]
    for iteration in range(max_iter):
        running = (iteration < n_iter).unsqueeze(-1)
        f, g = history[-1]
        f_next = steps.f_step(g)
        if twice:
            f_next = f_next - eps * (kernel(cost, f_next, g, eps) * of_b).sum(-1)
        f = torch.where(running, f_next, f)
        g_next = steps.g_step(f)
        if twice:
            g_next = g_next - eps * (kernel(cost, f, g_next, eps) * of_a).sum(-2)
        history.append((f, torch.where(running, g_next, g)))

    # Points without mass take the potentials of the last iteration too: that is the limit of a vanishing mass.
    f_last, g_last = history[-1]
    w, w_value = _column(upstream.cost, cost), _column(upstream.value, cost)
    k = kernel(cost, f_last, g_last, eps)
    plan = a.unsqueeze(-1) * k * b.unsqueeze(-2)
    outer = w * without_forbidden(cost) + w_value * (f_last.unsqueeze(-1) + g_last.unsqueeze(-2))
    both = live(a).unsqueeze(-1) & live(b).unsqueeze(-2)
    outer = torch.where((k > 0) & (both | outer.isfinite()), outer, 0.0)  # not 0 * inf
    by_b, by_a, lift = k * b.unsqueeze(-2), k * a.unsqueeze(-1), outer * plan / eps
    grad = (w + w_value) * plan - lift
    grad_a = (outer * by_b).sum(-1) - eps * w_value[..., 0] * (by_b.sum(-1) - 1)
    grad_b = (outer * by_a).sum(-2) - eps * w_value[..., 0] * (by_a.sum(-2) - 1)
    grad_f, grad_g = lift.sum(-1), lift.sum(-2)
    for iteration in range(len(history) - 1, 0, -1):
        running = (iteration <= n_iter)[:, None, None]
        (f, g), g_before = history[iteration], history[iteration - 1][1]
        # The masses come before the multipliers: where there is none, k times these may overflow, which would reach C.
        k = torch.where(running, kernel(cost, f, g, eps), 0.0)
        step = (a.unsqueeze(-1) * k) * grad_g.unsqueeze(-2)
        grad, grad_f = grad + step, grad_f - step.sum(-1)
        grad_a = grad_a - eps * (k * grad_g.unsqueeze(-2)).sum(-1)
        k = torch.where(running, kernel(cost, f, g_before, eps), 0.0)
        step = (b.unsqueeze(-2) * k) * grad_f.unsqueeze(-1)
        grad = grad + step
        grad_b = grad_b - eps * (k * grad_f.unsqueeze(-1)).sum(-2)
        grad_g = torch.where(running[..., 0], -step.sum(-2), grad_g)
        grad_f = torch.where(running[..., 0], 0.0, grad_f)
    grad_a, grad_b = unrolled_by_mass(grad_a, a, f_last, eps), unrolled_by_mass(grad_b, b, g_last, eps)
    grad_left, grad_right = _pull_back(grad, problem) if need_cost else (cost.new_empty(0), cost.new_empty(0))
    return Gradients(grad_left, grad_right, grad_a, grad_b)
