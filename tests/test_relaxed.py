"""Penalties on the marginals (``rho_a``, ``rho_b``): solutions, gradients, and agreement with POT and geomloss."""

from __future__ import annotations

import geomloss
import ot
import pytest
import torch
from torch import Tensor

import otloss

EPS = 0.1
RHOS = [(0.7, 0.4), (0.3, None), (None, 2.0), (20.0, 20.0)]


def _problem(count: int = 2, n: int = 6, m: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n * m)
    cost = 2 * torch.rand(count, n, m, generator=generator, dtype=torch.float64)
    a, b = (0.1 + torch.rand(count, k, generator=generator, dtype=torch.float64) for k in (n, m))
    return cost.to(dtype), a.to(dtype), b.to(dtype)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (torch.special.xlogy(p, p / q) - p + q).flatten(1).sum(-1)


@pytest.mark.parametrize("rho_a, rho_b", RHOS)
def test_the_plan_minimises_the_value(backend: str, rho_a: float | None, rho_b: float | None) -> None:
    cost, a, b = _problem()
    eps = 0.5
    out = otloss.sinkhorn(cost, a, b, eps=eps, rho_a=rho_a, rho_b=rho_b, tol=1e-12, max_iter=5000, backend=backend)
    assert bool(out.converged.all())

    def value(plan: Tensor) -> Tensor:
        total = (plan * cost).sum((-1, -2)) + eps * _kl(plan, a.unsqueeze(-1) * b.unsqueeze(-2))
        for rho, marginal, mass in ((rho_a, plan.sum(-1), a), (rho_b, plan.sum(-2), b)):
            if rho is not None:
                total = total + rho * _kl(marginal, mass)
        return total

    torch.testing.assert_close(out.value, value(out.plan))
    torch.testing.assert_close(out.transport_cost, (out.plan * cost).sum((-1, -2)))
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        change = torch.randn(cost.shape, generator=generator, dtype=cost.dtype).clamp(-1, 1) / 4
        if rho_a is None:  # a constraint stays satisfied
            change = change - change.mean(-1, keepdim=True)
        if rho_b is None:
            change = change - change.mean(-2, keepdim=True)
        assert bool((value(out.plan + out.plan.amin((-1, -2), keepdim=True) * change) > out.value).all())
    for rho, marginal, mass in ((rho_a, out.plan.sum(-1), a), (rho_b, out.plan.sum(-2), b)):
        if rho is None:
            torch.testing.assert_close(marginal, mass)


@pytest.mark.parametrize("rho_a, rho_b", RHOS)
@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_gradients_of_every_output(
    backend: str, rho_a: float | None, rho_b: float | None, shape: tuple[int, int]
) -> None:
    cost, a, b = _problem(2, *shape)
    rhos = [None if rho is None else torch.tensor([rho, 1.5 * rho], dtype=cost.dtype) for rho in (rho_a, rho_b)]
    given = [t.requires_grad_() for t in (cost, a, b, *(rho for rho in rhos if rho is not None))]

    def outputs(cost: Tensor, a: Tensor, b: Tensor, *some: Tensor) -> tuple[Tensor, ...]:
        left = list(some)
        of_a, of_b = (None if rho is None else left.pop(0) for rho in rhos)
        options = {"tol": 1e-13, "max_iter": 5000, "backend": backend}
        out = otloss.sinkhorn(cost, a, b, eps=EPS, rho_a=of_a, rho_b=of_b, **options)
        return out.transport_cost, out.value, out.f, out.g, out.plan

    assert torch.autograd.gradcheck(outputs, given, atol=1e-6, rtol=1e-5, fast_mode=shape != (5, 3))
    if shape == (5, 3) and backend == "reference":
        assert torch.autograd.gradgradcheck(outputs, given, atol=1e-5, rtol=1e-4, fast_mode=True)


