"""The Triton kernels where numbers end, in the interpreter: offsets, half precision, no mass, no problems."""

from __future__ import annotations

import math
from typing import Any

import pytest
import test_offsets
import torch
from conftest import leave_out_last, reference_solution, relative
from grids import grid
from torch import Tensor
from triton_problems import DTYPES, EPS, KINDS, REGIMES, check_solve, close, problem, slack, upstream, wide

import otloss
from otloss.backends import reference, triton
from otloss.backends.protocol import Problem, Upstream

if not triton.interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from otloss.backends.triton import launch


@pytest.mark.parametrize(("kind", "offset"), [("all", 1e2), ("rows", -1e4), ("columns", 1e5), ("columns", -1e6)])
def test_an_offset_costs_no_digits(dense_regime: str, kind: str, offset: float) -> None:
    test_offsets.test_an_offset_costs_no_digits("triton", offset, kind, (9, 12), "plain")


def test_an_offset_of_some_columns_costs_no_digits(dense_regime: str) -> None:
    """The difference of such a column to a row's minimum has more digits than float32; what it loses comes back."""
    cost = torch.rand(2, 9, 12)
    cost[..., ::2] += 2**20
    cost.requires_grad_()
    exact = cost.detach().double().requires_grad_()
    options = {"eps": test_offsets.EPS, "max_iter": 500}
    out = otloss.sinkhorn(cost, tol=test_offsets.TOL, backend="triton", **options)
    want = otloss.sinkhorn(exact, tol=1e-10, backend="reference", **options)
    assert out.converged.all() and relative(out.plan, want.plan) < test_offsets.PLAN
    (got,) = torch.autograd.grad(out.plan[:, 0, 0].sum(), cost)
    (right,) = torch.autograd.grad(want.plan[:, 0, 0].sum(), exact)
    assert relative(got, right) < test_offsets.PLAN / test_offsets.EPS


@pytest.mark.parametrize("n_columns", [9, 600])  # 600: split over programs
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_minima_are_those_of_the_reference(dtype: torch.dtype, n_columns: int) -> None:
    """Of points with mass alone; a column that has an offset of its own; to the bit."""
    cost, _, a, b = problem("dense", 7, n_columns, torch.float64 if dtype == torch.float64 else torch.float32)
    cost[..., 1] += 100
    given = Problem(cost.to(dtype), None, a, b, EPS)
    prepared = launch.DeviceProblem(given)
    prepared.take_minima_out()
    wanted = reference._minima(given.left.to(a.dtype), a, b)
    assert prepared.shift is not None and all(map(torch.equal, prepared.shift, wanted))
    small = triton.solve(Problem(*(given.left[..., :9], None, a, b[:, :9]), EPS), 1, 0.0).shift
    wanted = reference._minima(given.left[..., :9].to(a.dtype), a, b[:, :9])
    assert small is not None and all(map(torch.equal, small, wanted))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_read_as_it_is(kind: str, dtype: torch.dtype) -> None:
    left, right, a, b = problem(kind, 21, 14, torch.float32)
    left, right = left.to(dtype), None if right is None else right.to(dtype)
    check_solve((left, right, a, b), EPS, 4)
    given = Problem(left, right, a, b, EPS)
    f, g, *_, shift = triton.solve(given, 20, 0.0)
    got, _ = triton.implicit_gradient(given, f, g, Upstream(upstream(a, b).cost), True, True, shift=shift)
    assert got[0].dtype == dtype and got[0].isfinite().all()


