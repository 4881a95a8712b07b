"""Penalties on the marginals in the C++ kernels, against the reference across block and vector boundaries."""

from __future__ import annotations

import pytest
import torch
from cpu_problems import DTYPES, close, cosine, features, needs_cpu, slack, wide
from torch import Tensor

from benchmarks.solver import random_cost
from otloss import sinkhorn
from otloss.backends import cpu, reference
from otloss.backends.protocol import Backend, Gradients, Problem, Solution, Upstream

pytestmark = needs_cpu

EPS = 0.1
TOL = {torch.float32: 1e-6, torch.float64: 1e-13}
SIZES = [(1, 1), (5, 7), (64, 64), (65, 130), (300, 40)]
RHOS = [(0.7, 0.4), (0.3, None), (None, 2.0), (0.01, 50.0)]


def _rho(value: float | None, like: Tensor) -> Tensor | None:
    return None if value is None else value * (1 + torch.arange(len(like), dtype=like.dtype))


def _problem(
    left: Tensor, right: Tensor | None, a: Tensor, b: Tensor, rhos: tuple[float | None, float | None], eps: float = EPS
) -> Problem:
    return Problem(left, right, a, b, eps, *(_rho(rho, a) for rho in rhos))


def _double(problem: Problem) -> Problem:
    left, right, a, b, rho_a, rho_b = wide(*problem[:4], problem.rho_a, problem.rho_b)
    return problem._replace(left=left, right=right, a=a, b=b, rho_a=rho_a, rho_b=rho_b)


def _masses(n: int, m: int, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, ...]:
    """Features with masses of two different totals."""
    x, y, a, b = features(n, m, dtype, batch)
    return x, y, 3 * a, 0.5 * b


def _upstream(a: Tensor, b: Tensor) -> Upstream:
    w, v = torch.randn_like(a[:, 0]), torch.randn_like(a[:, 0])
    return Upstream(w, v, torch.randn_like(a) * a, torch.randn_like(b) * b)


def _gradients(backend: Backend, problem: Problem, solution: Solution, upstream: Upstream) -> Gradients:
    by, residual = backend.implicit_gradient(problem, solution.f, solution.g, upstream, True, True)
    assert float(residual.max()) < 1e-3
    return by


@pytest.mark.parametrize("rhos", RHOS)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_everything_is_that_of_the_reference(n: int, m: int, rhos: tuple[float | None, float | None]) -> None:
    """float64: solutions and every gradient, of features and of their cost."""
    x, y, a, b = _masses(n, m, torch.float64)
    upstream = _upstream(a, b)
    for left, right in ((x, y), (cosine(x, y), None)):
        problem = _problem(left, right, a, b, rhos)
        got, want = cpu.solve(problem, 5000, 1e-13), reference.solve(problem, 5000, 1e-13)
        assert bool((got.n_iter - want.n_iter).abs().max() <= 2) and float(got.error.max()) < 1e-12
        for mine, theirs in zip(got[:4], want[:4], strict=True):
            close(mine, theirs, 1e-11)
        for mine, theirs in zip(*(_gradients(k, problem, want, upstream) for k in (cpu, reference)), strict=True):
            close(mine, theirs, 1e-9)


@pytest.mark.parametrize("upstream", [(True, False), (False, True)])
@pytest.mark.parametrize("adjoint", [False, True])
def test_gradients_of_one_output(adjoint: bool, upstream: tuple[bool, bool]) -> None:
    x, y, a, b = _masses(9, 17, torch.float64)
    problem = _problem(cosine(x, y), None, a, b, (0.5, 0.3))
    solution = reference.solve(problem, 5000, 1e-13)
    some = Upstream(*(torch.randn_like(a[:, 0]) if asked else None for asked in upstream))
    for need_cost in (False, True):
        arguments = problem, solution.f, solution.g, some, adjoint, need_cost
        for mine, theirs in zip(*(k.implicit_gradient(*arguments)[0] for k in (cpu, reference)), strict=True):
            close(mine, theirs, 1e-10)


