"""Every output carries its own exact gradient: against finite differences in float64, on every backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import random_problem, relative
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from otloss import cosine_sinkhorn, operators, sinkhorn
from otloss.backends.protocol import Given, Problem
from otloss.gradients import Incoming, State
from otloss.operators import ConvergenceWarning, Options

EXACT = {"eps": 0.2, "tol": 1e-13, "max_iter": 10_000}
OUTPUTS = ("transport_cost", "value", "plan", "f", "g")


def inputs(n: int = 5, m: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """A cost and free logits for both marginals: softmax keeps every perturbation on the simplex."""
    cost, a, b = random_problem(2, n=n, m=m)
    return cost.requires_grad_(), a.log().requires_grad_(), b.log().requires_grad_()


def by_masses(name: str, backend: str, **options: object) -> Callable[..., Tensor]:
    options = EXACT | {"backend": backend} | options
    return lambda cost, za, zb: getattr(sinkhorn(cost, za.softmax(-1), zb.softmax(-1), **options), name)


def by_logs(name: str, backend: str, **options: object) -> Callable[..., Tensor]:
    options = EXACT | {"backend": backend} | options
    return lambda cost, za, zb: getattr(
        sinkhorn(cost, log_a=za.log_softmax(-1), log_b=zb.log_softmax(-1), **options), name
    )


@pytest.mark.parametrize("name", OUTPUTS)
def test_implicit(backend: str, name: str) -> None:
    assert gradcheck(by_masses(name, backend), inputs())
    assert gradcheck(by_logs(name, backend), inputs(), fast_mode=True)  # the same but for how masses are read


@pytest.mark.parametrize("name", OUTPUTS)
def test_implicit_twice(backend: str, name: str) -> None:
    assert gradgradcheck(by_masses(name, backend), inputs(3, 4), atol=1e-4)
    assert gradgradcheck(by_logs(name, backend), inputs(3, 4), atol=1e-4, fast_mode=True)


def test_implicit_thrice(backend: str) -> None:
    cost, za, _ = inputs(2, 3)

    def gradient(cost: Tensor, za: Tensor) -> Tensor:
        loss = sinkhorn(cost, za.softmax(-1), backend=backend, **EXACT).transport_cost.square().sum()
        (grad,) = torch.autograd.grad(loss, cost, create_graph=True)
        return grad.square().sum()

    assert gradgradcheck(gradient, (cost, za), atol=1e-4)


@pytest.mark.parametrize("name", ["transport_cost", "value"])
def test_features_twice(kernel_backend: str, name: str) -> None:
    x, y = torch.randn(2, 3, 5, dtype=torch.double), torch.randn(2, 4, 5, dtype=torch.double)  # the cost is kept
    _, za, _ = inputs(3, 4)

    def loss(x: Tensor, y: Tensor, za: Tensor) -> Tensor:
        return getattr(cosine_sinkhorn(x, y, log_a=za.log_softmax(-1), backend=kernel_backend, **EXACT), name)

    assert gradgradcheck(loss, (x.requires_grad_(), y.requires_grad_(), za), atol=1e-4)


@pytest.mark.parametrize("name", ["transport_cost", "value"])
@pytest.mark.parametrize("n, m", [(5, 70), (70, 20)])
def test_float32_second_derivatives_follow_float64(kernel_backend: str, name: str, n: int, m: int) -> None:
    """Products of a Hessian and a vector, by the cost and by the masses."""
    cost, a, b = random_problem(2, n=n, m=m)
    directions, products = (torch.randn_like(cost), torch.randn_like(a)), []
    for dtype, which in ((torch.float64, "reference"), (torch.float32, kernel_backend)):
        leaves = [t.to(dtype).requires_grad_() for t in (cost, a.log())]
        options = {"eps": 0.2, "max_iter": 5000, "tol": 1e-6, "backend": which}
        out = sinkhorn(leaves[0], log_a=leaves[1].log_softmax(-1), b=b.to(dtype), **options)
        grads = torch.autograd.grad(getattr(out, name).sum(), leaves, create_graph=True)
        product = sum((grad * v.to(dtype)).sum() for grad, v in zip(grads, directions, strict=True))
        products.append(torch.autograd.grad(product, leaves))
    for exact, got in zip(*products, strict=True):
        assert relative(got, exact) < 1e-3


@pytest.mark.parametrize("name", ["transport_cost", "value"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_unroll_differentiates_the_iterations_that_were_run(backend: str, name: str, iterations: int) -> None:
    options = {"gradient": "unroll", "max_iter": iterations, "tol": 0.0}
    assert gradcheck(by_masses(name, backend, **options), inputs())
    if backend == "reference":
        assert gradgradcheck(by_masses(name, backend, **options), inputs(3, 4), atol=1e-4)


def test_unroll_stops_per_problem(backend: str) -> None:
    """Problems of one batch that took different numbers of iterations: as each alone."""
    cost, za, zb = inputs()
    with torch.no_grad():
        cost[1] /= 100  # converges at once
    both = sinkhorn(cost, za.softmax(-1), zb.softmax(-1), eps=0.1, gradient="unroll", backend=backend)
    assert both.n_iter[0] > both.n_iter[1]
    (grad,) = torch.autograd.grad(both.transport_cost.sum(), cost)
    for i in range(2):
        alone = sinkhorn(cost[i], za[i].softmax(-1), zb[i].softmax(-1), eps=0.1, gradient="unroll", backend=backend)
        (expected,) = torch.autograd.grad(alone.transport_cost, cost)
        assert torch.allclose(grad[i], expected[i], atol=1e-14)


@pytest.mark.parametrize("gradient", ["implicit", "unroll"])
def test_features(backend: str, gradient: str) -> None:
    x = torch.randn(2, 5, 3, dtype=torch.double, requires_grad=True)
    y = torch.randn(2, 4, 3, dtype=torch.double, requires_grad=True)
    _, za, zb = inputs()

    def loss(x: Tensor, y: Tensor, za: Tensor, zb: Tensor) -> tuple[Tensor, Tensor]:
        options = EXACT if gradient == "implicit" else {"eps": 0.2, "tol": 0.0, "max_iter": 3}
        out = cosine_sinkhorn(x, y, za.softmax(-1), zb.softmax(-1), gradient=gradient, backend=backend, **options)
        return out.transport_cost, out.value

    assert gradcheck(loss, (x, y, za, zb))


def test_converged_unrolling_tends_to_implicit(backend: str) -> None:
    cost, za, zb = inputs(20, 30)
    implicit, unrolled = (
        torch.autograd.grad(by_masses("transport_cost", backend, gradient=mode)(cost, za, zb).sum(), (cost, za, zb))
        for mode in ("implicit", "unroll")
    )
    for one, other in zip(implicit, unrolled, strict=True):
        assert relative(one, other) < 1e-9


def test_none_takes_the_plan_as_a_constant(backend: str) -> None:
    cost, za, zb = inputs()
    out = sinkhorn(cost, za.softmax(-1), zb.softmax(-1), gradient="none", backend=backend, max_iter=2000)
    grads = torch.autograd.grad(out.transport_cost.sum(), (cost, za, zb), allow_unused=True, retain_graph=True)
    assert torch.allclose(grads[0], out.plan, atol=1e-14)
    assert all(grad is None or not grad.any() for grad in grads[1:])
    assert not any(part.requires_grad for part in (out.value, out.plan, out.f, out.g))
    (grad,) = torch.autograd.grad(out.transport_cost.sum(), cost, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), cost)
    assert not sinkhorn(cost.detach(), za.softmax(-1), gradient="none", backend=backend).transport_cost.requires_grad


def test_unroll_offers_no_gradient_that_it_does_not_have(backend: str) -> None:
    cost, za, zb = inputs()
    out = sinkhorn(cost, za.softmax(-1), zb.softmax(-1), gradient="unroll", backend=backend, max_iter=2000)
    assert out.transport_cost.requires_grad and out.value.requires_grad
    assert not any(part.requires_grad for part in (out.plan, out.f, out.g, out.marginal_error))


def test_any_function_of_the_plan(backend: str) -> None:
    """The plan's gradient agrees with the two losses' own, and with finite differences for a nonlinear function."""
    cost, za, zb = inputs(8, 9)
    options = {**EXACT, "backend": backend}
    out = sinkhorn(cost, za.softmax(-1), zb.softmax(-1), **options)
    direct = torch.autograd.grad(out.transport_cost.sum(), (cost, za, zb), retain_graph=True)
    by_plan = torch.autograd.grad((out.plan * cost).sum(), (cost, za, zb))
    for one, other in zip(direct, by_plan, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    small = inputs(3, 4)
    assert gradcheck(lambda *args: (by_masses("plan", backend)(*args).square() + 1e-3).log().sum(), small)


@pytest.mark.parametrize("name", OUTPUTS)
def test_zero_mass_has_the_one_sided_derivative(backend: str, name: str) -> None:
    """Moving mass t onto an empty row: the gradient at t = 0 is the limit of the difference quotient."""
    cost, a, b = random_problem(n=5, m=4)
    a[2], b[1] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    direction = torch.zeros(5, dtype=torch.double)
    direction[2], direction[0] = 1, -1
    weight = torch.randn((), dtype=torch.double)

    def loss(a: Tensor) -> Tensor:
        out = getattr(sinkhorn(cost, a, b, **EXACT, backend=backend), name)
        return (weight + out).square().sum()

    a.requires_grad_()
    (grad,) = torch.autograd.grad(loss(a), a)
    assert grad.isfinite().all()
    step = 1e-6
    with torch.no_grad():  # second order one-sided quotient
        quotient = (-3 * loss(a) + 4 * loss(a + step * direction) - loss(a + 2 * step * direction)) / (2 * step)
    assert float(grad @ direction) == pytest.approx(float(quotient), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["transport_cost", "value"])
def test_unroll_at_zero_mass_has_the_one_sided_derivative(backend: str, name: str) -> None:
    cost, a, b = random_problem(n=5, m=4)
    a[2], b[1] = 0, 0
    a, b = (a / a.sum()).requires_grad_(), b / b.sum()
    direction = torch.tensor([-1, 0, 1, 0, 0], dtype=torch.double)

    def loss(a: Tensor) -> Tensor:
        out = sinkhorn(cost, a, b, eps=0.2, max_iter=2, tol=0.0, gradient="unroll", backend=backend)
        return getattr(out, name)

    (grad,) = torch.autograd.grad(loss(a), a)
    step = 1e-6
    with torch.no_grad():
        quotient = (-3 * loss(a) + 4 * loss(a + step * direction) - loss(a + 2 * step * direction)) / (2 * step)
    assert float(grad @ direction) == pytest.approx(float(quotient), rel=1e-5, abs=1e-8)


def test_a_gradient_that_is_not_a_number_is_reported() -> None:
    cost, a, b = random_problem(1, n=3, m=4)
    f, g, w = torch.full_like(a, torch.nan), torch.zeros_like(b), torch.ones_like(a[:, 0])
    state = State(f, g, torch.ones(1, dtype=torch.int64), a * 0, b * 0, cost.new_empty(0), a, b)
    incoming, given = Incoming(w, None, None, None, None, None), Given("masses", "masses", 1e-6)
    options = Options(9, 1e-5, True, True, "implicit", "reference")
    with pytest.warns(ConvergenceWarning, match="linear system"):
        operators.gradient(*Problem(cost, None, a, b, 0.1), *state, *incoming, True, *given, *options)


def test_dead_features_get_gradient_zero(backend: str) -> None:
    x = torch.randn(2, 6, 3).relu()
    x[0, 2] = 0
    x[1] = 0
    x.requires_grad_()
    y = torch.randn(2, 5, 3, requires_grad=True)
    out = cosine_sinkhorn(x, y, backend=backend, max_iter=1000)
    (out.transport_cost + out.value).sum().backward()
    assert x.grad is not None and y.grad is not None
    assert not x.grad[0, 2].any() and not x.grad[1].any() and x.grad[0].any()
    assert x.grad.isfinite().all() and y.grad.isfinite().all()


@pytest.mark.parametrize("n, m", [(5, 70), (70, 5), (64, 64), (130, 47)])
def test_float32_gradients_follow_float64(backend: str, n: int, m: int) -> None:
    cost, a, b = random_problem(3, n=n, m=m)
    cost = 2 * cost
    grads = []
    for dtype, which in ((torch.float64, "reference"), (torch.float32, backend)):
        args = [t.to(dtype).requires_grad_() for t in (cost, a.log(), b.log())]
        out = sinkhorn(args[0], args[1].softmax(-1), args[2].softmax(-1), max_iter=5000, tol=1e-6, backend=which)
        grads.append(torch.autograd.grad(out.transport_cost.sum() + out.value.sum(), args))
    for exact, got in zip(*grads, strict=True):
        assert relative(got, exact) < 1e-3


@pytest.mark.parametrize("eps", [1e-3, 5e-3])
def test_gradients_are_finite_at_tiny_eps(backend: str, eps: float) -> None:
    cost, a, b = random_problem(2, n=33, m=40, dtype=torch.float32)
    cost = (2 * cost).requires_grad_()
    za = a.log().requires_grad_()
    out = sinkhorn(cost, za.softmax(-1), b, eps=eps, max_iter=500, tol=0.0, backend=backend)
    for part in (out.transport_cost, out.value, out.plan, out.f, out.g):
        for grad in torch.autograd.grad(part.square().sum(), (cost, za), retain_graph=True):
            assert grad.isfinite().all()


def test_nearly_one_hot_marginals(backend: str) -> None:
    cost = torch.rand(2, 12, 10).requires_grad_()
    za = (40 * torch.randn(2, 12)).requires_grad_()  # masses down to exp(-100)
    out = sinkhorn(cost, log_a=za.log_softmax(-1), backend=backend, max_iter=1000)
    assert out.plan.isfinite().all() and out.f.isfinite().all()
    for grad in torch.autograd.grad((out.transport_cost + out.value).sum() + out.plan.square().sum(), (cost, za)):
        assert grad.isfinite().all()


def test_identical_rows_share_their_gradient(backend: str) -> None:
    """A cluster of equal tokens makes the adjoint system nearly singular; the gradient is still right."""
    cost, a, b = random_problem(n=8, m=6)
    cost[3:] = cost[3]
    a[3:] = a[3]
    a = a / a.sum()
    cost.requires_grad_()
    out = sinkhorn(cost, a, b, **EXACT, backend=backend)
    (grad,) = torch.autograd.grad(out.transport_cost, cost)
    assert torch.allclose(grad[3:], grad[3].expand(5, -1), atol=1e-12)
    assert gradcheck(lambda c: sinkhorn(c, a, b, **EXACT, backend=backend).transport_cost, cost)


def test_second_derivative_of_a_kernels_iterations_raises_with_advice(kernel_backend: str) -> None:
    cost, za, zb = inputs()
    options = {"gradient": "unroll", "backend": kernel_backend, "max_iter": 1000}
    out = sinkhorn(cost, za.softmax(-1), zb.softmax(-1), **options)
    (grad,) = torch.autograd.grad(out.transport_cost.sum(), cost, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference', or take gradient='implicit'"):
        torch.autograd.grad(grad.sum(), za)


@pytest.mark.parametrize("n, m", [(5, 7), (12, 9), (30, 40), (80, 70)])
@pytest.mark.parametrize("scale", [1e-30, 1e-29, 1e-20, 1e20, 1e30])
def test_the_size_of_loss_and_cost_is_free(backend: str, n: int, m: int, scale: float) -> None:
    """In float32, where the squares of such numbers do not exist."""
    cost, _, _ = random_problem(40, n=n, m=m, dtype=torch.float32)

    def gradient(cost: Tensor, eps: float, weight: float) -> Tensor:
        leaf = cost.clone().requires_grad_()
        out = sinkhorn(leaf, eps=eps, tol=1e-6, max_iter=2000, backend=backend)
        return torch.autograd.grad(weight * out.transport_cost.sum(), leaf)[0]

    want = gradient(cost, 0.2, 1.0)
    assert relative(gradient(cost, 0.2, scale) / scale, want) < 1e-5
    assert relative(gradient(scale * cost, scale * 0.2, 1.0), want) < 1e-5


def test_shift_invariance_of_the_gradient(backend: str) -> None:
    """By the marginals, <T, C> changes under C + p ⊕ q exactly by <a, p> + <b, q>, and so does its gradient."""
    cost, za, zb = inputs(7, 6)
    p, q = torch.randn(7, dtype=torch.double), torch.randn(6, dtype=torch.double)

    def grads(c: Tensor) -> tuple[Tensor, ...]:
        out = sinkhorn(c, za.softmax(-1), zb.softmax(-1), **EXACT, backend=backend)
        return torch.autograd.grad(out.transport_cost.sum(), (cost, za, zb))

    plain, shifted = grads(cost), grads(cost + p[:, None] + q)
    a, b = za.detach().softmax(-1), zb.detach().softmax(-1)
    assert torch.allclose(plain[0], shifted[0], atol=1e-10)
    assert torch.allclose(shifted[1] - plain[1], a * (p - (a @ p)[:, None]), atol=1e-10)
    assert torch.allclose(shifted[2] - plain[2], b * (q - (b @ q)[:, None]), atol=1e-10)
