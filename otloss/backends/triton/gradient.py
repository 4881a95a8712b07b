"""Gradients: multipliers of the adjoint system or the reverse sweep, then one contraction for every size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from otloss.backends.massless import known, live, unrolled_by_mass
from otloss.backends.protocol import Gradients, Upstream
from otloss.backends.triton import adjoint, config, contract, rows, small, stream
from otloss.backends.triton.launch import DeviceProblem, View, iterate, launch

# Potentials, masses, multipliers and weights of the rows and columns that ``contract.py`` takes.
Side = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def implicit_gradient(
    problem: DeviceProblem,
    f: Tensor,
    g: Tensor,
    upstream: Upstream,
    use_adjoint: bool,
    need_cost: bool,
) -> tuple[Gradients, Tensor]:
    """Gradients of left, right, a, b, and the relative residual of the adjoint system."""
    w, w_value = problem.scalars(upstream.cost), problem.scalars(upstream.value)
    f, g, shift = f.contiguous(), g.contiguous(), problem.shift
    whole_f, whole_g = (f, g) if shift is None else (f + shift.rows, g + shift.columns)
    row: Side = (f, problem.a, None, None)
    column: Side = (g, problem.b, None, None)
    direct, residual = w_value.unsqueeze(-1), problem.zeros(problem.count)
    grad_a, grad_b = direct * whole_f, direct * whole_g
    if use_adjoint:
        p = torch.zeros_like(f) if upstream.f is None else upstream.f.contiguous()
        q = torch.zeros_like(g) if upstream.g is None else upstream.g.contiguous()
        u, v, by_p, by_q, residual, _ = multipliers(problem, f, g, w, p, q, with_g=upstream.g is not None)
        row, column = (f, problem.a, u, by_p), (g, problem.b, v, by_q)
        sharp = w.unsqueeze(-1)
        grad_a, grad_b = grad_a + u + sharp * whole_f, grad_b + v + sharp * whole_g
    left, right = problem.empty(0), problem.empty(0)
    if need_cost:
        left, right = by_cost(problem, row, column, w, w_value, None)
    return Gradients(left, right, grad_a, grad_b), residual


class Multipliers(NamedTuple):
    """The solution of the adjoint system of each problem, p/rho and q/sigma, and the relative residual."""

    u: Tensor
    v: Tensor
    by_p: Tensor
    by_q: Tensor
    residual: Tensor
    constant: Tensor | None
    """``(B, 1)``, to be added to V and taken from U under penalties: it may be so large that their sum loses digits."""


def multipliers(
    problem: DeviceProblem, f: Tensor, g: Tensor, w: Tensor, p: Tensor, q: Tensor, with_g: bool
) -> Multipliers:
    """Those of a problem, by what its size asks for; ``with_g`` says whether q has any entry."""
    if problem.regime == "small":
        return _small_multipliers(problem, f, g, w, p, q)
    return _multipliers(problem, f, g, w, p, q, with_g)


def _small_multipliers(problem: DeviceProblem, f: Tensor, g: Tensor, w: Tensor, p: Tensor, q: Tensor) -> Multipliers:
    """All of them in one launch."""
    u, v, by_p, by_q = (torch.empty_like(like) for like in (f, g, f, g))
    h, residual = torch.empty_like(g), torch.empty_like(w)
    constant = None if problem.soft is None else torch.empty_like(w)
    tile = config.small(problem.n, problem.m, problem.double)
    launch(
        small.adjoint_small, (problem.count,), problem.cost, *problem.rows[2:4], problem.a, problem.b, f, g, w, p, q,
        u, v, by_p, by_q, h, residual, problem.soft, constant, problem.n, problem.m, problem.eps,
        N=tile.rows, M=tile.cols, J=16, tile=tile,
    )  # fmt: skip
    return Multipliers(u, v, by_p, by_q, residual, None if constant is None else constant.unsqueeze(-1))


def _without(x: Tensor, root: Tensor) -> Tensor:
    """``x`` less its component along ``root``."""
    return x - (x * root).sum(-1, keepdim=True) / root.square().sum(-1, keepdim=True) * root


def _multipliers(
    problem: DeviceProblem, f: Tensor, g: Tensor, w: Tensor, p: Tensor, q: Tensor, with_g: bool
) -> Multipliers:
    """All of them by conjugate gradients; ``adjoint.py`` has the equations."""
    eps, sharp = problem.eps, w.unsqueeze(-1)
    live_a, live_b = live(problem.a), live(problem.b)
    a, b = torch.where(live_a, problem.a, 0.0), torch.where(live_b, problem.b, 0.0)
    of_g = torch.where(live_b, q, q * known(1 / problem.sums(problem.columns, g, f, a)[0], live_b)) if with_g else q
    rho, cost_row, q_row = problem.sums(problem.rows, f, g, b, b, of_g, reduced=True)
    by_rho = known(1 / rho, live_a)
    y = known((sharp * cost_row - eps * q_row) * by_rho, live_a)
    pull, constant = a, None
    if problem.soft is not None:
        soft_a, soft_b = problem.soft[:, :1], problem.soft[:, 1:]
        stiff_a, stiff_b = 1 + soft_a, 1 + soft_b
        of_plan = sharp * known(a * cost_row, live_a).sum(-1, True)
        of_potentials = eps * (q.sum(-1, True) - stiff_a * p.sum(-1, True))
        gap = soft_a + soft_b + soft_a * soft_b  # stiff_a stiff_b - 1
        constant = (soft_a * of_plan + of_potentials) / (gap * (a * rho).sum(-1, True))
        y, pull = y / stiff_a, a / (stiff_a * stiff_b)
    by_p = a * y + eps * p * torch.where(live_a, 1.0, by_rho)
    sigma, cost_column, p_column = problem.sums(problem.columns, g, f, a, a, by_p, reduced=True)
    scale = torch.where(live_b, b, 1.0)
    h, s = known(scale * (sharp * cost_column - p_column), live_b), sigma * scale
    if problem.soft is not None:
        h = h / stiff_b
    root = torch.where(live_b, s.sqrt(), 0.0)
    unroot = torch.where(root > 0, 1 / root, 0.0)

    z, unit, start, solved = _conjugate_gradients(
        problem, f, g, pull * by_rho, scale * unroot, root, h * unroot, a * rho, torch.where(live_a, y, 0.0)
    )
    if constant is not None:  # else it is a matter of the gauge
        z = _without(z, root)
    v = unroot * z
    product = problem.sums(problem.rows, f, g, scale * v)[0] * by_rho
    back = h + scale * problem.sums(problem.columns, g, f, pull * product)[0]
    left_over = _without((back - s * v) * unroot / unit, root)
    v = torch.where(live_b, v, known(back / s, live_b))
    size = torch.where(start > 0, start, 1.0).sqrt()
    residual = torch.where(solved, 0.0, torch.linalg.vector_norm(left_over, dim=-1) / size)
    if constant is not None:  # what it does, but for itself
        v = v - torch.where(live_b, 0.0, constant * gap / (stiff_a * stiff_b))
        product = (product - soft_a * constant) / stiff_a
    u = known(y - product, live_a)
    return Multipliers(u, v, p * by_rho, q * known(1 / sigma, live_b), residual, constant)


def _conjugate_gradients(
    problem: DeviceProblem,
    f: Tensor,
    g: Tensor,
    weight: Tensor,
    scale: Tensor,
    root: Tensor,
    right_side: Tensor,
    mass: Tensor,
    y: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve (I - L'L) z = right_side; return z, the largest entry of the right side, its squared size and a mask.

    The squared size is in units of the largest entry, whose square might overflow or vanish. The mask says where the
    right side is only the rounding of the terms ``mass y^2``, which cancel: there z = 0 solves the system.
    """
    count, n, m, d = problem.count, problem.n, problem.m, problem.d
    # Twice: what rounding leaves along root is never reduced, and z would grow along it.
    res = _without(_without(right_side, root), root)
    unit = res.abs().amax(-1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    res = (res / unit).contiguous()
    start, terms = res.square().sum(-1), (mass * (y / unit).square()).sum(-1)
    solved = start <= (8 * torch.finfo(res.dtype).eps) ** 2 * terms
    running = ((start > 0) & ~solved).to(torch.int32)
    nothing = torch.zeros_like(start)
    state = torch.stack((start, start, start, nothing, nothing), -1).contiguous()
    z, best, work = torch.zeros_like(res), torch.zeros_like(res), torch.empty_like(res)
    direction, alpha = res.clone(), scale * res
    cap = min(10 * (n + m), 2000)
    stream_tile = config.stream(n, m, d, problem.double)
    if problem.regime == "medium":
        tile, parts, tiles = problem.row_blocks()
    else:
        over_m, parts = problem.split(problem.rows, stream_tile), problem.split(problem.columns, stream_tile)
        product = problem.empty(over_m, count, n)
    share = problem.empty(parts, count, m)

    def step() -> None:
        if problem.regime == "medium":
            launch(
                rows.normal_rows, (count, parts), problem.cost, *problem.rows[2:4], f, g, alpha, weight, share,
                running, count, tiles, n, m, problem.eps, I=tile.rows, M=tile.cols, tile=tile,
            )  # fmt: skip
        else:
            problem.launch_sums(problem.rows, f, g, alpha, None, 1, None, None, product, running, over_m)
            problem.launch_sums(problem.columns, g, f, product, weight, over_m, None, None, share, running, parts)
        launch(
            adjoint.descend, (count,), share, parts, scale, root, work, z, res, direction, best, alpha, state, running,
            count, m, cap, J=min(config.power(m, 256), config.VECTOR), tile=config.VECTORS,
        )  # fmt: skip

    if count:
        iterate(step, cap, running, captured=config.CAPTURED_STEPS)
    return best * unit, unit, start, solved


def by_cost(
    problem: DeviceProblem, row: Side, column: Side, w: Tensor, w_value: Tensor, n_iter: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the cost, or of both feature sets."""
    of_x, of_y = None, None  # sums of the gradient's rows and columns
    if problem.cost is None:
        by_x, of_x = _contract_features(problem, problem.rows, row, column, w, w_value, n_iter, swapped=False)
        by_y, of_y = _contract_features(problem, problem.columns, column, row, w, w_value, n_iter, swapped=True)
    else:
        cost = _contract_dense(problem, problem.cost, row, column, w, w_value, n_iter)
        if problem.right is None:
            return cost, problem.empty(0)
        by_x, by_y = problem.product(cost, problem.y, 0.0), problem.product(cost.mT, problem.x, 0.0)
        if problem.kind == "sqeuclidean":
            of_x, of_y = cost.sum(2), cost.sum(1)
    assert problem.right is not None
    return (
        problem.features_back(problem.left, problem.x, problem.of_x, by_x, of_x),
        problem.features_back(problem.right, problem.y, problem.of_y, by_y, of_y),
    )


def _contract_dense(
    problem: DeviceProblem,
    cost: Tensor,
    row: Side,
    column: Side,
    w: Tensor,
    w_value: Tensor,
    n_iter: Tensor | None,
) -> Tensor:
    """The gradient of a stored cost, in its dtype."""
    out = torch.empty_like(cost)
    tile, _ = config.contract(problem.n, problem.m, 0, problem.double)
    grid = (problem.count, -(-problem.n // tile.rows), -(-problem.m // tile.cols))
    launch(
        contract.contract_dense, grid, cost, *problem.rows[2:4], out, *_sides(row, column), w, w_value, n_iter,
        problem.count, problem.n, problem.m, problem.eps, I=tile.rows, J=tile.cols, tile=tile,
    )  # fmt: skip
    return out


def _sides(row: Side, column: Side) -> list[Tensor | None]:
    return [part for pair in zip(row, column, strict=True) for part in pair]


def _contract_features(
    problem: DeviceProblem,
    view: View,
    row: Side,
    column: Side,
    w: Tensor,
    w_value: Tensor,
    n_iter: Tensor | None,
    *,
    swapped: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of what was made of a side's features, and for squared distances the sums of dC over its rows."""
    out = problem.empty(problem.count, view.n, view.d)
    sums = problem.empty(problem.count, view.n) if view.kind == "sqeuclidean" else None
    tile, held = config.contract(view.n, view.m, view.d, problem.double)
    launch(
        contract.contract_features, (problem.count, -(-view.n // tile.rows), -(-view.d // held)),
        *view[:4], out, sums, *_sides(row, column), w, w_value, n_iter, problem.count, view.n, view.m, view.d,
        problem.eps, SWAPPED=swapped and n_iter is not None, KIND=view.kind, I=tile.rows, J=tile.cols, K=tile.depth,
        D=held, tile=tile,
    )  # fmt: skip
    return out, sums


def unrolled_gradient(
    problem: DeviceProblem, n_iter: Tensor, upstream: Upstream, need_cost: bool, longest: int
) -> Gradients:
    """Gradients of left, right, a, b through the iterations that were run, of which no problem took over ``longest``.

    The iterations are run again and their potentials kept; the reverse sweep keeps its multipliers:
    O(iterations (n + m)) memory. With t = K .. 1 and lambda, kappa from the outputs at t = K:
    lambda -= a k(f^t, g^t) kappa, da -= eps k kappa;  then kappa = -b k(f^t, g^(t-1))' lambda, db -= eps k' lambda.
    """
    count, n, m, eps = problem.count, problem.n, problem.m, problem.eps
    w, w_value, n_iter = problem.scalars(upstream.cost), problem.scalars(upstream.value), n_iter.contiguous()
    live_a, live_b = live(problem.a), live(problem.b)
    a, b = torch.where(live_a, problem.a, 0.0), torch.where(live_b, problem.b, 0.0)
    f, u = problem.zeros(longest + 1, count, n), problem.zeros(longest + 1, count, n)
    g, v = problem.zeros(longest + 1, count, m), problem.zeros(longest + 1, count, m)
    for t in range(1, longest + 1):
        problem.half_step(problem.rows, g[t - 1], problem.b, f[t], n_iter, t, 1)
        problem.half_step(problem.columns, f[t], problem.a, g[t], n_iter, t, 1)
    if problem.right is None:  # points without mass that are forbidden to all others are at +inf
        f, g = known(f, live_a), known(g, live_b)

    sharp, value = w.unsqueeze(-1), w_value.unsqueeze(-1)
    last = n_iter.reshape(1, count, 1)
    at_f, at_g = last.expand(1, count, n), last.expand(1, count, m)
    f_last, g_last = f.gather(0, at_f)[0], g.gather(0, at_g)[0]
    lift, share = _outer(problem, problem.rows, f_last, g_last, b, sharp, value)
    grad_a = lift - eps * value * (share - 1)
    u.scatter_(0, at_f, (a * known(lift, live_a) / eps).unsqueeze(0))
    lift, share = _outer(problem, problem.columns, g_last, f_last, a, sharp, value)
    grad_b = lift - eps * value * (share - 1)
    v.scatter_(0, at_g, (b * known(lift, live_b) / eps).unsqueeze(0))
    for t in range(longest, 0, -1):
        _reverse(problem, problem.rows, f[t], g[t], a, v[t], u[t], grad_a, n_iter, t)
        _reverse(problem, problem.columns, g[t - 1], f[t], b, u[t], v[t - 1], grad_b, n_iter, t)
    grad_a, grad_b = unrolled_by_mass(grad_a, a, f_last, eps), unrolled_by_mass(grad_b, b, g_last, eps)
    if not need_cost:
        return Gradients(problem.empty(0), problem.empty(0), grad_a, grad_b)
    left, right = by_cost(problem, (f, a, u, None), (g, b, v, None), w, w_value, n_iter)
    return Gradients(left, right, grad_a, grad_b)


def _outer(
    problem: DeviceProblem, view: View, f: Tensor, g: Tensor, mass: Tensor, sharp: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """sum_j k_ij mass_j (w C_ij + w_V (f_i + g_j)) and sum_j k_ij mass_j."""
    share, by_cost, by_g = problem.sums(view, f, g, mass, mass, mass * g)
    return sharp * by_cost + value * (f * share + by_g), share


def _reverse(
    problem: DeviceProblem, view: View, f: Tensor, g: Tensor, mass: Tensor, multiplier: Tensor, out: Tensor,
    grad: Tensor, n_iter: Tensor, step: int,
) -> None:  # fmt: skip
    tile = config.stream(view.n, view.m, view.d, problem.double)
    launch(
        stream.unroll_step, (problem.count, -(-view.n // tile.rows)),
        *view[:4], f, g, mass, multiplier, out, grad, n_iter, step, *view[4:9], problem.eps,
        KIND=view.kind, I=tile.rows, J=tile.cols, K=tile.depth,
        tile=tile,
    )  # fmt: skip
