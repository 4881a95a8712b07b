"""``init``: a start changes how many sweeps a solution takes, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import random_problem
from torch import Tensor

import otloss
from examples import warm_start
from otloss.backends import cpu
from otloss.backends.protocol import Problem, Solution, Start

F64 = torch.float64
SIZES = [(5, 7), (64, 49), (65, 80)]  # of the cpu backend: two of lanes, one of the kernel for single problems
BOTH = pytest.mark.parametrize("solver", ["auto", "plain"])
FAR = {
    "constant": lambda n: torch.full((n,), 1e3),
    "random": lambda n: 1e3 * torch.randn(n),
    "huge": lambda n: 1e30 * torch.randn(n),
    "one": lambda n: 1e3 * torch.eye(n)[0],
    "near": lambda n: 0.3 * torch.randn(n),
}


def potentials(out: otloss.SinkhornOutput) -> tuple[Tensor, Tensor]:
    return out.f.detach(), out.g.detach()


def assert_same(one: otloss.SinkhornOutput, other: otloss.SinkhornOutput, atol: float) -> None:
    assert one.converged.all() and other.converged.all()
    for name in ("transport_cost", "value", "plan", "f", "g"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=atol)


@BOTH
@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("features", [False, True])
def test_a_near_start_saves_sweeps(backend: str, solver: str, n: int, m: int, features: bool) -> None:
    _, a, b = random_problem(5, n=n, m=m)
    x, y = torch.randn(5, n, 4, dtype=F64), torch.randn(5, m, 4, dtype=F64)
    near = x + 1e-5 * torch.randn_like(x)
    # Marginals within 1e-9 leave the potentials, of size 2, within about 1e-9 times the condition of the plan.
    options: dict[str, Any] = {"eps": 0.1, "tol": 1e-9, "max_iter": 50_000, "solver": solver, "backend": backend}

    def solve(x: Tensor, **more: Any) -> otloss.SinkhornOutput:
        if features:
            return otloss.cosine_sinkhorn(x, y, a, b, **options, **more)
        return otloss.sinkhorn(otloss.cosine_cost(x, y), a, b, **options, **more)

    before, cold = solve(x), solve(near)
    warm = solve(near, init=potentials(before))
    assert_same(warm, cold, 1e-6)
    assert (warm.n_iter < cold.n_iter).all() and warm.n_iter.sum() < 0.8 * cold.n_iter.sum()
    assert (solve(near, init=potentials(cold)).n_iter <= 2).all()


def test_plain_iterations_go_on_where_they_stopped(backend: str) -> None:
    for n, m in SIZES:
        cost, a, b = random_problem(3, n=n, m=m)
        options: dict[str, Any] = {"eps": 0.1, "tol": 0.0, "backend": backend}
        first = otloss.sinkhorn(cost, a, b, max_iter=3, **options)
        rest = otloss.sinkhorn(cost, a, b, max_iter=4, init=potentials(first), **options)
        whole = otloss.sinkhorn(cost, a, b, max_iter=7, **options)
        torch.testing.assert_close(rest.plan, whole.plan, rtol=1e-11, atol=1e-15)


@BOTH
@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize(("n", "m"), [(20, 30), (65, 80)])
def test_a_wrong_start_changes_no_result(backend: str, solver: str, far: str, n: int, m: int) -> None:
    cost, a, b = random_problem(3, n=n, m=m, dtype=torch.float32)
    options: dict[str, Any] = {"eps": 0.05, "solver": solver, "backend": backend, "max_iter": 5000}
    cold = otloss.sinkhorn(cost, a, b, **options)
    out = otloss.sinkhorn(cost, a, b, init=(FAR[far](n), FAR[far](m)), **options)
    # Marginals and values move by tol and by the rounding of exponents, which are of size 1 / eps.
    assert_same(out, cold, 2 * (1e-5 + 16 * 2**-24 / 0.05))
    # It is left aside, or no further than a cold start is.
    assert (out.n_iter <= 1.5 * cold.n_iter + 10).all()
    if far in ("random", "huge", "one"):
        assert torch.equal(out.n_iter, cold.n_iter)
        assert backend == "reference" or torch.equal(out.f, cold.f)


@BOTH
def test_potentials_of_another_problem(backend: str, solver: str) -> None:
    cost, a, b = random_problem(6, n=33, m=21)
    options: dict[str, Any] = {"eps": 0.02, "tol": 1e-8, "max_iter": 50_000, "solver": solver, "backend": backend}
    cold = otloss.sinkhorn(cost, a, b, **options)
    assert_same(otloss.sinkhorn(cost, a, b, init=(cold.f.flip(0), cold.g.flip(0)), **options), cold, 1e-5)


def test_small_eps_at_the_solution(backend: str) -> None:
    """The stages at larger eps, which a cold start goes through, are not gone through again."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand(1, n, 2, generator=generator, dtype=F64) for n in (70, 90))
    cost = otloss.sqeuclidean_cost(x, y)
    options: dict[str, Any] = {"eps": 0.001, "tol": 1e-6, "max_iter": 20_000, "backend": backend}
    cold = otloss.sinkhorn(cost, **options)
    assert cold.converged.all() and int(cold.n_iter) > 50
    assert int(otloss.sinkhorn(cost, init=potentials(cold), **options).n_iter) <= 2


