"""Forbidden pairs and warm starts in the Triton kernels, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from triton_problems import (
    DTYPES,
    EPS,
    KINDS,
    Given,
    check_implicit,
    check_solve,
    check_unrolled,
    close,
    problem,
    slack,
)

import otloss
from otloss.backends import reference, triton
from otloss.backends.protocol import Problem, Start

if not triton.interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)


@pytest.mark.parametrize("rho", [None, 0.3, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_start_is_taken_or_left_aside(regime: str, kind: str, rho: float | None) -> None:
    if kind == "dense" and regime == "streamed":
        pytest.skip("a dense cost is never made anew")
    rhos = (None, None) if rho is None else (torch.tensor([rho, 2 * rho], dtype=torch.float64), None)
    given = Problem(*problem(kind, 9, 6, torch.float64), EPS, *rhos)
    cold = triton.solve(given, 100, 1e-5)
    dead = given.b == 0
    _, solved = reference.unshifted(cold, given.a, given.b)
    assert dead.any() and int(cold.n_iter.min()) > 3
    for g, most in ((solved, 2), (1e3 * torch.randn(2, 6, dtype=torch.float64), 100)):
        warm = triton.solve(given, 100, 1e-5, start=Start(None, g.masked_fill(dead, torch.nan)))
        assert (warm.error < 2e-5).all() and (warm.n_iter <= most).all()
        assert most == 2 or torch.equal(warm.n_iter, cold.n_iter)
        close(warm.value, cold.value, 1e-4)


@pytest.mark.parametrize("rhos", [(0.5, 0.5), (None, 3.0), (1e3, 1e4)])
def test_a_start_under_penalties(regime: str, rhos: tuple[float | None, float | None]) -> None:
    """In float32. A start near the solution saves sweeps; the solution and its gradients are those of a cold one."""
    x, y, a, b = problem("features", 9, 21, torch.float32)
    options = {"eps": 0.5, "rho_a": rhos[0], "rho_b": rhos[1], "max_iter": 100, "backend": "triton"}
    before = otloss.cosine_sinkhorn(x, y, a, b, **options)
    near = (x + 1e-4 * torch.randn_like(x)).requires_grad_()
    init = before.f, before.g.masked_fill(b == 0, 1e30)
    cold, warm = (otloss.cosine_sinkhorn(near, y, a, b, **options, init=each) for each in (None, init))
    assert (warm.n_iter < cold.n_iter).all() and warm.converged.all() and cold.converged.all()
    room = slack(torch.float32, 0.5, 300.0) + 2e-5  # tol moves the plan by 1e-5, its gradient by 1 / eps times that
    close(warm.value.detach(), cold.value.detach(), room)
    grads = [torch.autograd.grad(out.value.sum() + out.plan.square().sum(), near)[0] for out in (cold, warm)]
    close(*grads, room / 0.5)


def forbidden_problem(n: int, m: int, dtype: torch.dtype) -> Given:
    """Pairs that are forbidden in a third of the places; a row and a column without mass that are forbidden to all."""
    cost, *_ = problem("dense", n, m, torch.float64, masked=False)
    barred = torch.rand(2, n, m) < 0.3
    barred[:, 0] = barred[..., 0] = False
    shares = torch.where(barred, 0.0, 0.1 + torch.rand(2, n, m, dtype=torch.float64))
    shares[:, 3] = shares[..., 4] = 0
    barred[:, 3] = barred[..., 4] = True
    shares = shares / shares.sum((-1, -2), keepdim=True)
    return cost.masked_fill(barred, torch.inf).to(dtype), None, shares.sum(-1).to(dtype), shares.sum(-2).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forbidden_pairs(dense_regime: str, dtype: torch.dtype) -> None:
    given = forbidden_problem(9, 12, dtype)
    check_solve(given, EPS, 4)
    check_implicit(given, lost=(3, 4))
    check_unrolled(given, [2, 4])
    out = otloss.sinkhorn(given[0].requires_grad_(), *given[2:], eps=EPS, backend="triton", max_iter=20, tol=0.0)
    (grad,) = torch.autograd.grad(out.value.sum() + out.plan.square().sum(), given[0])
    assert not out.plan[given[0] == torch.inf].any() and not grad[given[0] == torch.inf].any() and grad.isfinite().all()


def test_mass_that_has_nowhere_to_go_is_named(dense_regime: str) -> None:
    cost = torch.rand(2, 5, 6)
    cost[1, 3] = torch.inf
    with pytest.raises(ValueError, match="row 3 of problem 1 is forbidden"):
        otloss.sinkhorn(cost, backend="triton", max_iter=3)
    with pytest.raises(ValueError, match="column 3 of problem 1 is forbidden"):
        otloss.sinkhorn(cost.mT, backend="triton", max_iter=3)
