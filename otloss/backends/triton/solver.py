"""Solving: the launches of each regime, then what every output needs once."""

from __future__ import annotations

import torch
from torch import Tensor

from otloss.backends.massless import known, live
from otloss.backends.protocol import Problem, Shift, Solution
from otloss.backends.start import better_start
from otloss.backends.triton import config, mixed, penalties, relaxed, rows, small, stream
from otloss.backends.triton.launch import DeviceProblem, iterate, launch


def solve(
    problem: DeviceProblem, max_iter: int, tol: float, start: Tensor | None = None, accelerate: bool = False
) -> Solution:
    """All outputs of every problem, from potentials 0 or from the start ``(B, m)``.

    Small problems take one launch. Others take those of their iterations, four for the outputs, and of a dense cost two
    for the shift; each of these reads or makes the cost once. A start adds two, which tell whether it is worth it.
    Under penalties nothing is taken out of the cost. With ``accelerate`` a set with itself takes mixed steps
    (``mixed.py``); where n = m, one launch more finds such problems.
    """
    if problem.regime == "small":
        return _small(problem, max_iter, tol, start, accelerate)
    if problem.penalties is None:
        problem.take_minima_out()
    g, same = _first_g(problem, start), problem.same_sets() if accelerate else None
    f, g, n_iter = (_medium if problem.regime == "medium" else _large)(problem, g, max_iter, tol, same)
    if same is not None:
        f, g = _meet(problem, f, g, same)
    return (_finish if problem.penalties is None else penalties.finish)(problem, f, g, n_iter)


def _small(problem: DeviceProblem, max_iter: int, tol: float, start: Tensor | None, accelerate: bool) -> Solution:
    count, n, m = problem.count, problem.n, problem.m
    f, g = problem.empty(count, n), problem.empty(count, m)
    cost, value, error = (problem.empty(count) for _ in range(3))
    n_iter = problem.empty(count, dtype=torch.int64)
    tile = config.small(n, m, problem.double, problem.soft is not None)
    one, other, width = problem.comparable() if accelerate else (None, None, 0)
    if problem.soft is not None:
        launch(
            relaxed.relax_small, (count,), problem.cost, problem.soft, problem.a, problem.b, start, one, other, f, g,
            cost, value, n_iter, error, n, m, width, problem.eps, tol, max_iter, N=tile.rows, M=tile.cols, J=16,
            tile=tile,
        )  # fmt: skip
        return Solution(f, g, cost, value, n_iter, error)
    shift = Shift(torch.empty_like(f), torch.empty_like(g)) if problem.right is None else None
    launch(
        small.solve_small, (count,), problem.cost, *(shift or (None, None)), problem.a, problem.b, start, one, other, f,
        g, cost, value, n_iter, error, n, m, width, problem.eps, tol, max_iter, N=tile.rows, M=tile.cols, J=16,
        tile=tile,
    )  # fmt: skip
    return Solution(f, g, cost, value, n_iter, error, shift)


def _first_g(problem: DeviceProblem, start: Tensor | None) -> Tensor:
    """Potentials 0 of the cost as it was given, or those of a start."""
    shift = problem.shift
    cold = problem.zeros(problem.count, problem.m) if shift is None else -shift.columns
    given = start if start is None or shift is None else start - shift.columns
    given_problem = Problem(problem.left, problem.right, problem.a, problem.b, problem.eps, *problem.rhos)
    return better_start(given, cold, given_problem, lambda g: problem.potential(problem.rows, g, problem.b))


def _mix(same: Tensor | None, like: Tensor) -> Tensor | None:
    """The error of the last sweep where problems take mixed steps, see ``mixed.py``."""
    return None if same is None else torch.where(same > 0, torch.inf, -1.0).to(like.dtype)


