"""Mixed steps of a set with itself in the Triton kernels, in the interpreter against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grids import grid
from torch import Tensor
from triton_problems import (
    DTYPES,
    EPS,
    KINDS,
    REGIMES,
    Given,
    check_reads_what_is_written,
    close,
    problem,
    slack,
    upstream,
    wide,
)

import otloss
from otloss.backends import reference, triton
from otloss.backends.protocol import Problem, Solution, Start

if not triton.interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

F64, TOL, FEW = torch.float64, 1e-5, 8


def same_sets(kind: str, n: int, dtype: torch.dtype, batch: int = 2, offset: float = 0.0) -> Given:
    """Features beside a copy of them, or their cost plus the same constant for each row and column."""
    x, _, a, _ = problem("features", n, n, F64, batch, d=3)
    if kind == "features":
        return x.to(dtype), x.to(dtype), a.to(dtype), a.to(dtype)
    by_point = offset * torch.randn(batch, n, dtype=F64)
    cost = otloss.sqeuclidean_cost(x, x) / 8 + by_point.unsqueeze(-1) + by_point.unsqueeze(-2)
    return ((cost + cost.mT) / 2).to(dtype), None, a.to(dtype), a.clone().to(dtype)


def solve(given: Problem, max_iter: int = 200, tol: float = TOL, g: Tensor | None = None) -> Solution:
    """As ``solver="auto"`` does, with the potentials of the cost as it was given."""
    solution = triton.solve(given, max_iter, tol, accelerate=True, start=Start(None, g))
    f, g = reference.unshifted(solution, given.a, given.b)
    return solution._replace(f=f, g=g, shift=None)


def exact(given: Problem) -> Problem:
    left, right, a, b, rho_a, rho_b = wide(given.left, given.right, given.a, given.b, given.rho_a, given.rho_b)
    assert left is not None and a is not None and b is not None
    return Problem(left, right, a, b, given.eps, rho_a, rho_b, given.kind)


def check_equal_potentials(out: Solution, given: Problem) -> None:
    if given.right is not None:  # to the bit, where nothing was taken out of the cost
        assert torch.equal(out.f[given.a > 0], out.g[given.b > 0])
    size = float(given.left.abs().max()) if given.right is None else 2.0
    assert float((out.f - out.g).abs().max()) <= 16 * torch.finfo(out.f.dtype).eps * max(size, 1.0)


# 33 is more than a block of rows of a medium problem holds, and 70 more than one of a large one.
@pytest.mark.parametrize(
    ("regime", "kind", "dtype", "n", "eps"), grid(REGIMES, KINDS, DTYPES, (2, 33, 70), (0.1, 0.01)), indirect=["regime"]
)
def test_takes_the_sweeps_of_the_reference(regime: str, kind: str, dtype: torch.dtype, n: int, eps: float) -> None:
    if regime == "small" and n > 64:
        n = 64
    given = Problem(*same_sets(kind, n, dtype), eps)
    got, want = solve(given), reference.solve(exact(given), 200, TOL, accelerate=True)
    f, g = reference.unshifted(want, *wide(given.a, given.b))
    assert (got.n_iter <= FEW).all() and (got.n_iter - want.n_iter).abs().max() <= (dtype == torch.float32)
    for one, other in zip(got[:4], (f, g, *want[2:4]), strict=True):
        close(one, other, slack(dtype, eps) + (2 * TOL if dtype == torch.float32 else 0.0))
    assert (got.error < TOL + slack(dtype, eps)).all()
    assert dtype == torch.float32 or torch.allclose(got.error, want.error, rtol=1e-3, atol=1e-12)
    check_equal_potentials(got, given)


@pytest.mark.parametrize(("regime", "dtype", "rho"), grid(REGIMES, DTYPES, (0.2, 5.0, 1e4)), indirect=["regime"])
def test_penalties(regime: str, dtype: torch.dtype, rho: float) -> None:
    """The reference takes plain iterations here; the masses have any total."""
    left, right, a, b = same_sets("features" if regime == "streamed" else "dense", 21, dtype)
    rhos = torch.tensor([rho, 2 * rho], dtype=dtype)
    given = Problem(left, right, 1.5 * a, 1.5 * b, EPS, rhos, rhos.clone())
    got, want = solve(given), reference.solve(exact(given), 5000, 1e-12)
    assert (got.n_iter <= FEW).all() and (got.error < TOL + slack(dtype)).all()
    for one, other in zip(got[2:4], want[2:4], strict=True):
        close(one, other, slack(dtype) + TOL)
    # The error of a marginal at one point is eps times that of its potential there, relative to its mass. The reference
    # nears f = g from both sides, slowly where the penalties are large.
    close(given.a * got.f, exact(given).a * (want.f + want.g) / 2, slack(dtype) + TOL * EPS / 0.1)
    check_equal_potentials(got, given)
    one_sided = given._replace(rho_b=2 * rhos)  # another penalty on either side: not that of a set with itself
    got, want = solve(one_sided, 6), reference.solve(exact(one_sided), 6, TOL)
    assert got.n_iter.tolist() == want.n_iter.tolist()
    close(got.value, want.value, slack(dtype) + 16 * rho * torch.finfo(F64).eps)  # KL times rho, in float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relaxed", [False, True])
def test_other_problems_of_the_batch_take_plain_iterations(regime: str, relaxed: bool, kind: str) -> None:
    """To the bit those without mixed steps. The last feature or the last cost of a set may make the difference."""
    if kind == "dense" and regime == "streamed":
        pytest.skip("a dense cost is never made anew")
    left, right, a, b = same_sets(kind, 18, torch.float32, batch=4)
    other = left if right is None else right
    other[1, -1, -2] *= 1.5
    b[2] = b[2].flip(-1)
    rhos = [None, None] if not relaxed else [torch.ones(4), torch.ones(4)]
    given = Problem(left, right, a, b, 0.5, *rhos)
    got, plain = solve(given, 6), triton.solve(given, 6, TOL)
    f, g = reference.unshifted(plain, a, b)
    for one, two in zip(got[:6], (f, g, *plain[2:6]), strict=True):
        assert torch.equal(one[1:3], two[1:3])
    assert (got.n_iter[[0, 3]] <= FEW).all() and not torch.equal(got.f[0], f[0])


def test_a_cost_that_is_not_that_of_distances(dense_regime: str) -> None:
    """Mixed steps are slow there, and plain iterations go on. Sweeps as in ``test_divergence.py``."""
    _, _, a, b = same_sets("dense", 9, F64)
    cost, offset = torch.rand(2, 9, 9, dtype=F64), 5 * torch.randn(9, dtype=F64)
    for symmetric in (cost, cost + offset + offset.unsqueeze(-1)):
        given = Problem((symmetric + symmetric.mT) / 2, None, a, b, EPS)
        got, plain = solve(given, 300, 1e-9), triton.solve(given, 300, 1e-9)
        assert got.n_iter.sum() <= plain.n_iter.sum() and (plain.error < 1e-9).all() and (got.error < 1e-9).all()
        close(got.value, plain.value, 1e-8)
        check_equal_potentials(got, given)


def test_offsets_and_forbidden_pairs(dense_regime: str) -> None:
    given = Problem(*same_sets("dense", 12, F64, offset=5.0), EPS)
    check_equal_potentials(solve(given), given)
    assert (solve(given).n_iter <= FEW).all()
    cost = given.left.clone()
    cost[:, 2, 5] = cost[:, 5, 2] = torch.inf
    barred = given._replace(left=cost)
    got, want = solve(barred, 100), reference.solve(barred, 1000, 1e-10)
    close(got.value, want.value, 1e-4)
    assert got.f.isfinite().all() and got.transport_cost.isfinite().all()


@pytest.mark.parametrize("relaxed", [False, True])
def test_the_first_and_the_last_sweep(regime: str, relaxed: bool) -> None:
    """``max_iter`` bounds the sweeps, and a start at the solution is seen in the first one."""
    left, right, a, b = same_sets("features" if regime == "streamed" else "dense", 18, F64)
    rhos = [None, None] if not relaxed else [torch.full((2,), 0.5, dtype=F64)] * 2
    given = Problem(left, right, a, b, EPS, *rhos)
    whole = solve(given, 200, 1e-9)
    for most in (0, 1, 2, 3):
        part = solve(given, most, 1e-9)
        assert part.n_iter.tolist() == [most] * 2 and part.value.isfinite().all()
        check_equal_potentials(part, given)
    assert solve(given, 200, TOL, whole.g).n_iter.tolist() == [1, 1]
    far = solve(given, 200, 1e-9, 1e3 * torch.randn(2, 18, dtype=F64))
    assert torch.equal(far.n_iter, whole.n_iter)
    close(far.value, whole.value, 1e-8)


def everything(given: Problem) -> list[Tensor]:
    solution = triton.solve(given, 20, TOL, accelerate=True)
    up = upstream(given.a, given.b)
    gradients, residual = triton.implicit_gradient(given, *solution[:2], up, True, True, shift=solution.shift)
    return [*solution[:6], *gradients, residual]


@pytest.mark.parametrize("relaxed", [False, True])
def test_nothing_is_read_before_it_is_written(regime: str, relaxed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right, a, b = same_sets("features" if regime == "streamed" else "dense", 17, torch.float32)
    rhos = [None, None] if not relaxed else [torch.ones(2)] * 2
    given = Problem(left, right, a, b, EPS, *rhos)
    check_reads_what_is_written(lambda: everything(given), monkeypatch)


@pytest.mark.parametrize("rho", [None, 0.5])
def test_the_divergence(regime: str, rho: float | None) -> None:
    """It is 0 between equal sets, and so is its gradient; between others it is that of the reference."""
    x, _, a, _ = problem("features", 9, 9, F64, d=3)
    x = x / 2
    y = x.clone().requires_grad_()
    options: dict[str, Any] = {"eps": 0.5, "rho_a": rho, "rho_b": rho, "objective": "divergence", "reduction": "none"}
    loss = otloss.FeatureSinkhornLoss("sqeuclidean", tol=1e-6, backend="triton", **options)
    between = loss(x, y, a, a.clone())
    (grad,) = torch.autograd.grad(between.sum(), y)
    assert torch.equal(between, torch.zeros(2, dtype=F64)) and float(grad.abs().max()) < 1e-12
    far = x.flip(1) + 0.3
    true = otloss.FeatureSinkhornLoss("sqeuclidean", tol=1e-10, max_iter=10_000, backend="reference", **options)
    values, grads = [], []
    for each in (loss, true):
        leaf = far.clone().requires_grad_()
        values.append(each(x, leaf, a, a))
        grads.append(torch.autograd.grad(values[-1].sum(), leaf)[0])
    close(values[0], values[1].detach(), 1e-6)
    close(*grads, 1e-4)


def test_plain_is_plain(regime: str) -> None:
    """What is differentiated by its iterations takes no mixed steps."""
    x, _, a, _ = problem("features", 9, 9, F64, d=3)
    options: dict[str, Any] = {"eps": EPS, "max_iter": 12, "tol": 1e-9}
    for more in ({"solver": "plain"}, {"gradient": "unroll"}):
        got, want = (otloss.cosine_sinkhorn(x, x, a, a, backend=k, **options, **more) for k in ("triton", "reference"))
        assert torch.equal(got.n_iter, want.n_iter)
        close(got.value, want.value, 1e-12)