def test_features_have_the_gradients_of_their_cost(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, k, 5, generator=generator, dtype=torch.float64).requires_grad_() for k in (6, 4))
    options = {"eps": EPS, "rho_a": 0.5, "rho_b": 1.0, "tol": 1e-12, "max_iter": 5000, "backend": backend}
    a = torch.rand(3, 6, generator=generator, dtype=torch.float64)
    out, dense = otloss.cosine_sinkhorn(x, y, a, **options), otloss.sinkhorn(otloss.cosine_cost(x, y), a, **options)
    for one, other in ((out.transport_cost, dense.transport_cost), (out.value, dense.value)):
        torch.testing.assert_close(one, other)
        pairs = zip(*(torch.autograd.grad(v.sum(), (x, y), retain_graph=True) for v in (one, other)), strict=True)
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs)


def test_large_penalties_are_constraints(backend: str) -> None:
    cost, a, b = _problem()
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    hard = otloss.sinkhorn(cost, a, b, eps=EPS, tol=1e-13, max_iter=5000, backend="reference")
    rho = 1e6
    soft = otloss.sinkhorn(cost, a, b, eps=EPS, rho_a=rho, rho_b=rho, tol=1e-13, max_iter=5000, backend=backend)
    # T1 = a exp(-f / rho), so that the marginals are off by |f| / rho <= 4 / rho.
    torch.testing.assert_close(soft.plan.sum(-1), a, atol=4 / rho, rtol=4 / rho)
    torch.testing.assert_close(soft.plan, hard.plan, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(soft.value, hard.value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rho_a, rho_b", [(0.7, 0.4), (0.5, 0.5), (0.5, float("inf"))])
def test_agrees_with_pot(backend: str, rho_a: float, rho_b: float) -> None:
    cost, a, b = _problem(1, 7, 9)
    if rho_b == float("inf"):
        b = b / b.sum() * a.sum()
    options = {"reg_type": "kl", "stopThr": 1e-15, "numItermax": 10**5}
    plan = ot.unbalanced.sinkhorn_unbalanced(*(t[0].numpy() for t in (a, b, cost)), EPS, (rho_a, rho_b), **options)
    hard = None if rho_b == float("inf") else rho_b
    out = otloss.sinkhorn(cost, a, b, eps=EPS, rho_a=rho_a, rho_b=hard, tol=1e-13, max_iter=5000, backend=backend)
    torch.testing.assert_close(out.plan[0], torch.from_numpy(plan), atol=1e-10, rtol=1e-8)


def test_agrees_with_geomloss() -> None:
    """Its value has no eps m_a m_b, but eps (m_a + m_b) / 2, where m are the totals; its cost is half the square."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(k, 2, generator=generator, dtype=torch.float64) for k in (7, 9))
    a, b = (0.1 + torch.rand(k, generator=generator, dtype=torch.float64) for k in (7, 9))
    blur, reach = 0.3, 0.8
    options = {"p": 2, "blur": blur, "reach": reach, "debias": False, "scaling": 0.999, "backend": "tensorized"}
    loss = geomloss.SamplesLoss("sinkhorn", **options)
    eps, rho = blur**2, reach**2
    cost = otloss.sqeuclidean_cost(x, y) / 2
    out = otloss.sinkhorn(cost, a, b, eps=eps, rho_a=rho, rho_b=rho, tol=1e-13, max_iter=5000)
    theirs = out.value - eps * a.sum() * b.sum() + eps * (a.sum() + b.sum()) / 2
    # Its annealing ends a step short of eps; what that leaves shrinks with 1 - scaling.
    torch.testing.assert_close(theirs, loss(a, x, b, y), atol=1e-4, rtol=0.0)


def test_points_without_mass_take_no_part(backend: str) -> None:
    cost, a, b = _problem(2, 6, 5)
    options = {"eps": EPS, "rho_a": 0.4, "rho_b": 0.6, "tol": 1e-13, "max_iter": 5000, "backend": backend}
    a[:, 2], b[:, 4] = 0, 0
    rows, columns = [0, 1, 3, 4, 5], [0, 1, 2, 3]
    cropped = otloss.sinkhorn(cost[:, rows][..., columns], a[:, rows], b[:, columns], **options)
    cost, a = cost.requires_grad_(), a.requires_grad_()
    out = otloss.sinkhorn(cost, a, b, **options)
    torch.testing.assert_close(out.plan[:, rows][..., columns], cropped.plan)
    torch.testing.assert_close(out.value, cropped.value)
    by_cost, by_a = torch.autograd.grad((out.transport_cost + out.value).sum(), (cost, a))
    assert float(by_cost[:, 2].abs().max()) == 0.0 and float(by_cost[..., 4].abs().max()) == 0.0
    # The derivative by a mass of 0 is one-sided.
    step = 1e-7
    more = a.detach().clone()
    more[:, 2] = step
    moved = otloss.sinkhorn(cost.detach(), more, b, **options)
    slope = (moved.transport_cost + moved.value - out.transport_cost.detach() - out.value.detach()) / step
    torch.testing.assert_close(by_a[:, 2], slope, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("far", [30.0, 1e4, 1e8])
def test_a_point_that_is_too_far_is_left_out(backend: str, far: float) -> None:
    """float32: its share of the mass underflows, and every gradient stays finite."""
    cost, a, b = _problem(2, 6, 5, torch.float32)
    cost[:, 1] += far
    cost, a, b = cost.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    options = {"eps": EPS, "rho_a": 0.5, "rho_b": 0.5, "tol": 1e-6, "max_iter": 2000, "backend": backend}
    out = otloss.sinkhorn(cost, a, b, **options)
    assert float(out.plan[:, 1].detach().sum()) < 1e-6
    (out.transport_cost + out.value).sum().backward()
    for t in (cost, a, b):
        assert t.grad is not None and bool(t.grad.isfinite().all())
    # The mass that is not sent costs rho: d value / d a_i = rho (1 - e^(-f / rho)) + eps (m_b - e^(-f / rho)).
    wanted = 0.5 + EPS * b.detach().sum(-1)
    by_value = torch.autograd.grad(otloss.sinkhorn(cost, a, b, **options).value.sum(), a)[0]
    torch.testing.assert_close(by_value[:, 1], wanted, atol=1e-5, rtol=1e-4)


def test_float32_agrees_with_float64(backend: str) -> None:
    cost, a, b = _problem(8, 30, 20)
    results = []
    for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        leaves = [t.to(dtype).requires_grad_() for t in (cost, a, b)]
        out = otloss.sinkhorn(*leaves, eps=EPS, rho_a=0.5, rho_b=1.0, tol=tol, max_iter=5000, backend=backend)
        grads = torch.autograd.grad((out.transport_cost + out.value).sum(), leaves)
        results.append([t.double() for t in (out.value, out.transport_cost, out.plan, *grads)])
    for exact, single in zip(*results, strict=True):
        # Exponents of size C / eps <= 20 are rounded to 2^-24 of that; the system divides by 1 - 1 / m >= 0.09.
        bound = 20 * 2.0**-24 / 0.09 * 20
        assert float((exact - single).detach().abs().max()) < bound * float(exact.abs().max())


def test_refusals() -> None:
    cost, a, b = _problem()
    with pytest.raises(ValueError, match="rho_a must be positive"):
        otloss.sinkhorn(cost, a, b, rho_a=0.0)
    with pytest.raises(ValueError, match=r"broadcastable.* rho_b \(3,\)"):
        otloss.sinkhorn(cost, a, b, rho_b=torch.ones(3, dtype=cost.dtype))
    with pytest.raises(ValueError, match="gradient 'unroll'"):
        otloss.sinkhorn(cost, a, b, rho_a=1.0, gradient="unroll")
