"""``solver="auto"``: where "plain" converges it does too, to the same solution, in no more sweeps."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from conftest import random_problem
from torch import Tensor

import otloss
from benchmarks.solver import MAX_ITER, ROOM, compare, random_cases, random_cost
from otloss import cosine_sinkhorn, sinkhorn
from otloss.backends import cpu
from otloss.backends.protocol import Problem


@pytest.mark.parametrize(("name", "factor"), [("random", 1.1), ("peaked", 1.3), ("float32", 1.1)])
def test_random_problems(kernel_backend: str, name: str, factor: float) -> None:
    """Costs, masses, eps and tol of all kinds. Peaked masses make plain iterations harder to foresee."""
    plain = auto = 0
    for case in random_cases(240, seed=1, name=name):
        outcome = compare(case, kernel_backend)
        assert outcome.auto_converged or not outcome.plain_converged, outcome
        assert outcome.gap <= outcome.bound or outcome.plain > MAX_ITER, outcome
        assert outcome.auto <= factor * outcome.plain + ROOM, outcome
        plain, auto = plain + outcome.plain, auto + outcome.auto
    assert auto < plain / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [16, 40])
def test_steps_that_change_no_more_than_rounding(backend: str, n: int, dtype: torch.dtype) -> None:
    """Every point is near one partner. A plain iteration then changes the residual by 1e-7, and 10,000 do not do."""
    rng = torch.Generator().manual_seed(1)
    cost = torch.stack([random_cost("matched views", n, n, rng) for _ in range(16)]).to(dtype)
    out = sinkhorn(cost, eps=0.05, tol=1e-5, max_iter=1000, backend=backend)
    assert out.converged.all()


def test_few_sweeps_are_the_plain_ones(backend: str) -> None:
    """Where plain iterations contract fast, auto takes the same steps, and sees one sweep later that it is there."""
    cost, a, b = random_problem(6, n=23, m=31)
    plain, auto = (sinkhorn(cost, a, b, eps=2.0, tol=1e-6, solver=s, backend=backend) for s in ("plain", "auto"))
    assert (plain.n_iter <= 6).all() and (auto.n_iter <= plain.n_iter + 1).all()
    assert torch.allclose(plain.value, auto.value, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [20, 90])
def test_a_problem_keeps_its_bits_in_a_batch(n: int, dtype: torch.dtype) -> None:
    """Neither the problems around it nor the threads change the course of a problem that takes every kind of step."""
    if cpu.status():
        pytest.skip(str(cpu.status()))
    x, y, a, b = (t.to(dtype) for t in channels(19, n, 16))
    sharp = 4 * (torch.arange(19) % 5 == 1).to(dtype).unsqueeze(-1)
    a = (a.log() * (1 + sharp)).softmax(-1)
    problem = Problem(x, y, a, b, 0.004)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = cpu.solve(problem, 5000, 1e-5, None, True)
        assert int(whole.n_iter.max()) > 2 * int(whole.n_iter.min())
        torch.set_num_threads(3)
        for first, last in ((0, 19), (0, 1), (18, 19), (4, 11)):
            part = Problem(x[first:last], y[first:last], a[first:last], b[first:last], 0.004)
            solved = cpu.solve(part, 5000, 1e-5, None, True)
            for one, other in zip(solved[:6], whole[:6], strict=True):
                assert torch.equal(one, other[first:last])
    finally:
        torch.set_num_threads(threads)


def test_the_reference_takes_the_same_course(kernel_backend: str) -> None:
    """The same decisions; after many sweeps, rounding tells them apart."""
    cost, a, b = random_problem(4, n=23, m=31)
    for eps, few in ((0.3, True), (0.03, True), (0.003, False)):
        options = {"eps": eps, "tol": 1e-6}
        ours, theirs = (sinkhorn(cost, a, b, backend=name, **options) for name in (kernel_backend, "reference"))
        assert ours.converged.all() and theirs.converged.all()
        difference = (ours.n_iter - theirs.n_iter).abs()
        assert (difference == 0).all() if few else (difference <= 0.2 * theirs.n_iter).all()
        # The values are dual to the marginals: both are within tol, times the size of the potentials.
        assert torch.allclose(ours.value, theirs.value, atol=4e-6)


def channels(count: int, n: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(count, n, d).relu()
    y = (x + 0.5 * torch.randn(count, n, d)).relu()
    return x, y, torch.randn(count, n).softmax(-1), torch.randn(count, n).softmax(-1)


@pytest.mark.parametrize("shape", [(4, 196, 64), (20, 49, 128)])
@pytest.mark.parametrize("eps", [0.05, 0.01, 0.002])
def test_small_eps_converges_within_the_default(kernel_backend: str, eps: float, shape: tuple[int, int, int]) -> None:
    x, y, a, b = channels(*shape)
    # The default max_iter is to do at eps 0.01, and ten times as many at 0.002.
    options = {} if eps >= 0.01 else {"max_iter": 10_000}
    out = cosine_sinkhorn(x, y, a, b, eps=eps, backend=kernel_backend, **options)
    assert out.converged.all()
    rounding = 16 * 2**-24 / eps
    plan = out.plan.double()
    assert ((plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1) < 1e-5 + rounding).all()
    exact = cosine_sinkhorn(*(t.double() for t in (x, y, a, b)), eps=eps, tol=1e-9, max_iter=50_000)
    assert exact.converged.all()
    # The value is dual to the marginals: it moves by their error times the potentials, which are below 2.
    assert torch.allclose(out.value.double(), exact.value, atol=2 * (1e-5 + rounding))


def test_far_apart_masses(backend: str) -> None:
    """Masses of very different sizes, down to the least that counts, where one step has far to go."""
    cost = torch.rand(2, 30, 25, dtype=torch.float64)
    log_a, log_b = 15 * torch.randn(2, 30, dtype=torch.float64), 15 * torch.randn(2, 25, dtype=torch.float64)
    log_b[:, 3] = -torch.inf
    log_a, log_b = log_a.log_softmax(-1), log_b.log_softmax(-1)
    plain, auto = (
        sinkhorn(cost, log_a=log_a, log_b=log_b, eps=0.02, tol=1e-9, max_iter=20_000, solver=solver, backend=backend)
        for solver in ("plain", "auto")
    )
    assert plain.converged.all() and auto.converged.all()
    assert torch.allclose(plain.value, auto.value, atol=1e-7)
    assert auto.f.isfinite().all() and auto.g.isfinite().all() and not auto.plan[..., 3].any()


def test_gradients_are_those_of_the_plain_solution(backend: str) -> None:
    cost, a, b = random_problem(2, n=12, m=9)
    cost.requires_grad_()
    grads = []
    for solver in ("plain", "auto"):
        out = sinkhorn(cost, a, b, eps=0.05, tol=1e-11, max_iter=20_000, solver=solver, backend=backend)
        grads.append(torch.autograd.grad(out.transport_cost.sum() + out.plan.square().sum(), cost)[0])
    assert torch.allclose(*grads, atol=1e-7)


def test_unroll_and_tol_0_are_plain(backend: str) -> None:
    cost, a, b = random_problem(3, n=12, m=9)
    for options in ({"gradient": "unroll", "tol": 1e-4}, {"tol": 0.0, "max_iter": 17}):
        plain, auto = (sinkhorn(cost, a, b, solver=s, backend=backend, **options) for s in ("plain", "auto"))
        assert torch.equal(plain.n_iter, auto.n_iter) and torch.equal(plain.plan, auto.plan)


def test_an_unknown_solver_is_refused() -> None:
    for call in (lambda: sinkhorn(torch.rand(3, 3), solver="newton"), lambda: otloss.SinkhornLoss(solver="newton")):
        with pytest.raises(ValueError, match="solver must be one of"):
            call()


def test_modules_pass_the_solver_on() -> None:
    cost = F.softplus(torch.randn(30, 30, dtype=torch.float64))
    plain, auto = (
        otloss.SinkhornLoss(eps=0.02, solver=solver, max_iter=20_000, tol=1e-9)(cost) for solver in ("plain", "auto")
    )
    assert plain != auto and abs(plain - auto) < 1e-7
    defaults = {
        inspect.signature(f).parameters["solver"].default for f in (sinkhorn, cosine_sinkhorn, otloss.SinkhornLoss)
    }
    assert defaults == {"auto"}
