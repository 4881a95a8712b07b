"""Points without mass, whatever they would cost, and forbidden pairs: the others' results and gradients are theirs."""

from __future__ import annotations

import pytest
import torch
from conftest import leave_out_last, random_problem, relative
from grids import grid
from torch import Tensor

from otloss import sinkhorn
from otloss.backends import get_backend
from otloss.backends.protocol import Problem, Upstream


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_problems_have_the_cropped_gradient(backend: str, dtype: torch.dtype) -> None:
    cost, a, b = random_problem(n=9, m=7, dtype=dtype)
    rows, columns = torch.tensor([0, 2, 3, 7]), torch.tensor([1, 2, 6])
    mask_a = torch.full((9,), -torch.inf).index_fill(0, rows, 0.0)
    mask_b = torch.full((7,), -torch.inf).index_fill(0, columns, 0.0)
    za, zb = a.log().requires_grad_(), b.log().requires_grad_()
    cost.requires_grad_()
    masked = sinkhorn(
        cost, log_a=(za + mask_a).log_softmax(-1), log_b=(zb + mask_b).log_softmax(-1), backend=backend, max_iter=1000
    )
    grads = torch.autograd.grad(masked.transport_cost + masked.plan.square().sum(), (cost, za, zb))
    cropped = sinkhorn(
        cost[rows][:, columns],
        log_a=za[rows].log_softmax(-1),
        log_b=zb[columns].log_softmax(-1),
        backend=backend,
        max_iter=1000,
    )
    expected = torch.autograd.grad(cropped.transport_cost + cropped.plan.square().sum(), (cost, za, zb))
    slack = 1e-4 if dtype == torch.float32 else 1e-10
    for got, want in zip(grads, expected, strict=True):
        assert got.isfinite().all() and relative(got, want) < slack


@pytest.mark.parametrize(
    ("gradient", "side", "scale", "size"),
    grid(("implicit", "unroll"), ("rows", "columns", "both"), (1e6, 1e9, 1e12, 1e16, 1e30), (5, 70)),
)
def test_huge_costs_without_mass_do_not_reach_the_others(
    backend: str, gradient: str, side: str, scale: float, size: int
) -> None:
    """In float32 a potential of 1e9 is known to a thousand times eps only, and what follows from it must not matter."""
    cost, a, b = random_problem(n=size, m=size, dtype=torch.float32)
    live_a, live_b = (slice(None, -2) if side in (name, "both") else slice(None) for name in ("rows", "columns"))
    for mass, live in ((a, live_a), (b, live_b)):
        if live.stop:
            mass[-2:] = 0
            mass /= mass.sum()
    huge = torch.ones(size, size, dtype=torch.bool)
    huge[live_a, live_b] = False
    cost[huge] = scale * (1 + 0.1 * torch.rand(int(huge.sum())))

    def gradients(*args: Tensor) -> tuple[Tensor, ...]:
        args = tuple(x.clone().requires_grad_() for x in args)
        out = sinkhorn(*args, backend=backend, gradient=gradient, max_iter=2000)
        return torch.autograd.grad(out.transport_cost + out.value, args)

    masked, cropped = gradients(cost, a, b), gradients(cost[live_a, live_b], a[live_a], b[live_b])
    assert all(x.isfinite().all() for x in masked)
    for got, want in zip((masked[0][live_a, live_b], masked[1][live_a], masked[2][live_b]), cropped, strict=True):
        assert relative(got, want) < 1e-3


@pytest.mark.parametrize("size", [5, 70])
@pytest.mark.parametrize("scale", [1e5, 1e6, 1e9])
def test_potentials_of_huge_costs_without_mass_have_their_gradient(backend: str, scale: float, size: int) -> None:
    cost, a, b = random_problem(n=size, m=size, dtype=torch.float32)
    for mass in (a, b):
        mass[-2:] = 0
        mass /= mass.sum()
    cost[-2:], cost[:, -2:] = (scale * (1 + 0.1 * torch.rand(shape)) for shape in ((2, size), (size, 2)))
    weights = torch.randn(2, size)

    def gradients(dtype: torch.dtype, backend: str, tol: float) -> tuple[Tensor, ...]:
        args = tuple(x.to(dtype).requires_grad_() for x in (cost.clone(), a.clone(), b.clone()))
        out = sinkhorn(*args, backend=backend, max_iter=3000, tol=tol)
        return torch.autograd.grad((weights.to(dtype) * torch.stack((out.f, out.g))).sum(), args)

    got, want = gradients(torch.float32, backend, 1e-6), gradients(torch.float64, "reference", 1e-12)
    for mine, exact in zip(got, want, strict=True):
        live = tuple(slice(None, -2) for _ in mine.shape)
        assert mine.isfinite().all() and relative(mine[live].double(), exact[live]) < 1e-3


@pytest.mark.parametrize("size", [2, 80])
@pytest.mark.parametrize("gradient", ["implicit", "unroll", "none"])
def test_pairs_may_be_forbidden_by_the_largest_number(backend: str, gradient: str, size: int) -> None:
    cost = torch.full((size, size), torch.finfo(torch.float32).max).fill_diagonal_(0).requires_grad_()
    out = sinkhorn(cost, gradient=gradient, backend=backend)
    (grad,) = torch.autograd.grad(30 * out.transport_cost, cost)
    assert torch.allclose(grad, 30 / size * torch.eye(size), atol=1e-5)


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_a_forbidden_pair_has_a_second_derivative_by_unrolling(weight: float) -> None:
    cost = torch.rand(4, 4)
    cost[0, 1] = torch.finfo(torch.float32).max
    cost.requires_grad_()
    out = sinkhorn(cost, eps=0.1, max_iter=5, tol=0.0, gradient="unroll", backend="reference")
    (grad,) = torch.autograd.grad(weight * out.transport_cost, cost, create_graph=True)
    (twice,) = torch.autograd.grad(grad.square().sum(), cost)
    assert twice.isfinite().all() and twice.any() and twice[0, 1] == 0


