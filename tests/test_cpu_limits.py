"""The C++ kernels where numbers end: no mass, no features, tiny eps, wide costs, what is not finite, no problems."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cpu_problems import (
    DTYPES,
    EPS,
    close,
    cosine,
    everything,
    features,
    gradient,
    needs_cpu,
    oracle,
    outputs,
    slack,
    upstream,
)

from otloss.backends import cpu
from otloss.backends.protocol import Problem, Upstream

pytestmark = needs_cpu


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_mass_is_cropping(dtype: torch.dtype) -> None:
    x, y, a, b = features(19, 37, dtype)
    rows, columns = torch.arange(19) % 3 != 0, torch.arange(37) % 4 != 1
    a, b = a * rows, b * columns
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    small = [t.contiguous() for t in (x[:, rows], y[:, columns], a[:, rows], b[:, columns])]
    whole, crop = cpu.solve(Problem(x, y, a, b, EPS), 30, 0.0), cpu.solve(Problem(*small, EPS), 30, 0.0)
    f, g = oracle(cosine(x, y), a, b, EPS, 30)[:2]
    close(whole[0], f, slack(dtype))
    close(whole[1], g, slack(dtype))
    for got, want in zip((whole[0][:, rows], whole[1][:, columns], *whole[2:4]), crop[:4], strict=True):
        close(got, want, slack(dtype))
    w, v, p, q = upstream(a, b)
    large, little = Problem(x, y, a, b, EPS), Problem(*small, EPS)
    big, _ = cpu.implicit_gradient(large, *whole[:2], Upstream(w, v, p, q), True, True)
    cut, _ = cpu.implicit_gradient(little, *crop[:2], Upstream(w, v, p[:, rows], q[:, columns]), True, True)
    assert not big[0][:, ~rows].any() and not big[1][:, ~columns].any()
    keeps = (rows, columns, rows, columns)
    for k, keep in enumerate(keeps):
        assert big[k].isfinite().all()
        got, want = big[k][:, keep], cut[k]
        if k > 1:
            got, want = got - got.mean(-1, keepdim=True), want - want.mean(-1, keepdim=True)
        close(got, want, slack(dtype, room=300.0))
    unrolled = cpu.unrolled_gradient(large, torch.tensor([4, 5]), Upstream(w, v), True, 5)
    want = cpu.unrolled_gradient(little, torch.tensor([4, 5]), Upstream(w, v), True, 5)
    for k, keep in enumerate(keeps):
        assert unrolled[k].isfinite().all()
        close(unrolled[k][:, keep], want[k], slack(dtype, room=100.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_features_have_no_cosine_and_no_gradient(dtype: torch.dtype) -> None:
    x, y, a, b = features(6, 5, dtype)
    x[:, 2], y[0, 1] = 0, 0
    problem = Problem(x, y, a, b, EPS)
    f, g, *_ = cpu.solve(problem, 500, 0.0)
    (gx, gy, *_), _ = cpu.implicit_gradient(problem, f, g, Upstream(torch.ones_like(a[:, 0])), True, True)
    assert gx.isfinite().all() and gy.isfinite().all()
    assert not gx[:, 2].any() and not gy[0, 1].any()
    assert gx[:, 1].any() and gy[1, 1].any()


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_the_length_of_a_feature_does_not_matter(scale: float) -> None:
    x, y, a, b = features(6, 5, torch.float32)
    scaled, plain = (cpu.solve(Problem(z, y, a, b, EPS), 20, 0.0) for z in (x * scale, x))
    for got, want in zip(scaled[:4], plain[:4], strict=True):
        close(got, want.double(), slack(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-3, 1e-2])
def test_small_eps_follows_the_oracle(eps: float, dtype: torch.dtype) -> None:
    cost = torch.rand(2, 20, 23, dtype=torch.float64).mul(2).to(dtype)
    a, b = torch.randn(2, 20, dtype=dtype).softmax(-1), torch.randn(2, 23, dtype=dtype).softmax(-1)
    for iterations in (1, 3, 200):
        solution = cpu.solve(Problem(cost, None, a, b, eps), iterations, 0.0)
        got, error = outputs(solution, a, b), solution.error
        want = oracle(cost, a, b, eps, iterations)
        # Potentials are averages of costs: each iteration adds a rounding of the cost, not of cost/eps.
        tolerance = torch.finfo(dtype).eps * 2 * (4 + iterations)
        for p, q in zip(got[:2], want[:2], strict=True):
            close(p, q, tolerance)
        for p, q in zip(got[2:], want[2:], strict=True):
            close(p, q, tolerance / eps)
        assert error.isfinite().all()


def test_small_eps_reaches_optimal_transport() -> None:
    ot = pytest.importorskip("ot")
    cost = torch.rand(2, 64, 64)
    a = torch.full((2, 64), 1 / 64)
    sharp = cpu.solve(Problem(cost, None, a, a, 1e-3), 3000, 0.0)[2]
    for k in range(2):
        exact = ot.emd2(a[k].double().numpy(), a[k].double().numpy(), cost[k].double().numpy())
        assert float(sharp[k]) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["wide", "one-hot", "identical", "far columns", "separable"])
def test_hard_problems_stay_finite_and_right(kind: str, dtype: torch.dtype) -> None:
    n, m, eps, size = 12, 18, 0.1, 2.0
    cost = torch.rand(1, n, m, dtype=torch.float64)
    a, b = torch.randn(1, n, dtype=torch.float64), torch.randn(1, m, dtype=torch.float64)
    if kind == "wide":
        cost, size = cost * 2000 - 1000, 1000.0
    elif kind == "one-hot":
        a, b = a * 15, b * 15
    elif kind == "identical":
        cost = cost[:, :1].expand(1, n, m)
    elif kind == "far columns":
        cost[..., ::3] += 1000
        size = 1000.0
    else:
        cost = torch.linspace(-500, 500, n, dtype=torch.float64)[:, None] + 300 * torch.rand(m, dtype=torch.float64)
        cost, size = cost[None], 800.0
    cost, a, b = cost.to(dtype), a.softmax(-1).to(dtype), b.softmax(-1).to(dtype)
    want = oracle(cost, a, b, eps, 40)
    problem = Problem(cost, None, a, b, eps)
    solution = cpu.solve(problem, 40, 0.0)
    got, error = outputs(solution, a, b), solution.error
    for p, q in zip(got[:2], want[:2], strict=True):
        close(p, q, 50 * torch.finfo(dtype).eps * size / float(np.abs(q).max()) + slack(dtype))
    close(got[2], want[2], slack(dtype, eps, size))
    grads, residual = gradient(problem, solution, upstream(a, b), True, True)
    unrolled = cpu.unrolled_gradient(problem, torch.tensor([40]), Upstream(torch.ones(1, dtype=dtype)), True, 40)
    assert all(t.isfinite().all() for t in (error, *grads, residual, *unrolled))


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_many_points_against_few(wide: bool, dead: bool) -> None:
    """Sums over 10^5 points lose nothing to float32 that ``tol`` would see, by scaling or (dead) in the log-domain."""
    cost = torch.rand(1, 100_000, 8, generator=torch.Generator().manual_seed(0))
    cost, axis = (cost.mT.contiguous(), 2) if wide else (cost, 1)
    a, b = (torch.ones(1, count) for count in cost.shape[1:])
    if dead:
        a[:, 7] = b[:, 3] = 0
    a, b = a / a.sum(), b / b.sum()
    n_iter, error = cpu.solve(Problem(cost, None, a, b, EPS), 200, 1e-5)[4:6]
    assert int(n_iter) < 50 and float(error) < 1e-5

    def everything(dtype: torch.dtype) -> list[torch.Tensor]:
        given = Problem(cost.to(dtype), None, a.to(dtype), b.to(dtype), EPS)
        by_cost = Upstream(torch.ones(1, dtype=dtype))
        solution = cpu.solve(given, 200, 1e-5 if dtype == torch.float32 else 1e-9)
        implicit, _ = gradient(given, solution, by_cost, True, True)
        unrolled = cpu.unrolled_gradient(given, n_iter, by_cost, True, 200)
        return [solution.transport_cost, implicit.left.sum(axis), unrolled.left.sum(axis), unrolled.a, unrolled.b]

    tolerances = (2e-5, 2e-5, 2e-5, 1e-4, 1e-4)
    for got, want, tolerance in zip(everything(torch.float32), everything(torch.float64), tolerances, strict=True):
        close(got, want, tolerance)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    x, y, a, b = features(9, 10, torch.float32)
    cost = cosine(x, y).float()
    for left, right, where in ((cost, None, (1, 3, 4)), (x, y, (1, 3, 4))):
        left = left.clone()
        left[where[:2] if right is None and bad == float("inf") else where] = bad  # a pair may be forbidden, a row not
        f, g, sharp, *_ = cpu.solve(Problem(left, right, a, b, EPS), 10**6, 0.0)
        assert sharp[0].isfinite() and f[0].isfinite().all() and g[0].isfinite().all()
        assert f[1].isnan().any() or g[1].isnan().any() or sharp[1].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_problems(dtype: torch.dtype) -> None:
    x, y, a, b = (t[:0] for t in features(3, 4, dtype))
    out = everything(x, y, a, b)
    assert out[0].shape == (0, 3) and out[1].shape == (0, 4) and out[4].dtype == torch.int64
    assert out[12].shape == x.shape and out[13].shape == y.shape
