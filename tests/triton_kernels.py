"""The Triton kernels in Triton's interpreter, against the reference in float64; run by ``test_triton.py``.

Every regime is proven on shapes that are no multiple of a tile, with rows and columns without mass: ``LIMITS`` is
lowered so that small shapes reach the kernels of large ones, and one case of each has the size that reaches it by
itself.

Tolerances as in ``test_cpu.py``: an entry of the plan is known to about ``u c / eps``, u = 2^-24 (2^-53), c the
cost; a gradient of the plan to 1/eps times that, and through the adjoint system to its condition times that.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_offsets
import torch
from conftest import leave_out_last, reference_solution, relative
from torch import Tensor

import otloss
from benchmarks import gpu_more
from benchmarks.workloads import WORKLOADS
from otloss.backends import reference, triton
from otloss.backends.protocol import Problem, Shift, Solution, Start, Upstream

if not triton.interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from otloss.backends.triton import config, launch, solver

EPS = 0.1
DTYPES = (torch.float32, torch.float64)
Given = tuple[Tensor, Tensor | None, Tensor, Tensor]
KINDS = ("dense", "features")
SIZES = [(1, 7), (9, 1), (21, 38)]
REGIMES = {
    "small": {"small": 64, "medium": 1024},
    "medium": {"small": 0, "medium": 1024},
    "large": {"small": 0, "medium": 0},
    "streamed": {"small": 0, "medium": 0},
}


@pytest.fixture(params=list(REGIMES))
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each regime in turn, whatever the size."""
    monkeypatch.setattr(config, "LIMITS", REGIMES[request.param])
    if request.param == "streamed":
        monkeypatch.setattr(config, "STORED_BYTES", 0)
    return str(request.param)


