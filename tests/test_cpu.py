"""The C++ kernels against a float64 log-domain oracle, finite differences and the reference, across block and vector
boundaries.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cpu_problems import (
    DTYPES,
    EPS,
    SIZES,
    close,
    cosine,
    features,
    gradient,
    needs_cpu,
    oracle,
    outputs,
    slack,
    upstream,
    wide,
)
from grids import grid
from torch import Tensor

from otloss.backends import cpu, reference
from otloss.backends.protocol import Problem, Upstream

pytestmark = needs_cpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_solve_runs_the_iterations_of_the_oracle(n: int, m: int, dtype: torch.dtype) -> None:
    x, y, a, b = features(n, m, dtype)
    want = oracle(cosine(x, y), a, b, EPS, 6)
    for left, right in ((x, y), (cosine(x, y).to(dtype), None)):
        solution = cpu.solve(Problem(left, right, a, b, EPS), 6, 0.0)
        for g, w in zip(outputs(solution, a, b), want, strict=True):
            close(g, w, slack(dtype))
        assert solution.n_iter.tolist() == [6, 6]
        f, g = want[:2]
        plan = np.exp((f[:, :, None] + g[:, None] - np.asarray(cosine(x, y))) / EPS) * np.asarray(a.double())[..., None]
        rows = (plan * np.asarray(b.double())[:, None]).sum(2)
        assert np.allclose(solution.error, np.abs(rows - np.asarray(a.double())).sum(1), rtol=1e-2, atol=slack(dtype))


@pytest.mark.parametrize(
    ("size", "adjoint", "potentials", "dtype"),
    grid(SIZES, (True, False), (True, False), DTYPES),  # without a loss on potentials, short rows take another kernel
)
def test_implicit_gradient_is_that_of_the_reference(
    size: tuple[int, int], adjoint: bool, potentials: bool, dtype: torch.dtype
) -> None:
    n, m = size
    x, y, a, b = features(n, m, dtype)
    double = Problem(x.double(), y.double(), a.double(), b.double(), EPS)
    f, g = (t.to(dtype) for t in cpu.solve(double, 2000, 1e-13)[:2])
    up = upstream(a, b) if potentials else Upstream(*upstream(a, b)[:2])
    for left, right in ((x, y), (cosine(x, y).to(dtype), None)):
        problem = Problem(left, right, a, b, EPS)
        exact = Upstream(*wide(*up))
        want, _ = reference.implicit_gradient(Problem(*wide(*problem[:4]), EPS), *wide(f, g), exact, adjoint, True)
        got, residual = cpu.implicit_gradient(problem, f, g, up, adjoint, True)
        # The system's own condition, 1/(1 - sigma^2), multiplies the error of the right-hand side.
        for k, (p, q) in enumerate(zip(got, want, strict=True)):
            if k in (2, 3):  # the marginals' gradients up to a constant: the gauge of U and V is free
                p, q = p - p.mean(-1, keepdim=True), q - q.mean(-1, keepdim=True)
            close(p, q, slack(dtype, room=300.0))
        assert (residual < (1e-5 if dtype == torch.float32 else 1e-10)).all()
        without, _ = cpu.implicit_gradient(problem, f, g, up, adjoint, False)
        assert without.left.numel() == without.right.numel() == 0
        assert torch.equal(without.a, got.a) and torch.equal(without.b, got.b)


# Dimensions of features around the vectors (2 to 16 numbers) and the panels of two, with few and many left over; sizes
# that are contracted in one chunk, in several chunks of rows, columns and depth, and in parts that threads share.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "m", "d"),
    [
        *((11, 13, d) for d in (1, 2, 3, 4, 7, 8, 9, 12, 15, 16, 17, 18, 20, 24, 31, 32, 33, 36, 47, 65)),
        *((n, 50, 37) for n in (48, 49, 50, 51, 52, 53, 54, 55)),
        *((70, 49 + k, 40) for k in range(16)),
        *((530, 300, d) for d in (3, 17, 20, 40, 49)),
        (130, 600, 36),
        (1030, 1100, 21),
    ],
)
def test_gradients_by_features_of_any_dimension(n: int, m: int, d: int, dtype: torch.dtype) -> None:
    x, y, a, b = features(n, m, dtype, 1, d)
    x[0, n // 2] = 0  # a dead channel
    f, g = torch.rand_like(a) * 0.1, torch.rand_like(b) * 0.1
    up = Upstream(None, torch.full_like(a[:, 0], n))  # the gradients by unit rows are then of size 1
    double = Problem(*wide(x, y, a, b), EPS)
    want, _ = reference.implicit_gradient(double, *wide(f, g), Upstream(*wide(*up)), False, True)
    got, _ = cpu.implicit_gradient(Problem(x, y, a, b, EPS), f, g, up, False, True)
    assert (got.left[0, n // 2] == 0).all()
    for p, q, features_of in zip(got[:2], want[:2], (x, y), strict=True):
        length = features_of.double().norm(dim=-1, keepdim=True)
        close(p * length, q * length, slack(dtype))


def tangents(cost: Tensor, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """One direction in the cost and one mass-preserving direction in each marginal."""
    da, db = torch.randn_like(a) * a, torch.randn_like(b) * b
    da, db = da - a * da.sum(-1, keepdim=True), db - b * db.sum(-1, keepdim=True)
    zero = torch.zeros_like
    return [(torch.randn_like(cost), zero(a), zero(b)), (zero(cost), da, zero(b)), (zero(cost), zero(a), db)]


@pytest.mark.parametrize("eps", [0.05, 1.0])
def test_implicit_gradient_against_finite_differences(eps: float) -> None:
    x, y, a, b = features(6, 9, torch.float64)
    cost, (w, v, p, q) = cosine(x, y), upstream(a, b)

    def loss(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        f, g, sharp, value = outputs(cpu.solve(Problem(cost, None, a, b, eps), 20000, 1e-14), a, b)
        return (w * sharp + v * value + (p * f).sum(-1) + (q * g).sum(-1)).sum()

    problem = Problem(cost, None, a, b, eps)
    grads, _ = gradient(problem, cpu.solve(problem, 20000, 1e-14), Upstream(w, v, p, q), True, True)
    step = 1e-5
    for tangent in tangents(cost, a, b):
        ahead, behind = (
            loss(*(z + s * dz for z, dz in zip((cost, a, b), tangent, strict=True))) for s in (step, -step)
        )
        slope = sum((grads[k] * dz).sum() for k, dz in zip((0, 2, 3), tangent, strict=True))
        # Third derivatives grow as 1/eps^3: a central difference is right to step^2 / eps^3.
        assert float(slope) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-5, abs=10 * step**2 / eps**3)


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_unrolled_gradient_against_finite_differences(iterations: int) -> None:
    x, y, a, b = features(6, 9, torch.float64)
    cost, (w, v, *_) = cosine(x, y), upstream(a, b)

    def loss(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        sharp, value = cpu.solve(Problem(cost, None, a, b, EPS), iterations, 0.0)[2:4]
        return (w * sharp + v * value).sum()

    counts = torch.full((2,), iterations)
    grads = cpu.unrolled_gradient(Problem(cost, None, a, b, EPS), counts, Upstream(w, v), True, iterations)
    step = 1e-5
    for tangent in tangents(cost, a, b):
        ahead, behind = (
            loss(*(z + s * dz for z, dz in zip((cost, a, b), tangent, strict=True))) for s in (step, -step)
        )
        slope = sum((grads[k] * dz).sum() for k, dz in zip((0, 2, 3), tangent, strict=True))
        assert float(slope) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-5, abs=10 * step**2 / EPS**3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_unrolled_gradient_is_that_of_the_reference(n: int, m: int, dtype: torch.dtype) -> None:
    x, y, a, b = features(n, m, dtype)
    w, v, *_ = upstream(a, b)
    counts = torch.tensor([3, 8])
    for left, right in ((x, y), (cosine(x, y).to(dtype), None)):
        double = Problem(*wide(left, right, a, b), EPS)
        want = reference.unrolled_gradient(double, counts, Upstream(w.double(), v.double()), True, 8)
        got = cpu.unrolled_gradient(Problem(left, right, a, b, EPS), counts, Upstream(w, v), True, 8)
        for p, q in zip(got, want, strict=True):
            close(p, q, slack(dtype, room=100.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_stops_at_the_first_iteration_below_tol(dtype: torch.dtype) -> None:
    x, y, a, b = features(21, 14, dtype, batch=6)
    a = (a.log() * torch.arange(1, 7, dtype=dtype)[:, None]).softmax(-1)
    tol = 1e-3
    n_iter, error = cpu.solve(Problem(x, y, a, b, EPS), 500, tol)[4:6]
    assert len(set(n_iter.tolist())) > 1 and (error < tol).all() and (n_iter < 500).all()
    for k, count in enumerate(n_iter.tolist()):
        one = Problem(*(t[k : k + 1] for t in (x, y, a, b)), EPS)
        assert float(cpu.solve(one, count, 0.0).error) == pytest.approx(float(error[k]), rel=0.01)
        assert count == 1 or float(cpu.solve(one, count - 1, 0.0).error) >= tol
