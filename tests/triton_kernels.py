"""The Triton kernels in Triton's interpreter, against the reference in float64; run by ``test_triton.py``."""

from __future__ import annotations

import pytest
import torch
from conftest import relative
from grids import grid
from torch import Tensor
from triton_problems import (
    DTYPES,
    EPS,
    KINDS,
    REGIMES,
    SIZES,
    check_implicit,
    check_solve,
    check_unrolled,
    close,
    problem,
    upstream,
)

import otloss
from otloss.backends import reference, triton
from otloss.backends.protocol import Problem

if not triton.interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

CASES = pytest.mark.parametrize(
    ("n", "m", "kind", "dtype"), [(*size, kind, dtype) for size, kind, dtype in grid(SIZES, KINDS, DTYPES)]
)


@CASES
def test_solve(regime: str, kind: str, n: int, m: int, dtype: torch.dtype) -> None:
    check_solve(problem(kind, n, m, dtype), EPS, 4)


@CASES
def test_implicit_gradient(regime: str, kind: str, n: int, m: int, dtype: torch.dtype) -> None:
    check_implicit(problem(kind, n, m, dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_as_a_constant(kind: str) -> None:
    check_implicit(problem(kind, 21, 38, torch.float32), adjoint=False)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_masses_alone(regime: str, kind: str) -> None:
    given = Problem(*problem(kind, 12, 9, torch.float64), EPS)
    f, g, *_, shift = triton.solve(given, 6, 0.0)
    up = upstream(given.a, given.b)
    whole, part = (triton.implicit_gradient(given, f, g, up, True, need, shift=shift)[0] for need in (True, False))
    assert part[0].numel() == part[1].numel() == 0
    assert torch.equal(whole[2], part[2]) and torch.equal(whole[3], part[3])


@CASES
def test_unrolled_gradient(kind: str, n: int, m: int, dtype: torch.dtype) -> None:
    check_unrolled(problem(kind, n, m, dtype), [2, 4])


@pytest.mark.parametrize(("regime", "iterations", "dtype"), grid(REGIMES, (1, 3, 30), DTYPES), indirect=["regime"])
def test_small_eps(regime: str, iterations: int, dtype: torch.dtype) -> None:
    a, b = (torch.randn(2, k, dtype=torch.float64).softmax(-1) for k in (20, 23))  # of total 1 in float64 too
    cost, a[:, 4] = 2 * torch.rand(2, 20, 23), 0
    a = a / a.sum(-1, keepdim=True)
    check_solve((cost.to(dtype), None, a.to(dtype), b.to(dtype)), 1e-3, iterations)


@pytest.mark.parametrize("kind", ["wide", "one-hot", "far columns"])
def test_hard_problems(regime: str, kind: str) -> None:
    cost, a, b = torch.rand(1, 12, 18), torch.randn(1, 12), torch.randn(1, 18)
    if kind == "wide":
        cost = 200 * cost - 100
    elif kind == "one-hot":
        a, b = 15 * a, 15 * b
    else:
        cost[..., ::3] += 100
    size = float(cost.abs().max())
    check_solve((cost, None, a.softmax(-1), b.softmax(-1)), EPS, 10, room=16.0 * max(1.0, size / 2))


def test_stops_as_the_reference_does(regime: str) -> None:
    left, right, a, b = problem("features", 21, 14, torch.float64, batch=3, masked=False)
    a = (a.log() * torch.tensor([[0.1], [1.0], [3.0]], dtype=torch.float64)).softmax(-1)
    got, want = (backend.solve(Problem(left, right, a, b, EPS), 25, 1e-3) for backend in (triton, reference))
    assert got[4].tolist() == want[4].tolist() and len(set(got[4].tolist())) > 1
    assert relative(got[5], want[5]) < 1e-6
    for one, other in zip(got[:4], want[:4], strict=True):
        close(one, other, 1e-12)


@pytest.mark.parametrize(("n", "m"), [(64, 60), (150, 300), (1040, 33)])
def test_sizes_that_reach_each_regime(n: int, m: int) -> None:
    given = problem("features", n, m, torch.float32, batch=1, d=20)
    check_solve(given, EPS, 2)
    check_implicit(given)
    check_unrolled(problem("dense", n, m, torch.float32, batch=1, d=20), [1])


@pytest.mark.parametrize("gradient", ["implicit", "unroll", "none"])
def test_the_verb(regime: str, gradient: str) -> None:
    """Through operators and autograd: every output that a mode differentiates."""
    x, y = torch.randn(2, 7, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    za, zb = torch.randn(2, 7, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, y, za, zb)]

    def loss(backend: str) -> Tensor:
        # The implicit gradient is defined by the converged problem, the others by the iterations that are run.
        iterations = 25 if gradient == "implicit" else 6
        options = {"eps": 0.5, "max_iter": iterations, "tol": 0.0, "gradient": gradient, "backend": backend}
        out = otloss.cosine_sinkhorn(x, y, log_a=za.log_softmax(-1), log_b=zb.log_softmax(-1), **options)
        total = out.transport_cost.sum()
        if gradient != "none":
            total = total + 2 * out.value.sum()
        return total + (out.plan.square().sum() + out.f[:, 0].sum() if gradient == "implicit" else 0)

    one, other = (torch.autograd.grad(loss(backend), leaves, allow_unused=True) for backend in ("triton", "reference"))
    for got, want in zip(one, other, strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.allclose(got, want, atol=1e-9)