def slack(dtype: torch.dtype, eps: float = EPS, room: float = 16.0) -> float:
    return room * torch.finfo(dtype).eps / 2 * max(1.0, 2.0 / eps)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Largest difference, relative to the largest entry wanted; what vanishes is what is left of terms above 0.1."""
    assert got.shape == want.shape and got.isfinite().all()
    size = max(float(want.abs().max()), 0.1) if want.numel() else 0.1
    difference = float((got.double() - want).abs().max()) if want.numel() else 0.0
    assert difference <= tolerance * size, (difference / size, tolerance)


def problem(kind: str, n: int, m: int, dtype: torch.dtype, batch: int = 2, d: int = 5, masked: bool = True) -> Given:
    """Features or their cost, and masses, of which every fifth is none where there are enough."""
    x, y = torch.randn(batch, n, d, dtype=torch.float64), torch.randn(batch, m, d, dtype=torch.float64)
    a, b = (torch.randn(batch, k, dtype=torch.float64).softmax(-1) for k in (n, m))
    if masked:
        a, b = (mass * (torch.arange(mass.shape[1]) % 5 != 3) for mass in (a, b))
        a, b = (mass / mass.sum(-1, keepdim=True) for mass in (a, b))
    left, right = (x, y) if kind == "features" else (reference.dense_cost(x, y), None)
    return left.to(dtype), None if right is None else right.to(dtype), a.to(dtype), b.to(dtype)


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def upstream(a: Tensor, b: Tensor) -> Upstream:
    w, v, p, q = torch.randn_like(a[:, 0]), torch.randn_like(a[:, 0]), torch.randn_like(a) * a, torch.randn_like(b) * b
    return Upstream(w, v, p, q + b * (p.sum(-1) - q.sum(-1)).unsqueeze(-1))


def whole_solution(problem: Problem, max_iter: int, tol: float) -> Solution:
    """The solution with the potentials of the cost as it was given."""
    solution = triton.solve(problem, max_iter, tol)
    assert (solution.shift is None) == (problem.right is not None)
    f, g = reference.unshifted(solution, problem.a, problem.b)
    return solution._replace(f=f, g=g, shift=None)


def check_solve(given: Given, eps: float, iterations: int, room: float = 16.0) -> None:
    dtype = given[2].dtype
    got = whole_solution(Problem(*given, eps), iterations, 0.0)
    want = reference_solution(Problem(*wide(*given), eps), iterations, 0.0)
    for one, other in zip(got[:4], want[:4], strict=True):
        close(one, other, slack(dtype, eps, room))
    assert got[4].tolist() == [iterations] * len(given[0])
    assert torch.allclose(got[5].double(), want[5], rtol=1e-2, atol=slack(dtype, eps, room))


def check_implicit(given: Given, adjoint: bool = True, lost: tuple[int, int] | None = None) -> None:
    """``lost`` are a row and a column without mass that are forbidden to all: their gradients mean nothing."""
    left, right, a, b = given
    exact = Problem(*wide(*given), EPS)
    solution = reference.solve(exact, 300, 1e-12)
    f, g, up = solution.f.to(a.dtype), solution.g.to(a.dtype), upstream(a, b)
    shift = None if solution.shift is None else Shift(*(x.to(a.dtype) for x in solution.shift))
    got, residual = triton.implicit_gradient(Problem(*given, EPS), f, g, up, adjoint, True, shift=shift)
    same = None if shift is None else Shift(*(x.double() for x in shift))
    want, _ = reference.implicit_gradient(exact, *wide(f, g), Upstream(*wide(*up)), adjoint, True, shift=same)
    for k, (one, other) in enumerate(zip(got, want, strict=True)):
        if k in (2, 3) and lost is not None:
            kept = torch.arange(one.shape[1]) != lost[k - 2]
            one, other = one[:, kept], other[:, kept]
        if k in (2, 3):  # up to a constant: the gauge of U and V is free
            one, other = one - one.mean(-1, keepdim=True), other - other.mean(-1, keepdim=True)
        close(one, other, slack(a.dtype, room=300.0))
    assert (residual < (1e-5 if a.dtype == torch.float32 else 1e-10)).all()
    assert got[0].dtype == left.dtype and (right is None or got[1].dtype == right.dtype)


def check_unrolled(given: Given, counts: list[int]) -> None:
    w, v, *_ = upstream(given[2], given[3])
    n_iter = torch.tensor(counts)
    exact, up = Problem(*wide(*given), EPS), Upstream(w.double(), v.double())
    got = triton.unrolled_gradient(Problem(*given, EPS), n_iter, Upstream(w, v), True, max(counts))
    want = reference.unrolled_gradient(exact, n_iter, up, True, max(counts))
    for one, other in zip(got, want, strict=True):
        close(one, other, slack(given[2].dtype, room=100.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_solve(regime: str, kind: str, n: int, m: int, dtype: torch.dtype) -> None:
    check_solve(problem(kind, n, m, dtype), EPS, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_implicit_gradient(regime: str, kind: str, n: int, m: int, dtype: torch.dtype) -> None:
    check_implicit(problem(kind, n, m, dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_as_a_constant(kind: str) -> None:
    check_implicit(problem(kind, 21, 38, torch.float32), adjoint=False)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_masses_alone(regime: str, kind: str) -> None:
    given = Problem(*problem(kind, 12, 9, torch.float64), EPS)
    f, g, *_, shift = triton.solve(given, 20, 0.0)
    up = upstream(given.a, given.b)
    whole, part = (triton.implicit_gradient(given, f, g, up, True, need, shift=shift)[0] for need in (True, False))
    assert part[0].numel() == part[1].numel() == 0
    assert torch.equal(whole[2], part[2]) and torch.equal(whole[3], part[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_unrolled_gradient(kind: str, n: int, m: int, dtype: torch.dtype) -> None:
    check_unrolled(problem(kind, n, m, dtype), [2, 4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("iterations", [1, 3, 30])
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_is_taken_or_left_aside(regime: str, kind: str) -> None:
    given = Problem(*problem(kind, 9, 6, torch.float64), EPS)
    cold = whole_solution(given, 100, 1e-5)
    dead = given.b == 0
    assert dead.any() and int(cold.n_iter.min()) > 3
    for g, most in ((cold.g, 2), (1e3 * torch.randn(2, 6, dtype=torch.float64), 100)):
        warm = triton.solve(given, 100, 1e-5, start=Start(None, g.masked_fill(dead, torch.nan)))
        assert (warm.error < 2e-5).all() and (warm.n_iter <= most).all()
        assert most == 2 or torch.equal(warm.n_iter, cold.n_iter)
        close(warm.value, cold.value, 1e-4)


@pytest.fixture(params=["small", "medium", "large"])
def dense_regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The regimes of a dense cost, which is never made anew."""
    monkeypatch.setattr(config, "LIMITS", REGIMES[request.param])
    return str(request.param)


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_shows(regime: str, kind: str, bad: float) -> None:
    left, right, a, b = problem(kind, 9, 10, torch.float32, masked=False)
    left[(1, 3) if kind == "dense" and bad == float("inf") else (1, 3, 4)] = bad  # a pair may be forbidden, a row not
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