def without_last(
    side: str, mass: float, scale: float, batch: int = 16
) -> tuple[Tensor, Tensor, Tensor, tuple[slice, slice, slice]]:
    """Problems whose last row or column has that mass and costs of that scale, and which rows and columns are live."""
    cost, a, b = random_problem(batch, n=5, m=5, dtype=torch.float32)
    live = leave_out_last(side, cost, a, b, scale * (1 + 0.1 * torch.rand(batch, 5)))
    (a if side == "rows" else b)[:, -1] = mass
    return cost, a, b, live


@pytest.mark.parametrize(
    ("gradient", "side", "by_log", "mass"),
    grid(("implicit", "unroll"), ("rows", "columns"), (False, True), (5e-31, 1e-38)),
)
def test_a_trace_of_mass_is_no_mass(backend: str, gradient: str, side: str, by_log: bool, mass: float) -> None:
    cost, a, b, live = without_last(side, mass, 1e9)

    def results(*given: Tensor) -> tuple[Tensor, ...]:
        given = tuple(x.clone().requires_grad_() for x in given)
        masses = {"log_a": given[1].log(), "log_b": given[2].log()} if by_log else {"a": given[1], "b": given[2]}
        out = sinkhorn(given[0], **masses, backend=backend, gradient=gradient, max_iter=500)
        loss = (out.transport_cost + out.value).sum() + (out.plan.square().sum() if gradient == "implicit" else 0)
        return *(x.detach() for x in (out.transport_cost, out.value, out.plan)), *torch.autograd.grad(loss, given)

    got, want = results(cost, a, b), results(cost[live], a[live[:2]], b[:, live[2]])
    assert all(x.isfinite().all() for x in got)
    got = (*got[:2], got[2][live], got[3][live], got[4][live[:2]], got[5][:, live[2]])
    assert all(relative(x, y) < 1e-3 for x, y in zip(got, want, strict=True))


def test_zero_mass_has_the_one_sided_second_derivative_by_unrolling() -> None:
    cost, a, b = random_problem(1, n=4, m=5)
    a[:, 3] = 0
    a /= a.sum(-1, keepdim=True)
    weight, n_iter, direction = torch.ones(1, dtype=a.dtype), torch.tensor([3]), torch.randn_like(cost)

    def first(a: Tensor) -> Tensor:
        problem = Problem(cost, None, a, b, 0.2)
        left, *_ = get_backend("reference").unrolled_gradient(problem, n_iter, Upstream(weight, weight / 2), True, 3)
        return (left * direction).sum()

    (second,) = torch.autograd.grad(first(a.requires_grad_()), a)
    with torch.no_grad():
        for i, step in enumerate(1e-7 * torch.eye(4, dtype=a.dtype)):
            assert float((first(a + step) - first(a)) / 1e-7) == pytest.approx(float(second[0, i]), rel=1e-4)


def test_a_gradient_by_no_mass_that_overflows_is_zero(backend: str) -> None:
    """Its potential is small at the end; of the first iteration, which starts from 0, its kernel is at its bound."""
    cost, a, b, _ = without_last("columns", 0.0, 0.0)
    cost[:, :, :-1] += 5
    weight, n_iter = torch.full((len(cost),), 1e15), torch.full((len(cost),), 3)
    problem, up = Problem(cost, None, a, b, 0.05), Upstream(weight, weight)
    _, _, by_a, by_b, _ = get_backend(backend).unrolled_gradient(problem, n_iter, up, True, 3)
    assert by_a.isfinite().all() and by_b.isfinite().all() and by_b[:, :-1].all()


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_a_large_loss_does_not_bring_points_without_mass_back(backend: str, side: str) -> None:
    """What multiplies their kernel overflows; nothing may come of that."""
    cost, a, b, live = without_last(side, 0.0, 1e9)
    weight, n_iter = torch.full((len(cost),), 1e15), torch.full((len(cost),), 2)

    def gradients(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        problem, up = Problem(cost, None, a, b, 0.05), Upstream(weight, weight)
        left, _, by_a, by_b, _ = get_backend(backend).unrolled_gradient(problem, n_iter, up, True, 2)
        return left, by_a, by_b

    got, want = gradients(cost, a, b), gradients(cost[live].contiguous(), a[live[:2]], b[:, live[2]])
    assert all(x.isfinite().all() for x in got)
    got = (got[0][live], got[1][live[:2]], got[2][:, live[2]])
    assert all(relative(x, y) < 1e-3 for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e4, 1e9])
def test_what_rounding_has_lost_of_a_point_without_mass_is_no_gradient(backend: str, scale: float, side: str) -> None:
    """A potential of 1e9 is known to 64: unrolled, the gradient by its mass is 0 then."""
    cost, a, b, _ = without_last(side, 0.0, scale)

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        weight, n_iter = torch.ones(len(cost), dtype=dtype), torch.full((len(cost),), 20)
        problem = Problem(cost.to(dtype), None, a.to(dtype), b.to(dtype), 0.05)
        _, _, *by_mass = get_backend(backend).unrolled_gradient(problem, n_iter, Upstream(weight), False, 20)
        return by_mass[0 if side == "rows" else 1][:, -1]

    got = gradient(torch.float32, backend)
    if scale < 1e4:
        assert relative(got, gradient(torch.float64, "reference")) < 1e-2
    else:
        assert not got.any()