@pytest.mark.parametrize(("kind", "dtype"), [("dense", torch.float16), ("features", torch.bfloat16)])
def test_half_precision_through_the_verb(regime: str, kind: str, dtype: torch.dtype) -> None:
    left, right, a, b = problem(kind, 9, 7, torch.float32, masked=False)
    halves = [t.to(dtype).requires_grad_() for t in (left, right) if t is not None]

    def run(given: list[Tensor]) -> list[Tensor]:
        verb = otloss.sinkhorn if kind == "dense" else otloss.cosine_sinkhorn
        out = verb(*given, a, b, eps=0.5, max_iter=8, tol=0.0, backend="triton")
        return [out.transport_cost.detach(), out.plan.detach(), *torch.autograd.grad(out.transport_cost.sum(), given)]

    got, want = run(halves), run([t.detach().float().requires_grad_() for t in halves])
    for one, other in zip(got, want, strict=True):
        rounding = torch.finfo(one.dtype).eps if one.dtype == dtype else slack(torch.float32, 0.5)
        close(one.float(), other.double(), rounding)
    assert all(grad.dtype == dtype for grad in got[2:]) and got[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_features_have_no_cosine_and_no_gradient(dtype: torch.dtype) -> None:
    x, y, a, b = problem("features", 6, 5, dtype, masked=False)
    x[:, 2], y[0, 1] = 0, 0
    given = Problem(x, y, a, b, EPS)
    f, g, *_ = triton.solve(given, 20, 0.0)
    (gx, gy, *_), _ = triton.implicit_gradient(given, f, g, Upstream(torch.ones_like(a[:, 0])), True, True)
    assert gx.isfinite().all() and gy.isfinite().all()
    assert not gx[:, 2].any() and not gy[0, 1].any() and gx[:, 1].any() and gy[1, 1].any()


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_the_length_of_a_feature_does_not_matter(scale: float) -> None:
    x, y, a, b = problem("features", 6, 5, torch.float32)
    scaled, plain = (triton.solve(Problem(z, y, a, b, EPS), 9, 0.0) for z in (x * scale, x))
    for one, other in zip(scaled[:6], plain[:6], strict=True):
        close(one, other.double(), slack(torch.float32))


@pytest.mark.parametrize(
    ("regime", "kind", "bad"), grid(REGIMES, KINDS, (math.nan, math.inf, -math.inf)), indirect=["regime"]
)
def test_what_is_not_finite_shows(regime: str, kind: str, bad: float) -> None:
    left, right, a, b = problem(kind, 9, 10, torch.float32, masked=False)
    left[(1, 3) if kind == "dense" and bad == math.inf else (1, 3, 4)] = bad  # a pair may be forbidden, a row not
    f, g, sharp, *_ = triton.solve(Problem(left, right, a, b, EPS), 6, 0.0)
    assert sharp[0].isfinite() and f[0].isfinite().all() and g[0].isfinite().all()
    assert f[1].isnan().any() or g[1].isnan().any() or sharp[1].isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_no_problems(regime: str, kind: str) -> None:
    given = tuple(None if t is None else t[:0] for t in problem(kind, 3, 4, torch.float32))
    f, g, sharp, _, n_iter, _, shift = triton.solve(Problem(*given, EPS), 5, 0.0)
    assert f.shape == (0, 3) and g.shape == (0, 4) and n_iter.dtype == torch.int64
    prepared, up = Problem(*given, EPS), Upstream(sharp)
    assert triton.implicit_gradient(prepared, f, g, up, True, True, shift=shift)[0].left.shape == given[0].shape
    assert triton.unrolled_gradient(prepared, n_iter, up, True, 0).left.shape == given[0].shape


@pytest.mark.parametrize("weight", [1e-22, 1e22])
def test_the_size_of_the_loss_is_free(regime: str, weight: float) -> None:
    left, right, a, b = problem("dense", 6, 5, torch.float32)
    f, g = reference_solution(Problem(*wide(left, right, a, b), 0.2), 300, 1e-12)[:2]
    solved = (Problem(left, right, a, b, 0.2), f.float(), g.float())

    def gradients(w: float) -> tuple[Tensor, ...]:
        gradients, residual = triton.implicit_gradient(*solved, Upstream(torch.full((2,), w)), True, True)
        return (*gradients, residual)

    (*got, residual), (*want, _) = gradients(weight), gradients(1.0)
    assert all(torch.allclose(x / weight, y, rtol=1e-4, atol=1e-6) for x, y in zip(got, want, strict=True))
    assert (residual < 1e-5).all()


@pytest.mark.parametrize(
    ("regime", "gradient", "side", "size"),
    grid(REGIMES, ("implicit", "unroll"), ("rows", "columns"), (1e10, 1e20, 1e30)),
    indirect=["regime"],
)
def test_huge_costs_without_mass_do_not_reach_the_others(regime: str, gradient: str, side: str, size: float) -> None:
    batch = 8 if regime == "small" else 2  # cheap there, and a row whose kernel vanishes does not come in every problem
    cost, _, a, b = problem("dense", 5, 5, torch.float32, batch, masked=False)
    live = leave_out_last(side, cost, a, b, size * (1 + torch.rand(batch, 5)))

    def results(*given: Tensor) -> tuple[Tensor, ...]:
        given = tuple(x.clone().requires_grad_() for x in given)
        stop = {"tol": 1e-6, "max_iter": 50} if gradient == "implicit" else {"tol": 0.0, "max_iter": 3}
        out = otloss.sinkhorn(*given, eps=0.2, gradient=gradient, backend="triton", **stop)
        return out.transport_cost, out.value, *torch.autograd.grad((out.transport_cost + out.value).sum(), given)

    got, want = results(cost, a, b), results(cost[live], a[live[:2]], b[:, live[2]])
    assert not got[2][:, 4].any() if side == "rows" else not got[2][:, :, 4].any()
    assert all(x.isfinite().all() for x in got)
    got = (*got[:2], got[2][live], got[3][live[:2]], got[4][:, live[2]])
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(got, want, strict=True))


