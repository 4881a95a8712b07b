"""Barycentric maps with exact gradients, also at points without mass, and hard matches."""

from __future__ import annotations

import pytest
import torch
from conftest import random_problem, relative
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from otloss import ConvergenceWarning, assign, barycentric, cosine_sinkhorn, sinkhorn

EXACT = {"eps": 0.2, "tol": 1e-13, "max_iter": 10_000}


def inputs(n: int = 5, m: int = 4, k: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A cost, free logits for both marginals, and points."""
    cost, a, b = random_problem(2, n=n, m=m)
    y = torch.randn(2, m, k, dtype=torch.double)
    return cost.requires_grad_(), a.log().requires_grad_(), b.log().requires_grad_(), y.requires_grad_()


def test_is_the_mean_of_each_row(backend: str) -> None:
    cost, a, b = random_problem(2, 3, n=6, m=5)
    out = sinkhorn(cost, a, b, **EXACT, backend=backend)
    y = torch.randn(2, 3, 5, 4, dtype=torch.double)
    rounding = 2**-53 * 64 / EXACT["eps"]
    assert barycentric(out, y).shape == (2, 3, 6, 4)
    assert torch.allclose(barycentric(out, y), out.plan @ y / out.plan.sum(-1, keepdim=True), atol=rounding)
    assert torch.allclose(barycentric(out, y[0, 0]), barycentric(out, y[:1, :1].expand(y.shape)), atol=rounding)
    with pytest.warns(ConvergenceWarning):
        rough = sinkhorn(cost, a, b, eps=0.02, max_iter=1, backend=backend)
    realised = rough.plan @ y / rough.plan.sum(-1, keepdim=True)
    assert torch.allclose(barycentric(rough, y), realised, atol=2**-53 * 64 / 0.02)


def test_gradient(backend: str) -> None:
    def function(cost: Tensor, za: Tensor, zb: Tensor, y: Tensor) -> Tensor:
        return barycentric(sinkhorn(cost, za.softmax(-1), log_b=zb.log_softmax(-1), **EXACT, backend=backend), y)

    assert gradcheck(function, inputs())
    if backend == "reference":
        assert gradgradcheck(function, inputs(3, 2, 1), atol=1e-4)


def test_gradient_by_features_that_are_also_mapped(backend: str) -> None:
    x, y = (torch.randn(n, 3, dtype=torch.double, requires_grad=True) for n in (5, 4))

    def function(x: Tensor, y: Tensor) -> Tensor:
        return barycentric(cosine_sinkhorn(x, y, **EXACT, backend=backend), y)

    assert gradcheck(function, (x, y))


def test_points_without_mass_have_the_limit_and_the_one_sided_derivative(backend: str) -> None:
    """Mass t on an empty row or column: value and gradient at t = 0 are the limits of those at t > 0."""
    cost, a, b = random_problem(n=5, m=4)
    y, weight = torch.randn(4, 2, dtype=torch.double), torch.randn(5, 2, dtype=torch.double)
    a[2], b[1] = 0, 0
    a, b = (a / a.sum()).requires_grad_(), (b / b.sum()).requires_grad_()

    def mapped(a: Tensor, b: Tensor) -> Tensor:
        return barycentric(sinkhorn(cost, a, b, **EXACT, backend=backend), y)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return (weight * mapped(a, b)).sum()

    step = 1e-6
    to_row, to_column = torch.tensor([-1.0, 0, 1, 0, 0]).double(), torch.tensor([-1.0, 1, 0, 0]).double()
    with torch.no_grad():
        assert (mapped(a, b) - mapped(a + 1e-9 * to_row, b)).abs().max() < 1e-6
    grads = torch.autograd.grad(loss(a, b), (a, b))
    for grad, line, move in (
        (grads[0], to_row, lambda t: (a + t * to_row, b)),
        (grads[1], to_column, lambda t: (a, b + t * to_column)),
    ):
        with torch.no_grad():
            quotient = (-3 * loss(a, b) + 4 * loss(*move(step)) - loss(*move(2 * step))) / (2 * step)
        assert float(grad @ line) == pytest.approx(float(quotient), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_whose_plan_underflows(backend: str, dtype: torch.dtype) -> None:
    """A row without mass that is far from everything, beside problems as in use: nearest point, no NaN."""
    x = torch.tensor([0.0, 1.0, 2.0, 500.0, -300.0], dtype=dtype)
    y = torch.tensor([0.1, 1.1, 1.9], dtype=dtype)
    a = torch.tensor([0.3, 0.3, 0.4, 0.0, 0.0], dtype=dtype, requires_grad=True)
    b = torch.tensor([0.5, 0.3, 0.2], dtype=dtype, requires_grad=True)
    cost = (x[:, None] - y).square().requires_grad_()
    out = sinkhorn(cost, a, b, eps=0.05, tol=1e-4, backend=backend)
    mapped = barycentric(out, y[:, None])
    assert torch.allclose(mapped[3:, 0], torch.tensor([1.9, 0.1], dtype=dtype))
    grads = torch.autograd.grad(mapped.square().sum(), (cost, a, b))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("scale", [1e6, 1e12, 1e30])
def test_huge_costs_without_mass(backend: str, scale: float) -> None:
    """Points that a mask left out, with any cost: the others' map and gradients are those without them."""
    cost, a, b = random_problem(n=7, m=6, dtype=torch.float32)
    cost[-2:], cost[:, -2:] = (scale * (1 + 0.1 * torch.rand(shape)) for shape in ((2, 6), (7, 2)))
    a[-2:], b[-2:] = 0, 0
    a, b, y = a / a.sum(), b / b.sum(), torch.randn(6, 2)

    def results(*given: Tensor) -> tuple[Tensor, ...]:
        cost, a, b, y = (t.clone().requires_grad_() for t in given)
        mapped = barycentric(sinkhorn(cost, a, b, eps=0.2, tol=1e-6, backend=backend), y)
        loss = mapped[:5].square().sum()
        return mapped.detach(), *torch.autograd.grad(loss, (cost, a, b, y))

    got, want = results(cost, a, b, y), results(cost[:-2, :-2], a[:-2], b[:-2], y[:-2])
    assert all(part.isfinite().all() for part in got)
    live = (slice(5), slice(4))
    for mine, other in zip((got[0][:5], got[1][live], got[2][:5], got[3][:4], got[4][:4]), want, strict=True):
        assert relative(mine, other) < 1e-4


def test_forbidden_pairs(backend: str) -> None:
    """Rows with and without mass that may not go to some columns: they go to the others."""
    cost = torch.zeros(4, 4).masked_fill(torch.eye(4, dtype=torch.bool).flip(0), torch.finfo(torch.float32).max)
    a = torch.tensor([0.3, 0.3, 0.4, 0.0]).requires_grad_()
    mapped = barycentric(sinkhorn(cost.requires_grad_(), a, backend=backend), torch.eye(4))
    assert not (mapped * torch.eye(4).flip(0)).any() and torch.allclose(mapped.sum(-1), torch.ones(4))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(mapped.square().sum(), (cost, a)))


