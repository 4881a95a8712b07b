"""The Sinkhorn divergence, and the problem of a set with itself: 0 where it has to be, and never below."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import random_problem
from torch import Tensor

import otloss
from otloss.backends import cpu
from otloss.backends.protocol import Problem

F64 = torch.float64
SIZES = [5, 49, 70]  # of the cpu backend: two of lanes, one of the kernel for single problems
RHO = pytest.mark.parametrize("rho", [None, 0.5])


def sets(count: int, n: int, dtype: torch.dtype = torch.float32, d: int = 3) -> tuple[Tensor, Tensor]:
    """Points and masses that are not uniform."""
    x, a = torch.randn(count, n, d, dtype=F64), torch.randn(count, n, dtype=F64).softmax(-1)
    return x.to(dtype), a.to(dtype)


def losses(backend: str, rho: float | None, **options: Any) -> list[Any]:
    """Of features x, y and their masses: cosine and squared distance from features, and the latter as a dense cost."""
    if rho is not None:
        backend = "reference"
    shared = {"objective": "divergence", "reduction": "none", "backend": backend, "rho_a": rho, "rho_b": rho, **options}
    cost, dense = otloss.sqeuclidean_cost, otloss.SinkhornLoss(**shared)
    return [
        otloss.CosineSinkhornLoss(**shared),
        otloss.FeatureSinkhornLoss("sqeuclidean", **shared),
        lambda x, y, a, b: dense(cost(x, y), a, b, cost_xx=cost(x, x), cost_yy=cost(y, y)),
    ]


def gap(cost: Tensor, a: Tensor, b: Tensor, eps: float, tol: float) -> Tensor:
    """How far the dual is from the optimum at most, to second order, where the L1 error of the marginals is tol.

    It is eps <r, (1 - S)^-1 r>_a / 2 of the rows' relative errors r, and <a, r^2> <= tol^2 / min a. The eigenvalues
    of S are the squares of the singular values of T_ij / sqrt(a_i b_j).
    """
    cost, a, b = cost.double(), a.double(), b.double()
    plan = otloss.sinkhorn(cost, a, b, eps=eps, tol=1e-9, max_iter=20_000).plan
    second = torch.linalg.svdvals(plan / (a.unsqueeze(-1) * b.unsqueeze(-2)).sqrt())[:, 1]
    return 0.5 * eps * tol**2 / (a.amin(-1) * (1 - second**2).clamp(min=1e-9))


def assert_equal_potentials(out: otloss.SinkhornOutput, backend: str) -> None:
    """Bit for bit, but for PyTorch's sums."""
    assert torch.equal(out.f, out.g) or backend == "reference"
    torch.testing.assert_close(out.f, out.g, rtol=0, atol=16 * torch.finfo(out.f.dtype).eps)


@RHO
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("solver", ["auto", "plain"])
def test_a_set_is_at_distance_0_of_itself(backend: str, rho: float | None, dtype: torch.dtype, solver: str) -> None:
    for n in SIZES:
        x, a = sets(3, n, dtype)
        for loss in losses(backend, rho, eps=0.2, tol=1e-3, solver=solver):
            assert torch.equal(loss(x, x.clone(), a, a.clone()), torch.zeros(3, dtype=dtype))


@RHO
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_is_never_negative(backend: str, rho: float | None, dtype: torch.dtype) -> None:
    """However near the sets are, up to the rounding of the values, and to the square of the marginals' error."""
    tol = 1e-4 if dtype == torch.float32 else 1e-6
    for n in SIZES:
        x, a = sets(3, n, dtype)
        order = torch.randperm(n)
        for far in (0.0, 1e-4, 1e-2, 1.0):
            y = (x + far * torch.randn_like(x))[:, order]
            costs = otloss.cosine_cost, otloss.sqeuclidean_cost, otloss.sqeuclidean_cost
            for loss, cost in zip(losses(backend, rho, eps=1.0, tol=tol, max_iter=20_000), costs, strict=True):
                found = loss(x, y, a, a[:, order])
                # Potentials and costs are of size 10 at most, and each of three values is rounded to that.
                bound = 3 * 10 * 4 * torch.finfo(dtype).eps + gap(cost(x, y), a, a[:, order], 1.0, tol)
                assert (found > -bound).all(), (n, far, found, bound)
                assert far > 0 or (found < bound).all(), (n, found, bound)
                assert far < 1 or (found > 1e-3).all()