def test_a_problem_that_is_split() -> None:
    x, y, a, b = _masses(1030, 1100, torch.float64, 1)
    problem, upstream = _problem(x, y, a, b, (0.7, 0.4)), _upstream(a, b)
    got, want = cpu.solve(problem, 5000, 1e-12), reference.solve(problem, 5000, 1e-12)
    for mine, theirs in zip(got[:4], want[:4], strict=True):
        close(mine, theirs, 1e-10)
    for mine, theirs in zip(*(_gradients(k, problem, want, upstream) for k in (cpu, reference)), strict=True):
        close(mine, theirs, 1e-8)


@pytest.mark.parametrize("rhos", RHOS)
@pytest.mark.parametrize(("n", "m"), [(5, 7), (65, 130)])
def test_float32(n: int, m: int, rhos: tuple[float | None, float | None]) -> None:
    x, y, a, b = _masses(n, m, torch.float32)
    upstream = Upstream(torch.randn(2), torch.randn(2))
    problem = _problem(x, y, a, b, rhos)
    got, want = cpu.solve(problem, 2000, 1e-6), reference.solve(_double(problem), 5000, 1e-13)
    # A relative error of the plan moves the constant of the potentials by up to max(rho) of it, 50 (1 + 1) here.
    size = max(2.0, *(2 * rho for rho in rhos if rho is not None))
    for mine, theirs in zip(got[:4], want[:4], strict=True):
        close(mine, theirs, slack(torch.float32, EPS, size))
    exact = _gradients(reference, _double(problem), want, Upstream(*wide(*upstream)))
    for mine, theirs in zip(_gradients(cpu, problem, got, upstream), exact, strict=True):
        close(mine, theirs, slack(torch.float32, EPS, size, 100.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rhos", [*RHOS, (1e3, 1e3), (None, 1e3), (2e-3, None)])
@pytest.mark.parametrize(("n", "m", "eps"), [(1, 1, 0.1), (5, 7, 0.1), (64, 64, 0.02), (130, 65, 0.005)])
def test_quasi_newton_steps_lead_to_the_same_solution(
    n: int, m: int, eps: float, rhos: tuple[float | None, float | None], dtype: torch.dtype
) -> None:
    x, y, a, b = _masses(n, m, dtype)
    if rhos[0] is None or rhos[1] is None or min(rhos) > 100:
        b = b / b.sum(-1, keepdim=True) * a.sum(-1, keepdim=True)
    problem = _problem(x, y, a, b, rhos, eps)
    tol = 1e-5 if dtype == torch.float32 else 1e-11
    plain, fast = cpu.solve(problem, 20000, tol), cpu.solve(problem, 20000, tol, None, True)
    assert bool((fast.n_iter <= 1.2 * plain.n_iter + 5).all()), (fast.n_iter, plain.n_iter)
    rounding = slack(dtype, eps, 2.0, 4.0)
    assert float(fast.error.max()) < tol + rounding
    for mine, theirs in zip(fast[2:4], plain[2:4], strict=True):
        close(mine, theirs.double(), 100 * tol + rounding)


@pytest.mark.parametrize("n", [20, 90])
def test_the_potentials_of_tiny_masses_obey_their_equation(n: int) -> None:
    """The marginal error does not see them, and yet g is what f asks for."""
    cost, (a, b) = torch.rand(32, n, n), ((12 * torch.randn(32, n)).softmax(-1) for _ in range(2))
    eps, rho = 0.8, 0.3
    out = sinkhorn(cost, a, b, eps=eps, tol=1e-6, max_iter=1000, rho_b=rho, backend="cpu")
    assert out.converged.all()
    exponents = (out.f.double().unsqueeze(-1) - cost) / eps + a.double().log().unsqueeze(-1)
    asked = -eps * exponents.logsumexp(-2) * rho / (rho + eps)
    assert torch.allclose(out.g.double(), asked, atol=1e-6)


@pytest.mark.parametrize("rhos", [(None, 5.0), (100.0, 100.0)])
@pytest.mark.parametrize("n", [16, 40])
def test_steps_that_change_no_more_than_rounding(n: int, rhos: tuple[float | None, float | None]) -> None:
    """Every point is near one partner, as in test_solver.py."""
    rng = torch.Generator().manual_seed(1)
    cost = torch.stack([random_cost("matched views", n, n, rng) for _ in range(16)]).float()
    out = sinkhorn(cost, eps=0.05, tol=1e-5, max_iter=200, rho_a=rhos[0], rho_b=rhos[1], backend="cpu")
    assert out.converged.all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("total", [1e-3, 1e3])
def test_any_total(total: float, dtype: torch.dtype) -> None:
    x, y, a, b = _masses(9, 17, dtype)
    problem = _problem(x, y, total * a, b, (0.7, 0.4))
    double = _double(problem)
    got, want = cpu.solve(problem, 5000, TOL[dtype]), reference.solve(double, 5000, TOL[torch.float64])
    for mine, theirs in zip(got[:4], want[:4], strict=True):
        close(mine, theirs, slack(dtype, room=64.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("far", [20.0, 1e4, 1e8])
def test_points_that_are_far_from_all_others(far: float, dtype: torch.dtype) -> None:
    """Single ones on both sides, and two groups that are far from the others and near each other."""
    x, y, a, b = _masses(40, 30, torch.float64)
    cost = cosine(x, y)
    cost[:, 3] += far
    cost[:, :, 5] += far
    cost[:, 10:20, :15] += far
    cost[:, :10, 15:] += far
    cost[:, 20:30, 20:] += far
    problem = _problem(cost.to(dtype), None, a.to(dtype), b.to(dtype), (0.1, 0.2), 0.05)
    double = _double(problem)
    got, want = cpu.solve(problem, 5000, TOL[dtype]), reference.solve(double, 5000, TOL[torch.float64])
    assert bool((got.n_iter < 5000).all())
    for mine, theirs in zip(got[:4], want[:4], strict=True):
        close(mine, theirs, slack(dtype, 0.05, room=64.0))
    upstream = Upstream(torch.randn(2, dtype=dtype), torch.randn(2, dtype=dtype))
    exact = _gradients(reference, double, want, Upstream(*wide(*upstream)))
    for mine, theirs in zip(_gradients(cpu, problem, got, upstream), exact, strict=True):
        close(mine, theirs, slack(dtype, 0.05, room=300.0))


@pytest.mark.parametrize("far", [1.0, 1e4])
def test_points_without_mass(far: float) -> None:
    x, y, a, b = _masses(19, 37, torch.float64)
    cost = cosine(x, y)
    a[:, ::3], b[:, 1::4] = 0, 0
    cost[:, ::3] *= far
    cost[:, :, 1::4] *= far
    problem, upstream = _problem(cost, None, a, b, (0.7, 0.4)), Upstream(torch.randn(2, dtype=torch.float64))
    got, want = cpu.solve(problem, 5000, 1e-13), reference.solve(problem, 5000, 1e-13)
    for mine, theirs in zip(got[:4], want[:4], strict=True):
        close(mine, theirs, 1e-11)
    mine, theirs = (_gradients(k, problem, want, upstream) for k in (cpu, reference))
    for one, other in zip(mine, theirs, strict=True):
        close(one, other, 1e-9)
    assert not mine.left[:, ::3].any() and not mine.left[:, :, 1::4].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_penalty_is_a_constraint(dtype: torch.dtype) -> None:
    x, y, a, b = features(33, 65, dtype)
    rho, tol = 1e6, 10 * TOL[dtype]
    soft, hard = Problem(x, y, a, b, EPS, *(torch.full((2,), rho, dtype=dtype),) * 2), Problem(x, y, a, b, EPS)
    got, want = (cpu.solve(problem, 5000, tol) for problem in (soft, hard))
    bound = 1e-5 + slack(dtype)  # marginals are off by |f| / rho, f of the size of the cost, a plan by that over eps
    close(got.transport_cost, want.transport_cost, bound)
    close(got.value, want.value, bound + 10 * rho * tol**2)  # rho KL(T1 | a) is of second order in the marginals' error
    upstream = Upstream(torch.randn(2, dtype=dtype))
    mine, theirs = (_gradients(cpu, problem, out, upstream) for problem, out in ((soft, got), (hard, want)))
    close(mine.left, theirs.left, 10 * bound)
    close(mine.right, theirs.right, 10 * bound)
    for one, other in ((mine.a, theirs.a), (mine.b, theirs.b)):  # those of the constraint are known but for a constant
        close(one - one.mean(-1, keepdim=True), (other - other.mean(-1, keepdim=True)).double(), 10 * bound)


@pytest.mark.parametrize("eps", [1e-3, 1e-2])
@pytest.mark.parametrize("rhos", [(1e-4, 1e-4), (1.0, 0.3), (100.0, None)])
def test_small_eps(eps: float, rhos: tuple[float | None, float | None]) -> None:
    """float32 follows the reference in float64, iteration by iteration."""
    cost = 2 * torch.rand(2, 20, 23)
    a, b = torch.randn(2, 20).softmax(-1), torch.randn(2, 23).softmax(-1)
    problem = _problem(cost, None, a, b, rhos, eps)
    for iterations in (1, 3, 100):
        got, want = cpu.solve(problem, iterations, 0.0), reference.solve(_double(problem), iterations, 0.0)
        assert bool((got.n_iter == iterations).all()) and bool(got.error.isfinite().all())
        # Each iteration adds a rounding of the cost, and of the constant, which is rho times a sum of shares.
        tolerance = torch.finfo(torch.float32).eps * 4 * (4 + iterations)
        for mine, theirs in zip(got[:2], want[:2], strict=True):
            close(mine, theirs, tolerance)
        for mine, theirs in zip(got[2:4], want[2:4], strict=True):
            close(mine, theirs, tolerance / eps)


def _everything(problem: Problem) -> list[Tensor]:
    a, b = problem.a, problem.b
    kept = None if problem.right is None else a.new_empty(len(a), a.shape[1], b.shape[1])
    out = cpu.solve(problem, 60, 1e-4, kept)
    fast = cpu.solve(problem, 60, 1e-4, None, True)
    w = torch.ones_like(out.value)
    by, residual = cpu.implicit_gradient(problem, out.f, out.g, Upstream(w, w, out.f, out.g), True, True, kept)
    by_value, _ = cpu.implicit_gradient(problem, out.f, out.g, Upstream(w, w), True, True)
    return [*out[:6], *fast[:6], *(grad for grad in (*by, *by_value) if len(grad) == len(w)), residual]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m", "count"), [(1, 9, 40), (7, 9, 40), (49, 49, 13), (130, 65, 5), (800, 700, 2)])
def test_bit_for_bit_whatever_the_batch_and_the_threads(n: int, m: int, count: int, dtype: torch.dtype) -> None:
    x, y, a, b = features(n, m, dtype, count)
    a = (1 + torch.arange(count, dtype=dtype)[:, None] % 3) * a
    b[1::2, 0] = 0
    threads = torch.get_num_threads()
    try:
        for left, right in ((x, y), (cosine(x, y).to(dtype), None)):
            whole = Problem(left, right, a, b, 0.02, _rho(0.1, a), _rho(0.05, a))

            def part(start: int, stop: int, whole: Problem = whole) -> list[Tensor]:
                sliced = (t[start:stop].clone() if isinstance(t, Tensor) else t for t in whole)
                return _everything(Problem(*sliced))

            torch.set_num_threads(1)
            want = part(0, count)
            torch.set_num_threads(3)
            assert all(map(torch.equal, part(0, count), want))
            for start, stop in ((0, 1), (count - 1, count), (count // 2, count)):
                assert all(torch.equal(p, q[start:stop]) for p, q in zip(part(start, stop), want, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_shows() -> None:
    x, y, a, b = _masses(9, 10, torch.float32)
    cost = cosine(x, y).float()
    cost[1, 3, 4] = float("nan")
    out = cpu.solve(_problem(cost, None, a, b, (0.5, 0.5)), 10**4, 0.0)
    assert int(out.n_iter[1]) == 1 and bool(out.f[0].isfinite().all()) and bool(out.f[1].isnan().any())


def test_no_problems() -> None:
    x, y, a, b = (t[:0] for t in features(3, 4, torch.float32))
    out = _everything(_problem(x, y, a, b, (0.5, None)))
    assert out[0].shape == (0, 3) and out[12].shape == x.shape