@pytest.mark.parametrize("n, m", [(9, 70), (70, 9)])
def test_float32_follows_float64(backend: str, n: int, m: int) -> None:
    """An entry of the plan is known to u (|f| + |g| + |C|)/eps and 10 tol, a gradient to 1/eps times that."""
    eps, tol = 0.3, 1e-6
    data = inputs(n, m)
    found = []
    for dtype, which in ((torch.float64, "reference"), (torch.float32, backend)):
        args = [t.detach().to(dtype).requires_grad_() for t in data]
        out = sinkhorn(args[0], args[1].softmax(-1), args[2].softmax(-1), eps=eps, tol=tol, backend=which)
        mapped = barycentric(out, args[3])
        found.append((mapped.detach(), *torch.autograd.grad(mapped.square().sum(), args)))
    known = 10 * tol + 16 * 2**-24 * 2 / eps
    assert relative(found[1][0], found[0][0]) < known
    assert all(relative(got, want) < known / eps for got, want in zip(found[1][1:], found[0][1:], strict=True))


@pytest.mark.parametrize("gradient", ["unroll", "none"])
def test_the_plan_is_a_constant_in_other_modes(backend: str, gradient: str) -> None:
    cost, za, _, y = inputs()
    out = sinkhorn(cost, za.softmax(-1), gradient=gradient, max_iter=2000, backend=backend)
    assert not barycentric(out, y.detach()).requires_grad
    weight = torch.randn(2, 5, 3, dtype=torch.double)
    (by_y,) = torch.autograd.grad((weight * barycentric(out, y)).sum(), y)
    share = out.plan / out.plan.sum(-1, keepdim=True)
    assert torch.allclose(by_y, share.mT @ weight, atol=1e-10)