def test_its_gradient_is_0_between_equal_sets(backend: str) -> None:
    """f = g exactly, so that the gradients of the three values cancel up to rounding, whatever tol is."""
    for n in SIZES:
        x, a = sets(2, n, F64)
        for loss in losses(backend, None, eps=0.2, tol=1e-3):
            y = x.clone().requires_grad_()
            by_y, by_b = torch.autograd.grad(loss(x, y, a, (b := a.clone().requires_grad_())).sum(), (y, b))
            assert by_y.abs().max() < 1e-12
            assert (by_b - by_b.mean(-1, keepdim=True)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("eps", [0.2, 0.02, 0.002])
def test_a_set_with_itself_takes_few_sweeps(backend: str, eps: float, dtype: torch.dtype) -> None:
    """A step leaves a 17th of the error at most, at every eps; f = g, and the solution is that of plain iterations."""
    for n in SIZES:
        x, a = sets(3, n, dtype)
        for features in (True, False):

            def solve(features: bool = features, x: Tensor = x, a: Tensor = a, **more: Any) -> otloss.SinkhornOutput:
                options = {"eps": eps, "tol": 1e-5, "backend": backend, **more}
                if features:
                    return otloss.cosine_sinkhorn(x, x.clone(), a, a.clone(), **options)
                cost = otloss.sqeuclidean_cost(x, x) / 8
                return otloss.sinkhorn(cost, a, a.clone(), **options)

            out, plain = solve(), solve(solver="plain", max_iter=100_000, backend=None)
            assert out.converged.all() and (out.n_iter <= 10).all(), (n, features, out.n_iter)
            assert_equal_potentials(out, backend)
            rounding = 2e-5 + 16 * torch.finfo(dtype).eps / eps
            torch.testing.assert_close(out.plan, plain.plan, rtol=0, atol=rounding)


def test_points_without_mass_and_masks(backend: str) -> None:
    for n in (9, 70):
        x, a = sets(3, n, F64)
        a[:, ::4] = 0
        a = a / a.sum(-1, keepdim=True)
        options: dict[str, Any] = {"eps": 0.05, "tol": 1e-8, "backend": backend}
        out = otloss.cosine_sinkhorn(x, x, a, a, **options)
        masked = otloss.cosine_sinkhorn(x, x, a, a, mask_x=a > 0, mask_y=a > 0, **options)
        assert (out.n_iter <= 10).all()
        assert_equal_potentials(masked, backend)
        torch.testing.assert_close(out.value, masked.value, rtol=0, atol=1e-9)
        torch.testing.assert_close(out.f[a > 0], out.g[a > 0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", [20, 70])
def test_a_symmetric_cost_of_any_kind(backend: str, n: int) -> None:
    """Where the kernel is not positive definite, and a cost with offsets, of which the minima are no zeros."""
    _, a, _ = random_problem(4, n=n, m=n)
    cost = torch.rand(4, n, n, dtype=F64)
    offset = 5 * torch.randn(n, dtype=F64)
    for symmetric in (cost, cost + offset + offset.unsqueeze(-1)):
        symmetric = (symmetric + symmetric.mT) / 2
        options: dict[str, Any] = {"eps": 0.1, "tol": 1e-9, "max_iter": 20_000, "backend": backend}
        out, plain = (otloss.sinkhorn(symmetric, a, a, solver=solver, **options) for solver in ("auto", "plain"))
        assert out.converged.all() and plain.converged.all()
        torch.testing.assert_close(out.plan, plain.plan, rtol=0, atol=1e-7)
        torch.testing.assert_close(out.f, out.g, rtol=0, atol=1e-13)
        assert out.n_iter.sum() <= plain.n_iter.sum()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("n", [20, 70])
def test_a_problem_keeps_its_bits_in_a_batch(n: int, dtype: torch.dtype) -> None:
    """A set with itself beside other problems, in any company."""
    if cpu.status():
        pytest.skip(str(cpu.status()))
    x, a = sets(19, n, dtype)
    y, b = x.clone(), a.clone()
    y[::3], b[1::3] = sets(7, n, dtype)[0], b[1::3].flip(-1)
    for left, right in ((x, y), (otloss.cosine_cost(x, y), None)):

        def solve(part: slice, left: Tensor = left, right: Tensor | None = right) -> list[Tensor]:
            problem = Problem(left[part], None if right is None else right[part], a[part], b[part], 0.05)
            return list(cpu.solve(problem, 5000, 1e-6, None, True)[:6])

        whole = solve(slice(0, 19))
        for first, last in ((0, 1), (2, 3), (18, 19), (4, 11)):
            for one, other in zip(solve(slice(first, last)), whole, strict=True):
                assert torch.equal(one, other[first:last])
