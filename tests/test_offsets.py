"""A constant of the cost, of its rows or of its columns costs no digits, and ``converged`` is about the plan returned.

In float32, an offset of 1e4 moved the marginals of a plan by 1e-3 while ``converged`` was true with an error of 3e-6.

A cost with an offset p is rounded to a multiple of about u p, so that the float64 problem is made of the rounded cost.
What then remains is rounding as without an offset: u (|f| + |g| + |C|)/eps for an entry of the plan, of sizes below 2
here, and the error that ``tol`` leaves, which the map from marginals to plan enlarges by less than 10 at this eps.
"""

from __future__ import annotations

import pytest
import torch
from conftest import relative
from grids import grid
from torch import Tensor

from otloss import sinkhorn

EPS, TOL = 0.3, 1e-5
PLAN = 10 * TOL + 16 * 2**-24 * 2 / EPS


def offset_cost(kind: str, offset: float, n: int, m: int) -> Tensor:
    shapes = {"all": (1, 1), "rows": (n, 1), "columns": (1, m)}
    return torch.rand(2, n, m) + offset * (1 + torch.rand(2, *shapes[kind]))


@pytest.mark.parametrize(
    ("offset", "kind", "size", "solver"),
    # The sizes are those of the kernels for short rows and for single problems.
    grid((1e2, -1e4, 1e5, -1e6), ("all", "rows", "columns"), ((20, 20), (70, 90)), ("auto", "plain")),
)
def test_an_offset_costs_no_digits(backend: str, offset: float, kind: str, size: tuple[int, int], solver: str) -> None:
    cost = offset_cost(kind, offset, *size).requires_grad_()
    za = torch.randn(2, size[0]).requires_grad_()
    options = {"eps": EPS, "max_iter": 500, "solver": solver}
    out = sinkhorn(cost, log_a=za.log_softmax(-1), tol=TOL, backend=backend, **options)
    leaves = cost.detach().double().requires_grad_(), za.detach().double().requires_grad_()
    want = sinkhorn(leaves[0], log_a=leaves[1].log_softmax(-1), tol=1e-10, backend="reference", **options)
    assert out.converged.all()

    a = za.softmax(-1).double()
    plan = out.plan.double()
    off = (plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - 1 / size[1]).abs().sum(-1)
    # The plan of PyTorch's operations and that of the kernels round apart, by u of every term of an exponent.
    assert ((off - out.marginal_error).abs() < 16 * 2**-24 * 2 / EPS).all()
    assert relative(out.plan, want.plan) < PLAN
    for name in ("transport_cost", "value"):
        got, exact = getattr(out, name), getattr(want, name)
        # The result itself is rounded, and a row's offset times what its mass is off by is part of <T, C>.
        assert ((got - exact).abs() < 2 * 2**-24 * exact.abs() + PLAN + 2 * TOL * abs(offset)).all()
    got = torch.autograd.grad(out.transport_cost.sum(), (cost, za))
    exact = torch.autograd.grad(want.transport_cost.sum(), leaves)
    assert relative(got[0], exact[0]) < PLAN / EPS
    # dL/da holds the offset of the row, known to u of itself.
    assert float((got[1] - exact[1]).abs().max()) < PLAN / EPS + 8 * 2**-24 * abs(offset)
    gauge = (a * out.f).sum(-1) - out.g.mean(-1)
    assert (gauge.abs() < 8 * 2**-24 * (2 * abs(offset) + 2)).all()


@pytest.mark.parametrize("solver", ["auto", "plain"])
def test_converged_is_about_the_plan_returned(backend: str, solver: str) -> None:
    """At eps 5e-4, float32 cannot hold potentials well enough for tol 1e-5; the error is that of the plan."""
    cost = torch.rand(2, 40, 30)
    out = sinkhorn(cost, eps=5e-4, tol=1e-5, max_iter=20_000, solver=solver, backend=backend)
    plan = out.plan.double()
    off = (plan.sum(-1) - 1 / 40).abs().sum(-1) + (plan.sum(-2) - 1 / 30).abs().sum(-1)
    rounding = 16 * 2**-24 / 5e-4
    assert ((off - out.marginal_error).abs() < rounding).all()
    allowance = 4 * 2**-24 * (out.f.abs().mean(-1) + out.g.abs().mean(-1)) / 5e-4
    assert (out.marginal_error[out.converged] < 1e-5 + 2 * allowance[out.converged] + 1e-5).all()


def test_a_problem_that_did_not_run_long_enough_has_not_converged(backend: str) -> None:
    cost = torch.rand(3, 20, 20) + 1e5
    with pytest.warns(UserWarning, match="did not reach tol"):
        out = sinkhorn(cost, eps=0.01, max_iter=3, backend=backend)
    assert not out.converged.any() and (out.marginal_error > 1e-3).all()