def test_under_transforms() -> None:
    cost, y = torch.rand(3, 5, 4), torch.randn(3, 4, 2)

    def loss(cost: Tensor, y: Tensor) -> Tensor:
        return barycentric(sinkhorn(cost, eps=0.1), y).square().sum()

    want = torch.func.grad(loss, argnums=(0, 1))(cost, y)
    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(cost, y)
    assert all(relative(one, other) < 1e-5 for one, other in zip(each, want, strict=True))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert abs(float(compiled(cost, y) / loss(cost, y)) - 1) < 1e-5


def test_under_autocast_and_in_half_precision() -> None:
    cost, y = torch.rand(5, 4), torch.randn(4, 2)
    out = sinkhorn(cost)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(barycentric(sinkhorn(cost), y), barycentric(out, y))
    assert barycentric(out, y.half()).dtype == torch.float32


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (torch.rand(2, 5, 3), ValueError, r"y must have shape \(2, 4, k\) or \(4, k\), got \(2, 5, 3\)"),
        (torch.rand(3, 4, 3), ValueError, r"y must have shape \(2, 4, k\)"),
        (torch.rand(4), ValueError, "y must have shape"),
        (torch.rand(4, 3).double(), TypeError, "float64 does not mix"),
        ([[1.0]], TypeError, "y must be a tensor"),
    ],
)
def test_bad_points_are_named(y: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        barycentric(sinkhorn(torch.rand(2, 3, 4)), y)


def test_a_permutation_is_assigned(backend: str) -> None:
    order = torch.stack([torch.randperm(9) for _ in range(3)])
    cost = 1 - torch.nn.functional.one_hot(order, 9).float() + 0.1 * torch.rand(3, 9, 9)
    out = sinkhorn(cost.requires_grad_(), eps=0.01, backend=backend)
    for mutual in (False, True):
        index = assign(out, mutual=mutual)
        assert index.dtype == torch.int64 and torch.equal(index, order)
    assert assign(sinkhorn(cost[None, 0], backend=backend)).shape == (1, 9)


def test_assignment_is_by_definition(backend: str) -> None:
    cost, a, b = random_problem(4, n=7, m=5)
    a[:, 2], b[:, 3] = 0, 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    out = sinkhorn(cost, a, b, backend=backend)
    plain, mutual = assign(out), assign(out, mutual=True)
    for k in range(4):
        for i in range(7):
            row = out.plan[k, i]
            best = -1 if i == 2 else int(row.argmax())
            assert int(plain[k, i]) == best
            kept = best >= 0 and int(out.plan[k, :, best].argmax()) == i
            assert int(mutual[k, i]) == (best if kept else -1)
    assert (mutual == -1).any() and (mutual >= 0).any() and not (plain == 3).any()
