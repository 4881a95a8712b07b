r"""The reference backend: plain PyTorch, log-domain, one dense cost. The definition of correct.

With :math:`T_{ij} = a_i b_j k_{ij}`, :math:`k_{ij} = \exp((f_i + g_j - C_{ij})/\varepsilon)`, one iteration is

.. math:: f_i = -\varepsilon \log \sum_j b_j e^{(g_j - C_{ij})/\varepsilon}, \qquad
          g_j = -\varepsilon \log \sum_i a_i e^{(f_i - C_{ij})/\varepsilon}, \qquad f = g = 0 \text{ at the start.}

Rows and columns without mass take no part; their potentials follow from the final ones. Everything here is made of
differentiable PyTorch operations, so the gradients of this module can be differentiated again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from otloss.backends import quasi_newton, relaxed
from otloss.backends.masses import by_given as by_given
from otloss.backends.masses import normalise as normalise
from otloss.backends.masses import worst_error as worst_error
from otloss.backends.protocol import COLD, Gradients, Problem, Shift, Solution, Start, Upstream, is_relaxed
from otloss.backends.relaxed import penalties
from otloss.backends.start import better_start
from otloss.backends.steps import bounded_exp, f_step, g_step
from otloss.checks import wide
from otloss.cost import live_rows, negligible, row_norms, unit_rows

TWICE_DIFFERENTIABLE = True
RELAXES = True
KEEPS_COST = False
READS_HALF = False


def status() -> str | None:
    """Always usable."""
    return None


def live(mass: Tensor) -> Tensor:
    """Which points have mass."""
    return mass > negligible(mass.dtype)


def known(x: Tensor, live: Tensor) -> Tensor:
    """``x``, but 0 where a point without mass has lost it: its potential is of the size of its costs, however large."""
    return torch.where(live | x.isfinite(), x, 0.0)


def unrolled_by_mass(grad: Tensor, mass: Tensor, potential: Tensor, eps: float) -> Tensor:
    """An unrolled gradient by the masses, 0 where a point without mass has lost it.

    Rounding of its potential, which is of the size of its costs, may move the exponents by 1/256 or more there.
    """
    exact = potential.abs() < eps / (128 * torch.finfo(potential.dtype).eps)
    return torch.where(live(mass) | (exact & grad.isfinite()), grad, 0.0)


def log_mass(mass: Tensor) -> Tensor:
    """log(mass), -inf where there is none."""
    alive = live(mass)
    return torch.where(alive, torch.where(alive, mass, 1.0).log(), -torch.inf)


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
    rows = torch.logsumexp(exponent + log_mass(b).unsqueeze(-2), -1)
    columns = torch.logsumexp(exponent + log_mass(a).unsqueeze(-1), -2)
    exponent = exponent - torch.where(live(a), 0.0, rows).unsqueeze(-1)
    return bounded_exp(exponent - torch.where(live(b), 0.0, columns).unsqueeze(-2))


def transport_plan(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float) -> Tensor:
    """T_ij = a_i b_j k_ij."""
    return a.unsqueeze(-1) * kernel(cost, f, g, eps) * b.unsqueeze(-2)


def dense_cost(left: Tensor, right: Tensor | None) -> Tensor:
    """The cost itself, or the cosine cost of two feature sets."""
    return left if right is None else 1 - unit_rows(left) @ unit_rows(right).transpose(-1, -2)


def _row_error(a: Tensor, f: Tensor, f_next: Tensor, eps: float) -> Tensor:
    """L1 error of the row marginals; the next f-step knows the row sums: T1 = a exp((f - f_next)/eps)."""
    drift = torch.where(live(a), (f - f_next) / eps, 0.0)
    return (a * (drift.exp() - 1).abs()).sum(dim=-1)


def _minima(cost: Tensor, a: Tensor, b: Tensor) -> Shift:
    """The minima of the rows of a cost, then those of the columns of what is left, over points with mass."""
    rows = cost.masked_fill(~live(b).unsqueeze(-2), torch.inf).amin(-1)
    left = cost - rows.unsqueeze(-1)
    return Shift(rows, left.masked_fill(~live(a).unsqueeze(-1), torch.inf).amin(-2))


def shifted(cost: Tensor, shift: Shift | None) -> Tensor:
    """What is left of a cost after a shift, rounded once: what the first difference loses is put back (TwoSum)."""
    if shift is None:
        return cost
    rows, columns = shift.rows.unsqueeze(-1), shift.columns.unsqueeze(-2)
    left = cost - rows
    back = left - cost
    return (left - columns) + ((cost - (left - back)) - (rows + back))


def unshifted(solution: Solution, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """f and g of the cost as it was given, with <a, f> = <b, g>."""
    f, g, shift = solution.f, solution.g, solution.shift
    if shift is None:
        return f, g
    constant = ((b * shift.columns).sum(-1, keepdim=True) - (a * shift.rows).sum(-1, keepdim=True)) / 2
    return f + (shift.rows + constant), g + (shift.columns - constant)


def _iterate(
    cost: Tensor, a: Tensor, log_a: Tensor, log_b: Tensor, g: Tensor, eps: float, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """f, g and the number of plain iterations of each problem, from this g."""
    f = torch.zeros_like(a)
    n_iter = torch.zeros(cost.shape[0], dtype=torch.int64, device=cost.device)
    running = torch.ones_like(n_iter, dtype=torch.bool)
    for iteration in range(max_iter):
        f_next = f_step(cost, log_b, g, eps)
        if iteration > 0:
            running = running & ~(_row_error(a, f, f_next, eps) < tol)
            if not running.any():
                break
        f = torch.where(running.unsqueeze(-1), f_next, f)
        g = torch.where(running.unsqueeze(-1), g_step(cost, log_a, f, eps), g)
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
    left, right, a, b, eps = problem.left, problem.right, problem.a, problem.b, problem.eps
    cost = dense_cost(left, right)
    log_a, log_b = log_mass(a), log_mass(b)
    minima = _minima(cost, a, b)
    shift = minima if right is None else None
    cost = shifted(cost, shift)
    g = torch.zeros_like(b) if shift is None else -shift.columns  # potentials 0 of the cost given
    if accelerate:
        g = quasi_newton.start(g, torch.where(live(b), minima.columns, 0.0), eps)
    given = start.g if start.g is None or shift is None else start.g - shift.columns
    g = better_start(given, g, problem, lambda g: f_step(cost, log_b, g, eps))
    same = quasi_newton.is_symmetric(problem) if accelerate else a.new_zeros(len(a), 1, dtype=torch.bool)
    if accelerate:
        apart = torch.zeros_like(b) if shift is None or a.shape != b.shape else shift.columns - shift.rows
        f, g, n_iter = quasi_newton.solve(cost, a, b, log_a, log_b, g, eps, max_iter, tol, same, apart)
    else:
        f, g, n_iter = _iterate(cost, a, log_a, log_b, g, eps, max_iter, tol)
    if same.any():  # f = g of the cost as it was given; to first order the error is the same, half on either side
        half = (f - apart + g) / 2
        f, g = torch.where(same, half + apart, f), torch.where(same, half, g)
    f = torch.where(live(a), f, f_step(cost, log_b, g, eps))
    g = torch.where(live(b), g, g_step(cost, log_a, f, eps))
    constant = ((b * g).sum(-1) - (a * f).sum(-1)).unsqueeze(-1) / 2
    f, g = f + constant, g - constant
    plan = transport_plan(cost, a, b, f, g, eps)
    rows, columns = plan.sum(-1), plan.sum(-2)
    error = (rows - a).abs().sum(-1) + (columns - b).abs().sum(-1)
    transport_cost = (plan * cost).sum((-1, -2))
    value = (rows * f).sum(-1) + (columns * g).sum(-1) - eps * (plan.sum((-1, -2)) - 1)
    if shift is not None:
        taken = (rows * shift.rows).sum(-1) + (columns * shift.columns).sum(-1)
        transport_cost, value = transport_cost + taken, value + taken
    return Solution(f, g, transport_cost, value, n_iter, error, shift)


def _solve_relaxed(problem: Problem, max_iter: int, tol: float, start: Tensor | None) -> Solution:
    """The solution under penalties; its potentials have no gauge, and nothing is taken out of the cost."""
    left, right, a, b, eps = problem.left, problem.right, problem.a, problem.b, problem.eps
    cost, log_a, log_b, (of_a, of_b) = dense_cost(left, right), log_mass(a), log_mass(b), penalties(problem)
    g = better_start(start, torch.zeros_like(b), problem, lambda g: f_step(cost, log_b, g, eps))
    f, g, n_iter = relaxed.iterate(cost, a, b, log_a, log_b, g, of_a, of_b, max_iter, tol)
    f = torch.where(live(a), f, of_a.damping * f_step(cost, log_b, g, eps))
    g = torch.where(live(b), g, of_b.damping * g_step(cost, log_a, f, eps))
    plan = transport_plan(cost, a, b, f, g, eps)
    rows, columns, total = plan.sum(-1), plan.sum(-2), plan.sum((-1, -2))
    error = (rows - a * of_a.share(f)).abs().sum(-1) + (columns - b * of_b.share(g)).abs().sum(-1)
    whole = (rows * f).sum(-1) + (columns * g).sum(-1) - eps * (total - a.sum(-1) * b.sum(-1))
    value = whole + of_a.divergence(rows, a) + of_b.divergence(columns, b)
    shift = None if right is not None else Shift(torch.zeros_like(a), torch.zeros_like(b))
    return Solution(f, g, (plan * cost).sum((-1, -2)), value, n_iter, error / _or_one(total), shift)


def _column(weight: Tensor | None, like: Tensor) -> Tensor:
    """A weight per problem, shaped to scale a matrix; None is zero."""
    return torch.zeros_like(like[..., 0, 0])[..., None, None] if weight is None else weight[..., None, None]


def _pull_back(grad_cost: Tensor, left: Tensor, right: Tensor | None) -> tuple[Tensor, Tensor]:
    """From the gradient of the cost to that of the cost itself or of the two feature sets."""
    if right is None:
        return grad_cost, grad_cost.new_empty(0)
    x, y = unit_rows(left), unit_rows(right)
    return _through_unit_rows(left, x, -grad_cost @ y), _through_unit_rows(right, y, -grad_cost.transpose(-1, -2) @ x)


def _through_unit_rows(x: Tensor, unit: Tensor, grad: Tensor) -> Tensor:
    tangent = grad - unit * (unit * grad).sum(-1, keepdim=True)
    return torch.where(live_rows(x), tangent / row_norms(x), 0.0)


def _solve_adjoint(plan: Tensor, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """V of [D_a T; T' D_b][U; V] = [r; s] by the Schur complement on the shorter side, and the relative residual.

    D holds the realised marginals; with a and b the system would be inconsistent for a plan that has not converged.
    The complement on the columns, D_b - T' D_a^-1 T, is then the Laplacian of the graph on them with weights
    W = T' D_a^-1 T: its diagonal is computed as the degrees of W, a sum without cancellation. It is scaled to diagonal
    1, its null vector is lifted by a rank-one term, and a ridge of the size of rounding keeps it definite where the
    graph falls apart into blocks; two steps of refinement take the ridge out again. Cholesky, because MKL 2024.2's
    batched LU returns wrong results once a process has raised its number of threads. A row or column without mass is
    left out. Where there are fewer rows, their complement gives U, and V = D_b^-1 (s - T' U).
    """
    dtype, (n, m) = plan.dtype, plan.shape[-2:]
    plan, r, s = wide(plan), wide(r), wide(s)
    if m <= n:
        v, residual = _solve_columns(plan, r, s, dtype)
    else:
        u, residual = _solve_columns(plan.transpose(-1, -2), s, r, dtype)
        v = (s - (plan * u.unsqueeze(-1)).sum(-2)) / _or_one(plan.sum(-2))
    return v.to(dtype), residual.to(dtype)


def _solve_columns(plan: Tensor, r: Tensor, s: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """V and the relative residual by the complement on the columns of a plan that was computed in ``dtype``."""
    m = plan.shape[-1]
    by_rows = plan / _or_one(plan.sum(-1)).unsqueeze(-1)
    diagonal = torch.eye(m, dtype=plan.dtype, device=plan.device)
    weights = (plan.transpose(-1, -2) @ by_rows) * (1 - diagonal)
    degrees = weights.sum(-1)
    unroot = torch.where(live(degrees), _or_one(degrees).rsqrt(), 0.0)
    null = degrees * unroot * _or_one(degrees.sum(-1, keepdim=True)).rsqrt()
    laplacian = diagonal - unroot.unsqueeze(-1) * weights * unroot.unsqueeze(-2)
    laplacian = laplacian + null.unsqueeze(-1) * null.unsqueeze(-2)
    ridge = max(torch.finfo(dtype).eps, m * torch.finfo(plan.dtype).eps)
    factor, failed = torch.linalg.cholesky_ex(laplacian + ridge * diagonal)
    of_rows = (by_rows * r.unsqueeze(-1)).sum(-2)
    right_side = _balanced(s - of_rows, plan.sum(-2))
    right_side = (unroot * right_side).unsqueeze(-1)
    z = torch.cholesky_solve(right_side, factor)
    for _ in range(2):
        z = z + torch.cholesky_solve(right_side - laplacian @ z, factor)
    z = z - null.unsqueeze(-1) * (null * z.squeeze(-1)).sum(-1)[..., None, None]
    z = torch.where(failed[..., None, None] == 0, z, torch.nan)  # it fails only on input that is not finite
    norm = torch.linalg.vector_norm
    size, terms = norm(right_side, dim=(-1, -2)), norm(unroot * s, dim=-1) + norm(unroot * of_rows, dim=-1)
    left_over = norm(right_side - laplacian @ z, dim=(-1, -2))
    solved = size <= 8 * torch.finfo(dtype).eps * terms  # the right side is the rounding of terms that cancel
    residual = torch.where(solved, 0.0, left_over / _or_one(size))
    return unroot * z.squeeze(-1), residual.detach()


def _balanced(right_side: Tensor, mass: Tensor) -> Tensor:
    """The right side with total 0, as an exact one has. What rounding left goes to each point by its mass.

    Each entry was rounded in proportion to its mass. Of a heavy point that is more than a light one's whole entry,
    which would be lost if the rest were spread evenly.
    """
    rest = right_side.sum(-1, keepdim=True) / _or_one(mass.sum(-1, keepdim=True))
    return right_side - mass * rest


def _or_one(x: Tensor) -> Tensor:
    """``x`` as a divisor: 1 where it counts as zero."""
    return torch.where(live(x), x, 1.0)


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
    left, right, a, b, eps = problem.left, problem.right, problem.a, problem.b, problem.eps
    if is_relaxed(problem):
        sides = (log_mass(a), log_mass(b), f, g, *penalties(problem))
        by, residual = relaxed.gradients(dense_cost(left, right), a, b, *sides, upstream, adjoint)
        x, y = _pull_back(by.cost, left, right) if need_cost else (a.new_empty(0), a.new_empty(0))
        return Gradients(x, y, by.a, by.b, by.rho), residual
    cost = shifted(dense_cost(left, right), shift)
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
        rows = (k * b.unsqueeze(-2)).sum(-1)
        columns = (k * a.unsqueeze(-1)).sum(-2)
        reduced = torch.where(k > 0, w * (cost - f.unsqueeze(-1) - g.unsqueeze(-2)), 0.0)  # not 0 * inf
        from_q = eps * (k * q.unsqueeze(-2)).sum(-1)
        from_p = eps * (k * p.unsqueeze(-1)).sum(-2)
        r = (reduced * plan).sum(-1) - a * from_q
        s = (reduced * plan).sum(-2) - b * from_p
        v, residual = _solve_adjoint(plan, r, s)
        # u by the row-normalised kernel: finite and right where a row has no mass; then v likewise.
        u = ((k * b.unsqueeze(-2) * (reduced - v.unsqueeze(-2))).sum(-1) - from_q) / rows
        v_dead = ((k * a.unsqueeze(-1) * (reduced - u.unsqueeze(-1))).sum(-2) - from_p) / columns
        v = torch.where(live(b), v, v_dead)
        grad = grad + plan * (u.unsqueeze(-1) + v.unsqueeze(-2) - reduced) / eps
        grad = grad + k * (b.unsqueeze(-2) * (p / rows).unsqueeze(-1) + a.unsqueeze(-1) * (q / columns).unsqueeze(-2))
        grad_a, grad_b = grad_a + u + w[..., 0] * whole_f, grad_b + v + w[..., 0] * whole_g
    grad_left, grad_right = _pull_back(grad, left, right) if need_cost else (cost.new_empty(0), cost.new_empty(0))
    return Gradients(grad_left, grad_right, grad_a, grad_b), residual


def _tangent_of_no_mass(mass: Tensor) -> Tensor:
    """0 with the derivative of ``mass`` where there is none."""
    return torch.where(live(mass), 0.0, mass - mass.detach())


def unrolled_gradient(
    problem: Problem, n_iter: Tensor, upstream: Upstream, need_cost: bool, max_iter: int
) -> Gradients:
    """Exact gradient of the iterations that were run: the potentials of each are kept, the kernels made again."""
    left, right, a, b, eps = problem.left, problem.right, problem.a, problem.b, problem.eps
    cost = dense_cost(left, right)
    log_a, log_b = log_mass(a), log_mass(b)
    twice = torch.is_grad_enabled()  # then a mass of 0 needs a derivative, which its logarithm does not have
    of_a, of_b = _tangent_of_no_mass(a).unsqueeze(-1), _tangent_of_no_mass(b).unsqueeze(-2)
    history = [(torch.zeros_like(a), torch.zeros_like(b))]
    for iteration in range(max_iter):
        running = (iteration < n_iter).unsqueeze(-1)
        f, g = history[-1]
        f_next = f_step(cost, log_b, g, eps)
        if twice:
            f_next = f_next - eps * (kernel(cost, f_next, g, eps) * of_b).sum(-1)
        f = torch.where(running, f_next, f)
        g_next = g_step(cost, log_a, f, eps)
        if twice:
            g_next = g_next - eps * (kernel(cost, f, g_next, eps) * of_a).sum(-2)
        history.append((f, torch.where(running, g_next, g)))

    # Points without mass take the potentials of the last iteration too: that is the limit of a vanishing mass.
    f_last, g_last = history[-1]
    w, w_value = _column(upstream.cost, cost), _column(upstream.value, cost)
    k = kernel(cost, f_last, g_last, eps)
    plan = a.unsqueeze(-1) * k * b.unsqueeze(-2)
    outer = w * cost + w_value * (f_last.unsqueeze(-1) + g_last.unsqueeze(-2))
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
    grad_left, grad_right = _pull_back(grad, left, right) if need_cost else (cost.new_empty(0), cost.new_empty(0))
    return Gradients(grad_left, grad_right, grad_a, grad_b)