def _meet(problem: DeviceProblem, f: Tensor, g: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of f and g for both, of the cost as it was given, in the problems of a set with itself."""
    apart = 0.0 if problem.shift is None else problem.shift.columns - problem.shift.rows
    half, which = (f - apart + g) / 2, (same > 0).unsqueeze(-1)
    return torch.where(which, half + apart, f), torch.where(which, half, g)


def _medium(
    problem: DeviceProblem, g: Tensor, max_iter: int, tol: float, same: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """f, g and iterations from this g; ``rows.py`` says what each buffer is for."""
    count, n, m = problem.count, problem.n, problem.m
    tile, blocks, tiles = problem.row_blocks()
    f, g = problem.zeros(2, count, n), g.unsqueeze(1).repeat(1, blocks, 1)
    share, missed = problem.empty(2, blocks, count, m), problem.empty(2, count, blocks)
    state = problem.zeros(count, blocks, 3, dtype=torch.int32)
    level = constant = None
    if problem.soft is not None:
        level, constant = problem.empty(2, count, blocks), problem.zeros(count)
    mix = _mix(same, f)
    mix = None if mix is None else mix.unsqueeze(-1).repeat(1, blocks)
    running = state[..., 0].fill_(rows.FIRST.value)

    def step() -> None:
        launch(
            rows.iterate_rows, (count, blocks), problem.cost, *problem.rows[2:4], problem.a, problem.b, f, g, share,
            missed, state, problem.soft, level, constant, mix, count, blocks, tiles, n, m, problem.eps, tol, max_iter,
            I=tile.rows, M=tile.cols, tile=tile,
        )  # fmt: skip

    iterate(step, 2 * max_iter + 1, running)  # every half-step of the columns may take a launch of its own
    n_iter, every = state[:, 0, 2].long(), torch.arange(count, device=f.device)
    f = f[n_iter % 2, every]
    return f if constant is None else f + constant.unsqueeze(-1), g[:, 0].contiguous(), n_iter


def _large(
    problem: DeviceProblem, g: Tensor, max_iter: int, tol: float, same: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """f, g and iterations from this g, which is overwritten."""
    count, n, m, eps = problem.count, problem.n, problem.m, problem.eps
    f = problem.zeros(count, n)
    n_iter = problem.zeros(count, dtype=torch.int64)
    running = torch.ones_like(n_iter, dtype=torch.int32)
    over_m = problem.split(problem.rows, config.stream(n, m, problem.d, problem.double))
    over_n = problem.split(problem.columns, config.stream(m, n, problem.d, problem.double))
    soft, mix, minima = problem.soft, _mix(same, f), problem.shift or (None, None)
    split = over_n > 1 or soft is not None or mix is not None
    f_part, g_part = problem.empty(over_m, count, n), problem.empty(over_n, count, m) if split else g
    columns = None if soft is None else problem.zeros(count)
    block = config.VECTOR

    def step() -> None:
        problem.half_step(problem.rows, g, problem.b, f_part, running, 1, over_m)
        launch(
            stream.commit_rows, (count,), f_part, f, problem.a, running, n_iter, soft, columns, mix, count, n, eps, tol,
            max_iter, over_m, I=block, tile=config.VECTORS,
        )  # fmt: skip
        problem.half_step(problem.columns, f, problem.a, g_part, running, 1, over_n)
        if soft is not None:
            launch(
                relaxed.balance, (count,), g_part, f, g, problem.a, problem.b, soft, running, columns, mix, n_iter,
                count, n, m, eps, tol, max_iter, over_n, I=block, tile=config.VECTORS,
            )  # fmt: skip
        elif mix is not None:
            launch(
                mixed.commit_columns, (count,), g_part, f, g, problem.b, *minima, mix, running, n_iter, count, n, eps,
                tol, max_iter, over_n, I=block, tile=config.VECTORS,
            )  # fmt: skip
        elif over_n > 1:
            launch(
                stream.commit, (count, -(-m // block)), g_part, g, running, count, m, eps, over_n,
                I=block, tile=config.VECTORS,
            )  # fmt: skip

    iterate(step, max_iter + 1, running)  # the last only sees that they are done
    return f, g, n_iter


def _finish(problem: DeviceProblem, f: Tensor, g: Tensor, n_iter: Tensor) -> Solution:
    """Potentials where there is no mass, the gauge <a, f> = <b, g>, cost, value and error, as in the reference."""
    a, b, eps, shift = problem.a, problem.b, problem.eps, problem.shift
    live_a, live_b = live(a), live(b)
    f = torch.where(live_a, f, problem.potential(problem.rows, g, b))
    g = torch.where(live_b, g, problem.potential(problem.columns, f, a))
    constant = ((b * g).sum(-1) - (a * f).sum(-1)).unsqueeze(-1) / 2
    f, g = f + constant, g - constant
    by_row, by_cost = problem.sums(problem.rows, f, g, b, b)
    (by_column,) = problem.sums(problem.columns, g, f, a)
    row, column = a * by_row, b * by_column  # the marginals of the plan
    error = (row - a).abs().sum(-1) + (column - b).abs().sum(-1)
    cost = (a * known(by_cost, live_a)).sum(-1)
    value = known(row * f, live_a).sum(-1) + known(column * g, live_b).sum(-1) - eps * (row.sum(-1) - 1)
    if shift is not None:
        taken = known(row * shift.rows, live_a).sum(-1) + known(column * shift.columns, live_b).sum(-1)
        cost, value = cost + taken, value + taken
    return Solution(f, g, cost, value, n_iter, error, shift)
