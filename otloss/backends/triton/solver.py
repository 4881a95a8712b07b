"""Solving: the launches of each regime, then what every output needs once."""

from __future__ import annotations

import torch
from torch import Tensor

from otloss.backends.protocol import Problem, Shift, Solution
from otloss.backends.reference import known, live
from otloss.backends.start import better_start
from otloss.backends.triton import config, penalties, relaxed, rows, small, stream
from otloss.backends.triton.launch import DeviceProblem, iterate, launch


def solve(problem: DeviceProblem, max_iter: int, tol: float, start: Tensor | None = None) -> Solution:
    """All outputs of every problem, from potentials 0 or from the start ``(B, m)``.

    Small problems take one launch. Others take those of their iterations, four for the outputs, and of a dense cost two
    for the shift; each of these reads or makes the cost once. A start adds two, which tell whether it is worth it.
    Under penalties nothing is taken out of the cost, and the start is not used.
    """
    if problem.regime == "small":
        return _small(problem, max_iter, tol, start)
    if problem.penalties is None:
        problem.take_minima_out()
    g = _first_g(problem, start if problem.penalties is None else None)
    finish = _finish if problem.penalties is None else penalties.finish
    return finish(problem, *(_medium if problem.regime == "medium" else _large)(problem, g, max_iter, tol))


def _small(problem: DeviceProblem, max_iter: int, tol: float, start: Tensor | None) -> Solution:
    count, n, m = problem.count, problem.n, problem.m
    f, g = problem.empty(count, n), problem.empty(count, m)
    cost, value, error = (problem.empty(count) for _ in range(3))
    n_iter = problem.empty(count, dtype=torch.int64)
    tile = config.small(n, m, problem.double, problem.soft is not None)
    if problem.soft is not None:
        g = _first_g(problem, None)
        launch(
            relaxed.relax_small, (count,), problem.cost, problem.soft, problem.a, problem.b, f, g, cost, value, n_iter,
            error, n, m, problem.eps, tol, max_iter, N=tile.rows, M=tile.cols, J=16, tile=tile,
        )  # fmt: skip
        return Solution(f, g, cost, value, n_iter, error)
    shift = Shift(torch.empty_like(f), torch.empty_like(g)) if problem.right is None else None
    launch(
        small.solve_small, (count,), problem.cost, *(shift or (None, None)), problem.a, problem.b, start, f, g, cost,
        value, n_iter, error, n, m, problem.eps, tol, max_iter, N=tile.rows, M=tile.cols, J=16, tile=tile,
    )  # fmt: skip
    return Solution(f, g, cost, value, n_iter, error, shift)


def _first_g(problem: DeviceProblem, start: Tensor | None) -> Tensor:
    """Potentials 0 of the cost as it was given, or those of a start."""
    shift = problem.shift
    cold = problem.zeros(problem.count, problem.m) if shift is None else -shift.columns
    given = start if start is None or shift is None else start - shift.columns
    masses = Problem(problem.left, problem.right, problem.a, problem.b, problem.eps)
    return better_start(given, cold, masses, lambda g: problem.potential(problem.rows, g, problem.b))


def _medium(problem: DeviceProblem, g: Tensor, max_iter: int, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """f, g and iterations from this g; ``rows.py`` says what each buffer is for."""
    count, n, m = problem.count, problem.n, problem.m
    tile, blocks, tiles = problem.row_blocks()
    f, g = problem.zeros(2, count, n), g.unsqueeze(1).repeat(1, blocks, 1)
    share, missed = problem.empty(2, blocks, count, m), problem.empty(2, count, blocks)
    state = problem.zeros(count, blocks, 3, dtype=torch.int32)
    level = constant = None
    if problem.soft is not None:
        level, constant = problem.empty(2, count, blocks), problem.zeros(count)
    running = state[..., 0].fill_(rows.FIRST.value)

    def step() -> None:
        launch(
            rows.iterate_rows, (count, blocks), problem.cost, *problem.rows[2:4], problem.a, problem.b, f, g, share,
            missed, state, problem.soft, level, constant, count, blocks, tiles, n, m, problem.eps, tol, max_iter,
            I=tile.rows, M=tile.cols, tile=tile,
        )  # fmt: skip

    iterate(step, 2 * max_iter + 1, running)  # every half-step of the columns may take a launch of its own
    n_iter, every = state[:, 0, 2].long(), torch.arange(count, device=f.device)
    f = f[n_iter % 2, every]
    return f if constant is None else f + constant.unsqueeze(-1), g[:, 0].contiguous(), n_iter


def _large(problem: DeviceProblem, g: Tensor, max_iter: int, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """f, g and iterations from this g, which is overwritten."""
    count, n, m, eps = problem.count, problem.n, problem.m, problem.eps
    f = problem.zeros(count, n)
    n_iter = problem.zeros(count, dtype=torch.int64)
    running = torch.ones_like(n_iter, dtype=torch.int32)
    over_m = problem.split(problem.rows, config.stream(n, m, problem.d, problem.double))
    over_n = problem.split(problem.columns, config.stream(m, n, problem.d, problem.double))
    soft, split = problem.soft, over_n > 1 or problem.soft is not None
    f_part, g_part = problem.empty(over_m, count, n), problem.empty(over_n, count, m) if split else g
    columns = None if soft is None else problem.zeros(count)
    block = config.VECTOR

    def step() -> None:
        problem.half_step(problem.rows, g, problem.b, f_part, running, 1, over_m)
        launch(
            stream.commit_rows, (count,), f_part, f, problem.a, running, n_iter, soft, columns, count, n, eps, tol,
            max_iter, over_m, I=block, tile=config.VECTORS,
        )  # fmt: skip
        problem.half_step(problem.columns, f, problem.a, g_part, running, 1, over_n)
        if soft is not None:
            launch(
                relaxed.balance, (count,), g_part, f, g, problem.a, problem.b, soft, running, columns, count, n, m,
                eps, over_n, I=block, tile=config.VECTORS,
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