def test_pairs_of_points_without_mass_do_not_reach_the_others(regime: str) -> None:
    """Rounding of a potential of 1e7 may leave a row a sum of 1e-18 beside a kernel of 1e26: their quotient is inf."""
    cost, _, a, b = problem("dense", 5, 5, torch.float32, masked=False)
    for mass in (a, b):
        mass[:, 4] = 0
        mass /= mass.sum(-1, keepdim=True)
    f, g, *_ = reference_solution(Problem(*wide(cost, None, a, b), EPS), 300, 1e-12)
    f[:, 4] -= 40 * EPS
    g[:, 4] += 200 * EPS
    given, w = Problem(cost, None, a, b, EPS), torch.ones(2)
    got, residual = triton.implicit_gradient(given, f.float(), g.float(), Upstream(w), True, True)
    crop = Problem(*wide(cost[:, :4, :4], None, a[:, :4], b[:, :4]), EPS)
    want, _ = reference.implicit_gradient(crop, f[:, :4], g[:, :4], Upstream(w.double()), True, True)
    close(got.left[:, :4, :4], want.left, slack(torch.float32, room=300.0))
    assert (residual < 1e-5).all()


@pytest.mark.parametrize(
    ("regime", "size", "side"), grid(REGIMES, (1e4, 1e6, 1e9), ("rows", "columns", "both")), indirect=["regime"]
)
def test_potentials_of_huge_costs_without_mass_have_their_gradient(regime: str, size: float, side: str) -> None:
    cost, _, a, b = problem("dense", 5, 5, torch.float32, batch=1, masked=False)
    sides = [name for name in ("rows", "columns") if side in (name, "both")]
    for name in sides:
        leave_out_last(name, cost, a, b, size * (1 + 0.1 * torch.rand(5)))
    live = (slice(None), *(slice(-1 if name in sides else None) for name in ("rows", "columns")))
    weights = torch.randn(2, 5)

    def gradients(dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        given = tuple(x.to(dtype).requires_grad_() for x in (cost.clone(), a.clone(), b.clone()))
        out = otloss.sinkhorn(*given, eps=0.2, max_iter=300, **options)
        by_cost, by_a, by_b = torch.autograd.grad((weights.to(dtype) * torch.cat((out.f, out.g))).sum(), given)
        return by_cost[live], by_a[live[:2]], by_b[:, live[2]]

    got = gradients(torch.float32, backend="triton", tol=1e-6)
    want = gradients(torch.float64, backend="reference", tol=1e-12)
    assert all(relative(x, y) < 1e-3 for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("weight", [1.0, 1e15])
@pytest.mark.parametrize("side", ["rows", "columns"])
def test_unrolled_points_without_mass_have_lost_their_gradient(side: str, weight: float) -> None:
    """Unrolling has one kernel for all regimes; what multiplies that of such points may overflow."""
    cost, _, a, b = problem("dense", 5, 5, torch.float32, batch=4, masked=False)
    live = leave_out_last(side, cost, a, b, 1e9 * (1 + 0.1 * torch.rand(4, 5)))
    w, n_iter = torch.full((4,), weight), torch.full((4,), 2)
    got = triton.unrolled_gradient(Problem(cost, None, a, b, 0.05), n_iter, Upstream(w, w), True, 2)
    crop = (cost[live].contiguous(), None, a[live[:2]].contiguous(), b[:, live[2]].contiguous())
    want = triton.unrolled_gradient(Problem(*crop, 0.05), n_iter, Upstream(w, w), True, 2)
    assert all(got[k].isfinite().all() for k in (0, 2, 3))
    assert not got[2 if side == "rows" else 3][:, 4].any()
    for one, other in ((got[0][live], want[0]), (got[2][live[:2]], want[2]), (got[3][:, live[2]], want[3])):
        assert relative(one, other) < 1e-3


@pytest.mark.parametrize("gradient", ["implicit", "unroll"])
def test_pairs_may_be_forbidden_by_the_largest_number(regime: str, gradient: str) -> None:
    cost = torch.full((5, 5), torch.finfo(torch.float32).max).fill_diagonal_(0).requires_grad_()
    out = otloss.sinkhorn(cost, gradient=gradient, backend="triton")
    (grad,) = torch.autograd.grad(30 * out.transport_cost, cost)
    assert torch.allclose(grad, 6 * torch.eye(5), atol=1e-5)