def test_a_far_offset_of_the_cost(backend: str) -> None:
    """Potentials are those of the cost as it was given: of rows and columns with offsets they are as large."""
    cost, a, b = random_problem(3, n=12, m=15)
    cost = cost + 100 * torch.randn(12, 1, dtype=F64) + 100 * torch.randn(15, dtype=F64)
    cold = otloss.sinkhorn(cost, a, b, tol=1e-9, backend=backend)
    assert (otloss.sinkhorn(cost, a, b, tol=1e-9, init=potentials(cold), backend=backend).n_iter <= 2).all()


@BOTH
def test_points_that_take_no_part(backend: str, solver: str) -> None:
    """What a start holds there does not matter, whether a mass is 0 or a mask leaves the point out."""
    for n, m in ((9, 12), (66, 70)):
        cost, a, b = random_problem(3, n=n, m=m)
        keep_x, keep_y = torch.rand(3, n) < 0.7, torch.rand(3, m) < 0.7
        keep_x[:, 0] = keep_y[:, 0] = True
        options: dict[str, Any] = {"eps": 0.1, "tol": 1e-9, "max_iter": 5000, "solver": solver, "backend": backend}
        masked = otloss.sinkhorn(cost, mask_x=keep_x, mask_y=keep_y, **options)
        f, g = potentials(masked)
        for filler in (torch.nan, torch.inf, 1e30):
            init = f.masked_fill(~keep_x, filler), g.masked_fill(~keep_y, filler)
            again = otloss.sinkhorn(cost, mask_x=keep_x, mask_y=keep_y, init=init, **options)
            assert_same(again, masked, 1e-7)
            assert (again.n_iter <= 2).all()
            a, b = ((keep / keep.sum(-1, keepdim=True, dtype=F64)) for keep in (keep_x, keep_y))
            without = otloss.sinkhorn(cost, a, b, init=init, **options)
            assert (without.n_iter <= 2).all()
            torch.testing.assert_close(without.plan, masked.plan, rtol=0, atol=1e-7)


def test_a_tensor_eps(backend: str) -> None:
    """Potentials are in units of the cost, whatever the unit of the solver is."""
    cost, a, b = random_problem(3, n=8, m=6)
    eps = torch.tensor([0.05, 0.2, 1.0], dtype=F64, requires_grad=True)
    cold = otloss.sinkhorn(cost, a, b, eps=eps, tol=1e-10, backend=backend)
    warm = otloss.sinkhorn(cost, a, b, eps=eps, tol=1e-10, init=(cold.f, cold.g), backend=backend)
    assert (warm.n_iter <= 2).all()
    grads = [torch.autograd.grad(out.value.sum(), eps)[0] for out in (cold, warm)]
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-9)


def test_is_broadcast_and_a_constant_of_the_gradient(backend: str) -> None:
    cost, a, b = random_problem(2, 3, n=7, m=5)
    cost.requires_grad_()
    f, g = (torch.rand(n, dtype=F64, requires_grad=True) for n in (7, 5))
    options: dict[str, Any] = {"tol": 1e-11, "max_iter": 20_000, "backend": backend}
    cold, warm = otloss.sinkhorn(cost, a, b, **options), otloss.sinkhorn(cost, a, b, init=(f, g), **options)
    losses = [out.transport_cost.sum() + out.plan.square().sum() + out.f.square().sum() for out in (cold, warm)]
    grads = [torch.autograd.grad(loss, cost, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-8)
    assert torch.autograd.grad(losses[1], (f, g), allow_unused=True) == (None, None)


def test_compile_and_vmap(backend: str) -> None:
    cost, a, b = random_problem(3, n=7, m=5)
    f, g = torch.rand(3, 7, dtype=F64), torch.rand(3, 5, dtype=F64)

    def loss(cost: Tensor, f: Tensor, g: Tensor) -> Tensor:
        return otloss.sinkhorn(cost, a[0], b[0], tol=1e-10, init=(f, g), backend=backend).value

    want = loss(cost, f, g)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(cost, f, g), want)
    torch.testing.assert_close(torch.func.vmap(loss, in_dims=(0, None, 0))(cost, f[0], g), want)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("n", [20, 70])
def test_a_problem_keeps_its_bits_in_a_batch(n: int, accelerate: bool, dtype: torch.dtype) -> None:
    """Problems whose start is taken beside problems whose start is left aside, in any company, by any threads."""
    if cpu.status():
        pytest.skip(str(cpu.status()))
    cost, a, b = random_problem(19, n=n, m=n + 3, dtype=dtype)
    g = cpu.solve(Problem(cost + 0.02 * torch.rand_like(cost), None, a, b, 0.02), 5000, 1e-5, None, True).g
    g[::3] *= 1e4
    threads = torch.get_num_threads()

    def solve(part: slice) -> Solution:
        problem = Problem(cost[part], None, a[part], b[part], 0.02)
        return cpu.solve(problem, 5000, 1e-5, None, accelerate, Start(None, g[part]))

    try:
        torch.set_num_threads(1)
        whole = solve(slice(0, 19))
        torch.set_num_threads(3)
        for first, last in ((0, 19), (0, 1), (18, 19), (4, 11)):
            for one, other in zip(solve(slice(first, last))[:6], whole[:6], strict=True):
                assert torch.equal(one, other[first:last])
    finally:
        torch.set_num_threads(threads)