def test_the_same_twice(regime: str) -> None:
    given = problem("features", 40, 33, torch.float32)
    one, other = (triton.solve(Problem(*given, EPS), 5, 0.0)[:6] for _ in range(2))
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cost_of_features_is_kept(regime: str, dtype: torch.dtype) -> None:
    """In a buffer of the caller, from which the gradient reads it; the results are those without the buffer."""
    given = Problem(*problem("features", 21, 38, dtype, d=48), EPS)
    kept, up = torch.full((2, 21, 38), float("nan"), dtype=dtype), upstream(given.a, given.b)
    with_room, without = (triton.solve(given, 9, 0.0, room) for room in (kept, None))
    close(kept, reference.dense_cost(*wide(given.left, given.right)), slack(dtype))
    got, want = (triton.implicit_gradient(given, *without[:2], up, True, True, room)[0] for room in (kept, None))
    pairs = (*zip(with_room[:6], without[:6], strict=True), *zip(got, want, strict=True))
    if regime == "streamed" and dtype == torch.float32:  # without the buffer every pass makes the cost anew
        for one, other in pairs:
            close(one, other.double(), slack(dtype, room=300.0))
    else:
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_problems_bound_the_stored_cost(
    regime: str, dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five problems, ``most`` at a time: no larger cost is made, and the results are those of each alone."""
    left, right, a, b = problem("features", 9, 12, dtype, batch=5)
    made: list[int] = []
    product = launch.DeviceProblem.product

    def noted(self: launch.DeviceProblem, *operands: Any) -> Tensor:
        made.append(self.count)
        return product(self, *operands)

    monkeypatch.setattr(launch.DeviceProblem, "product", noted)
    monkeypatch.setattr(config, "STORED_BYTES", most * 9 * 12 * a.element_size())
    up = upstream(a, b)

    def run(part: slice) -> tuple[Tensor, ...]:
        given = Problem(left[part], right[part], a[part], b[part], EPS)
        solution = triton.solve(given, 6, 0.0)
        some = Upstream(*(x[part] for x in up))
        implicit, residual = triton.implicit_gradient(given, *solution[:2], some, True, True)
        unrolled = triton.unrolled_gradient(given, solution.n_iter, Upstream(*some[:2]), True, 6)
        return (*solution[:6], *implicit, residual, *unrolled)

    got = run(slice(None))
    assert max(made) <= most
    want = [torch.cat(parts) for parts in zip(*(run(slice(k, k + 1)) for k in range(5)), strict=True)]
    for one, other in zip(got, want, strict=True):
        close(one.double(), other.double(), slack(dtype, room=300.0))


def everything(given: Given) -> list[Tensor]:
    """A solution, and both gradients."""
    problem, up = Problem(*given, EPS), upstream(given[2], given[3])
    solution = triton.solve(problem, 6, 0.0)
    f, g, *_, n_iter, _, shift = solution
    implicit, residual = triton.implicit_gradient(problem, f, g, up, True, True, shift=shift)
    unrolled = triton.unrolled_gradient(problem, n_iter, Upstream(up.cost, up.value), True, 6)
    return [*solution[:6], *(shift or ()), *implicit, residual, *unrolled]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_before_it_is_written(regime: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(kind, 17, 19, torch.float32)
    torch.manual_seed(1)
    want = everything(given)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN and with the largest integers
    try:
        assert torch.empty(3).isnan().all()
        torch.manual_seed(1)
        got = everything(given)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, got, want)) and all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_of_inputs_does_not_matter(regime: str, kind: str) -> None:
    given = [None if t is None else t[:1].expand(2, *t.shape[1:]) for t in problem(kind, 6, 9, torch.float32)]
    strange = [t if t is None or t.dim() < 3 else t.mT.contiguous().mT for t in given]
    results = []
    for inputs in (strange, [None if t is None else t.contiguous() for t in given]):
        torch.manual_seed(1)
        results.append(everything(tuple(inputs)))
    assert all(map(torch.equal, *results))


def test_a_batch_is_divided_evenly_and_the_largest_problem_is_not_stored() -> None:
    assert config.groups(64, 512, 512, False) == 2 and config.groups(33, 512, 512, False) == 2
    assert config.groups(1, 2896, 2896, False) == 1 and config.groups(1, 2897, 2897, False) == 0
    assert config.groups(7, 4096, 4096, True) == 7  # float64: one at a time at least
    assert config.groups(0, 5, 5, False) == 1


def test_blocks_of_rows_have_no_cliff() -> None:
    """One problem more than the processors hold at once does not double the time: waves of programs, times tiles."""

    def time(count: int) -> int:
        blocks, tiles = config.row_blocks(count, 512, 8, 264)
        assert blocks * tiles >= 64 and blocks <= config.BLOCKS
        return -(-count * blocks // 264) * tiles

    assert time(132) == 32 and time(133) < 1.5 * time(132)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_takes_several_tiles_of_rows(kind: str, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "LIMITS", REGIMES["medium"])
    monkeypatch.setattr(config, "BLOCKS", blocks)
    assert config.row_blocks(1, 70, 16, 16) == {1: (1, 5), 3: (3, 2)}[blocks]
    given = problem(kind, 70, 20, torch.float32, batch=1)
    check_solve(given, EPS, 4)
    check_implicit(given)


def test_columns_that_no_row_prefers_take_a_launch_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of the second column underflow; it has to be found by half-steps of the row blocks, added."""
    monkeypatch.setattr(config, "LIMITS", REGIMES["medium"])
    launches: list[Any] = []
    made = solver.launch

    def counted(kernel: Any, *rest: Any, **more: Any) -> None:
        launches.append(kernel)
        made(kernel, *rest, **more)

    monkeypatch.setattr(solver, "launch", counted)
    monkeypatch.setattr(solver, "iterate", lambda step, most, running: [step() for _ in range(most) if running.any()])
    cost = torch.rand(1, 40, 5)
    cost[..., 1] += 100
    a, b = torch.full((1, 40), 1 / 40), torch.full((1, 5), 0.2)
    check_solve((cost, None, a, b), EPS, 3, room=16.0 * 50)
    assert len(launches) == 3 + 1 + 1  # iterations, the columns of the first, and the one that sees that they are done


@pytest.mark.parametrize("last", [1, 8, 20, 100])
def test_the_host_looks_one_burst_behind(last: int) -> None:
    """The device is done after ``last`` steps: at most two bursts more are launched, and never more than asked for."""
    running, steps = torch.ones(1), 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps >= last:
            running.zero_()

    launch.iterate(step, 50, running)
    assert min(last, 50) <= steps <= min(last + 2 * launch.BURST, 50)


@pytest.mark.parametrize(("captured", "steps"), [(None, 50), (7, 7), (70, 50)])
def test_a_graph_of_the_caller_holds_a_bounded_number_of_steps(
    captured: int | None, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    made: list[int] = []
    launch.iterate(lambda: made.append(1), 50, on_gpu, captured)
    assert len(made) == steps


def test_columns_split_over_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "LIMITS", REGIMES["large"])
    monkeypatch.setattr(config, "STORED_BYTES", 0)
    given = problem("features", 3, 600, torch.float32, batch=1)
    assert config.splits(1, -(-600 // 64), 8) > 1
    check_solve(given, EPS, 3)
    check_solve(tuple(given[k] for k in (1, 0, 3, 2)), EPS, 3)
    check_implicit(given)


def test_tuning_takes_the_fastest_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles: list[config.Tile] = []

    def timer(run: Callable[[], None]) -> float:
        run()
        tiles.append(config.TUNED[key])
        return {32: 1.0, 64: 2.0, 128: 3.0}[tiles[-1].cols]

    key = config.bucket(70, 90, 5, False)
    monkeypatch.setattr(config, "TUNED", {})
    monkeypatch.setattr(config, "STORED_BYTES", 0)
    monkeypatch.setattr(launch, "timed", timer)
    monkeypatch.setenv("OTLOSS_TRITON_AUTOTUNE", "1")
    check_solve(problem("features", 70, 90, torch.float32), EPS, 2)
    assert config.TUNED[key].cols == 32 and len(config.TUNED) == 1 and len(tiles) == len(set(tiles)) > 2


def test_the_stage_of_tiles_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = replace(WORKLOADS["large"], batch=1, n=70, m=90, d=5, iterations=2)
    monkeypatch.setattr(gpu_more, "MAIN", {"large": workload})
    monkeypatch.setattr(gpu_more, "leaves_on", lambda _, workload: workload.leaves())
    monkeypatch.setattr(config, "STORED_BYTES", 0)
    monkeypatch.setattr(config, "capability", lambda: (9, 0))
    monkeypatch.setattr(launch, "timed", lambda run: float(run() is None))
    path = tmp_path / "tuned.py"
    path.write_text(gpu_more.DEFAULTS.read_text())
    with otloss.use_backend("triton"):
        result = gpu_more.tiles(path)
    written = runpy.run_path(str(path))["TILES"]
    assert set(written) == {(*size, False, (9, 0)) for size in ((128, 128, 16), (128, 128, 0))}
    assert result["complete"] and {row["bucket"]: row["rows"] for row in result["tiles"]} == {
        key: tile[0] for key, tile in written.items()
    }
    assert not config.TUNED


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


@pytest.mark.parametrize("size", [1e10, 1e20, 1e30])
@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("gradient", ["implicit", "unroll"])
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


@pytest.mark.parametrize("side", ["rows", "columns", "both"])
@pytest.mark.parametrize("size", [1e4, 1e6, 1e9])
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


@pytest.mark.parametrize("name", ["positions", "channels-dense", "pot-example"])
def test_the_benchmark_of_a_device(name: str) -> None:
    """What ``benchmarks/gpu_timing.py`` runs on a device, on the CPU: errors of ours, a step of each peer here."""
    from benchmarks import gpu_timing as gpu

    workload = replace(WORKLOADS[name].part(2, 6), d=3, eps=0.5, iterations=5)
    assert max(gpu.errors(workload, "cpu", 20).values()) < 1e-3
    for peer in gpu.ENTRANTS:
        if peer.applies(workload) and not peer.skip(workload) and not peer.warm_in_full and peer is not gpu.OURS:
            numbers, _ = peer.build(workload)(gpu.leaves_on("cpu", workload))
            assert len(numbers) == 2