def test_a_problem_that_threads_share(kernel_backend: str) -> None:
    cost, a, b = random_problem(n=700, m=800, dtype=torch.float32)
    cold = otloss.sinkhorn(cost, a, b, eps=0.1, backend=kernel_backend)
    threads, outs = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            outs.append(otloss.sinkhorn(cost + 0.01, a, b, eps=0.1, init=potentials(cold), backend=kernel_backend))
    finally:
        torch.set_num_threads(threads)
    assert int(outs[0].n_iter) <= 2
    assert torch.equal(outs[0].f, outs[1].f) and torch.equal(outs[0].g, outs[1].g)


@pytest.mark.parametrize(("rho_a", "rho_b"), [(0.5, 0.5), (0.3, None)])
def test_penalties(rho_a: float | None, rho_b: float | None) -> None:
    cost, a, b = random_problem(3, n=8, m=6)
    options: dict[str, Any] = {"rho_a": rho_a, "rho_b": rho_b, "eps": 0.05, "tol": 1e-9, "max_iter": 20_000}
    cold = otloss.sinkhorn(cost, a, 2 * b, **options)
    assert (otloss.sinkhorn(cost, a, 2 * b, init=(cold.f, cold.g), **options).n_iter <= 2).all()
    near = cost + 1e-3 * torch.rand_like(cost)
    fresh, warm = (otloss.sinkhorn(near, a, 2 * b, init=i, **options) for i in (None, (cold.f, cold.g)))
    assert_same(warm, fresh, 1e-7)
    assert (warm.n_iter < fresh.n_iter).all()
    for make in FAR.values():
        init = make(8).double(), make(6).double()
        assert_same(otloss.sinkhorn(cost, a, 2 * b, init=init, **options), cold, 1e-6)


@pytest.mark.parametrize("objective", ["transport_cost", "value", "divergence"])
def test_losses_take_it(objective: str) -> None:
    x, y = torch.randn(3, 9, 4, dtype=F64), torch.randn(3, 7, 4, dtype=F64)
    options: dict[str, Any] = {"eps": 0.1, "objective": objective, "tol": 1e-10, "max_iter": 5000}
    for module in (otloss.CosineSinkhornLoss(**options), otloss.FeatureSinkhornLoss("sqeuclidean", **options)):
        cold, out = module.per_problem(x, y)
        warm, again = module.per_problem(x, y, init=potentials(out))
        assert (again.n_iter <= 2).all()
        torch.testing.assert_close(warm, cold, rtol=0, atol=1e-8)
        torch.testing.assert_close(module(x, y, init=potentials(out)), cold.mean(), rtol=0, atol=1e-8)
    cost = otloss.cosine_cost
    within = {"cost_xx": cost(x, x), "cost_yy": cost(y, y)} if objective == "divergence" else {}
    dense, out = otloss.SinkhornLoss(**options), otloss.sinkhorn(cost(x, y), eps=0.1)
    want = dense(cost(x, y), **within)
    torch.testing.assert_close(dense(cost(x, y), **within, init=potentials(out)), want, rtol=0, atol=1e-8)


def test_what_does_not_fit_is_named() -> None:
    cost, f, g = torch.rand(2, 3, 4), torch.zeros(3), torch.zeros(4)
    for init, error, message in (
        ((f,), TypeError, r"init must be a pair of potentials \(f, g\), got 1"),
        (f, TypeError, "init must be a pair .* got Tensor"),
        ((f, None), TypeError, "g of init must be a tensor"),
        ((g, f), ValueError, r"f of init must have shape \(B, 3\) or \(3,\) beside cost \(2, 3, 4\), got \(4,\)"),
        ((f, g.double()), TypeError, "float64 does not mix .* g of init"),
        ((f, torch.zeros(5, 4)), ValueError, "broadcastable"),
        ((f, g.fill_(torch.nan)), ValueError, "g of init must be finite where there is mass"),
        ((torch.full((3,), torch.inf), torch.zeros(4)), ValueError, "f of init must be finite"),
    ):
        with pytest.raises(error, match=message):
            otloss.sinkhorn(cost, init=init)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient 'unroll'"):
        otloss.sinkhorn(cost, init=(f, torch.zeros(4)), gradient="unroll")
    with pytest.raises(ValueError, match="give init or partial, not both"):
        otloss.sinkhorn(cost, init=(f, torch.zeros(4)), partial=0.5)


def test_the_recipe() -> None:
    runs = warm_start.main(["--points", "60", "--steps", "40"])
    assert runs["warm"][1] < 0.8 * runs["cold"][1]
    assert runs["warm"][0] == pytest.approx(runs["cold"][0], abs=1e-3)
