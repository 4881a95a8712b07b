"""Penalties and kinds of cost in the Triton kernels, in the interpreter against float64; run by ``test_triton.py``.

Regimes, problems and tolerances are those of ``triton_kernels.py``. Under a penalty rho the mass that a potential asks
for is known to u |f| / rho, u = 2^-24 (2^-53), which is less than u c / eps here. A squared distance is known to u
times the squares that it is made of, so that c is their size.
"""

from __future__ import annotations

import pytest
import torch
from conftest import relative
from torch import Tensor
from triton_problems import (
    DTYPES,
    EPS,
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
from otloss.backends.protocol import Problem, Upstream
from otloss.cost import COSTS

if not triton.interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from otloss.backends.triton import config

SINGLE, DOUBLE = DTYPES
BOTH, OF_A, OF_B = (0.7, 0.4), (0.3, None), (None, 2.0)
Rhos = tuple[float | None, float | None]


@pytest.fixture(params=list(REGIMES))
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return set_regime(request.param, monkeypatch)


def set_regime(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(config, "LIMITS", REGIMES[name])
    if name == "streamed":
        monkeypatch.setattr(config, "STORED_BYTES", 0)
    return name


def relaxed(given: Given, rhos: Rhos, eps: float = EPS) -> Problem:
    """A problem whose masses are of any total, with the second penalty of a batch half as strong as the first."""
    left, right, a, b = given
    scale = torch.linspace(1.0, 2.0, len(a), dtype=a.dtype)
    strengths = (None if rho is None else rho / scale for rho in rhos)
    return Problem(left, right, 1.5 * a * scale.unsqueeze(-1), b / scale.unsqueeze(-1), eps, *strengths)


def exact(given: Problem) -> Problem:
    left, right, a, b, rho_a, rho_b = wide(given.left, given.right, given.a, given.b, given.rho_a, given.rho_b)
    assert left is not None and a is not None and b is not None
    return Problem(left, right, a, b, given.eps, rho_a, rho_b, given.kind)


def some(regime: str, dtype: torch.dtype, batch: int = 2) -> Given:
    """Features where the cost is made anew, else a cost; no size is a multiple of a tile."""
    return problem("features" if regime == "streamed" else "dense", 9, 21, dtype, batch)


def check_solve(given: Problem, iterations: int, room: float = 16.0) -> None:
    got, want = triton.solve(given, iterations, 0.0), reference.solve(exact(given), iterations, 0.0)
    assert got.shift is None
    for one, other in zip(got[:4], want[:4], strict=True):
        close(one, other, slack(given.a.dtype, given.eps, room))
    assert got.n_iter.tolist() == want.n_iter.tolist()
    assert torch.allclose(got.error.double(), want.error, rtol=1e-2, atol=slack(given.a.dtype, given.eps, room))


@pytest.mark.parametrize(("rhos", "dtype"), [(BOTH, SINGLE), (BOTH, DOUBLE), (OF_A, DOUBLE), (OF_B, DOUBLE)])
def test_solve(regime: str, rhos: Rhos, dtype: torch.dtype) -> None:
    check_solve(relaxed(some(regime, dtype), rhos), 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_problems_absorb_their_scalings(dtype: torch.dtype) -> None:
    """More iterations than one kernel serves, and at small eps scalings that leave the safe range."""
    check_solve(relaxed(problem("dense", 5, 4, dtype), BOTH), 70)
    check_solve(relaxed(problem("dense", 5, 4, dtype), (3.0, 3.0), 2e-3), 5)


def test_stops_as_the_reference_does(regime: str) -> None:
    given = relaxed(some(regime, torch.float64, batch=3), (2.0, 4.0))
    got, want = (backend.solve(given, 60, 1e-3) for backend in (triton, reference))
    assert got.n_iter.tolist() == want.n_iter.tolist() and len(set(got.n_iter.tolist())) > 1
    assert bool((got.error < 1e-3).all()) and relative(got.error, want.error) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime", ["medium", "large"])
def test_columns_that_no_row_prefers(regime: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their shares underflow; the penalty is too large to leave them out."""
    set_regime(regime, monkeypatch)
    cost, _, a, b = problem("dense", 20, 5, dtype, batch=1)
    cost[..., 1] += 100
    check_solve(relaxed((cost, None, a, b), (300.0, 200.0)), 3, room=16.0 * 50)


def check_implicit(given: Problem, adjoint: bool = True, room: float = 300.0) -> None:
    solution = reference.solve(exact(given), 3000, 1e-13)
    dtype = given.a.dtype
    f, g, up = solution.f.to(dtype), solution.g.to(dtype), upstream(given.a, given.b)
    up = up._replace(g=up.g + given.b)  # under penalties f and g have no gauge
    got, residual = triton.implicit_gradient(given, f, g, up, adjoint, True)
    want, _ = reference.implicit_gradient(exact(given), f.double(), g.double(), Upstream(*wide(*up)), adjoint, True)
    assert got.left.dtype == given.left.dtype
    for one, other in zip(got, want, strict=True):
        close(one, other, slack(dtype, given.eps, room))
    assert (residual < (1e-5 if dtype == torch.float32 else 1e-10)).all()


@pytest.mark.parametrize(("rhos", "dtype"), [(BOTH, SINGLE), (BOTH, DOUBLE), (OF_A, SINGLE), (OF_B, DOUBLE)])
def test_implicit_gradient(regime: str, rhos: Rhos, dtype: torch.dtype) -> None:
    check_implicit(relaxed(some(regime, dtype), rhos))


@pytest.mark.parametrize("regime", ["small", "large"])
def test_a_large_penalty_leaves_the_system_accurate(regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is within 1e-5 of singular, in float32."""
    set_regime(regime, monkeypatch)
    left, right, a, b = some(regime, torch.float32)
    scale = torch.tensor([1.0, 3.0])
    given = Problem(left, right, a, b, EPS, 1e4 * scale, 2e4 * scale)
    check_implicit(given)


@pytest.mark.parametrize("most", [2, 7])
@pytest.mark.parametrize("regime", ["small", "large"])
def test_the_multipliers_have_no_component_that_nothing_reduces(
    regime: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 it grew, at some potentials, to twice the gradient by rho; the residual does not show it."""
    set_regime(regime, monkeypatch)
    x, y, a, b = problem("features", 9, 21, torch.float32)
    given = Problem(x, y, a, b, 0.5, torch.full((2,), 0.5), torch.full((2,), 0.5))
    f, g, *_ = triton.solve(given, most, 0.0)
    plan = reference.transport_plan(otloss.cosine_cost(x, y), a, b, f, g, 0.5)
    by_plan = Upstream(f=4 * plan.square().sum(-1), g=4 * plan.square().sum(-2))
    got, _ = triton.implicit_gradient(given, f, g, by_plan, True, True)
    want, _ = triton.implicit_gradient(exact(given), f.double(), g.double(), Upstream(*wide(*by_plan)), True, True)
    for one, other in zip(got, want, strict=True):
        close(one, other, slack(torch.float32, 0.5, 300.0))


def test_the_plan_as_a_constant() -> None:
    check_implicit(relaxed(some("small", torch.float32), BOTH), adjoint=False)


@pytest.mark.parametrize("far", [30.0, 1e8])
@pytest.mark.parametrize("regime", ["small", "medium", "large"])
def test_a_point_that_is_too_far_is_left_out(regime: str, far: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32: its share of the mass underflows."""
    set_regime(regime, monkeypatch)
    cost, _, a, b = problem("dense", 6, 5, torch.float32, masked=False)
    cost[:, 1] += far
    leaves = (cost, a, b)

    def run(dtype: torch.dtype, tol: float, backend: str) -> tuple[Tensor, ...]:
        given = [t.to(dtype).requires_grad_() for t in leaves]
        rho = torch.tensor([0.5, 0.25], dtype=dtype, requires_grad=True)
        out = otloss.sinkhorn(*given, eps=EPS, rho_a=rho, rho_b=0.5, tol=tol, max_iter=400, backend=backend)
        loss = (out.transport_cost + out.value).sum()
        return out.value, *torch.autograd.grad(loss, (*given, rho))

    got, want = run(torch.float32, 1e-6, "triton"), run(torch.float64, 1e-12, "reference")
    for one, other in zip(got, want, strict=True):
        close(one.detach(), other.detach(), slack(torch.float32, room=300.0) + 1e-6 / EPS)


def everything(given: Problem) -> list[Tensor]:
    torch.manual_seed(1)
    up = upstream(given.a, given.b)
    solution = triton.solve(given, 6, 0.0)
    gradients, residual = triton.implicit_gradient(given, solution.f, solution.g, up, True, True)
    return [*solution[:6], *gradients, residual]


def test_nothing_is_read_before_it_is_written(regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = relaxed(some(regime, torch.float32), BOTH)
    check_reads_what_is_written(lambda: everything(given), monkeypatch)


def test_groups_of_problems_take_their_own_penalties(monkeypatch: pytest.MonkeyPatch) -> None:
    given = relaxed(problem("features", 9, 12, torch.float64, batch=3), BOTH)
    want = everything(given)
    monkeypatch.setattr(config, "STORED_BYTES", 2 * 9 * 12 * 8)
    for one, other in zip(everything(given), want, strict=True):
        close(one.double(), other.double(), 1e-12)


def test_no_problems(regime: str) -> None:
    given = relaxed(some(regime, torch.float32), BOTH)
    none = Problem(*(t if t is None or isinstance(t, (float, str)) else t[:0] for t in given))
    results = everything(none)
    assert results[0].shape == (0, 9) and results[-2].shape == (0, 2)


def kind_problem(kind: str, dtype: torch.dtype, rhos: Rhos | None = None) -> tuple[Problem, Problem, list[Tensor]]:
    """A problem of features far from 0, the float64 problem of their cost, and their float64 selves as leaves of it.

    Costs are of size 1, sums of the squares that they are made of too.
    """
    x, y, a, b = problem("features", 9, 21, torch.float64)
    x, y = x / 4, y / 4
    x[:, 0] = y[:, 2]  # a distance of 0
    if kind == "sqeuclidean":
        x, y = x + 64, y + 64
    x, y, a, b = (t.to(dtype) for t in (x, y, a, b))
    rho_a, rho_b = (None, None) if rhos is None else relaxed((x, y, a, b), rhos)[5:7]
    given = Problem(x, y, a, b, EPS, rho_a, rho_b, kind)
    leaves = [x.double().requires_grad_(), y.double().requires_grad_()]
    cost = COSTS[kind](*leaves)
    others = wide(a, b), wide(rho_a, rho_b)
    return given, Problem(cost, None, *others[0], EPS, *others[1]), leaves


def by_features(dense: Problem, by_cost: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(dense.left, leaves, by_cost, retain_graph=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["sqeuclidean", "dot"])
@pytest.mark.parametrize("regime", ["small", "large", "streamed"])
def test_kinds(regime: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored and made anew: the solution, and the gradients in both modes."""
    set_regime(regime, monkeypatch)
    given, dense, leaves = kind_problem(kind, dtype)
    cost = dense.left.detach()
    plain = dense._replace(left=cost)
    want = reference.solve(plain, 4, 0.0)
    f, g = reference.unshifted(want, plain.a, plain.b)
    got = triton.solve(given, 4, 0.0)
    for one, other in zip(got[:4], (f, g, *want[2:4]), strict=True):
        close(one, other, slack(dtype))

    solved = reference.solve(plain, 300, 1e-12)
    f, g = (x.to(dtype) for x in reference.unshifted(solved, plain.a, plain.b))
    up = upstream(given.a, given.b)
    implicit, residual = triton.implicit_gradient(given, f, g, up, True, True)
    by, _ = reference.implicit_gradient(plain, f.double(), g.double(), Upstream(*wide(*up)), True, True)
    for one, other in zip(implicit[:2], by_features(dense, by.left, leaves), strict=True):
        close(one, other, slack(dtype, room=300.0))
    for one, other in zip(implicit[2:4], by[2:4], strict=True):
        close(one - one.mean(-1, keepdim=True), other - other.mean(-1, keepdim=True), slack(dtype, room=300.0))
    assert (residual < (1e-5 if dtype == torch.float32 else 1e-10)).all()

    n_iter, half = torch.tensor([2, 4]), Upstream(up.cost, up.value)
    unrolled = triton.unrolled_gradient(given, n_iter, half, True, 4)
    by = reference.unrolled_gradient(plain, n_iter, Upstream(*wide(*half)), True, 4)
    for one, other in zip(unrolled, (*by_features(dense, by.left, leaves), *by[2:]), strict=True):
        close(one, other, slack(dtype, room=100.0))


@pytest.mark.parametrize("kind", ["sqeuclidean", "dot"])
@pytest.mark.parametrize("regime", ["small", "streamed"])
def test_kinds_under_penalties(regime: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_regime(regime, monkeypatch)
    given, dense, leaves = kind_problem(kind, torch.float32, BOTH)
    plain = dense._replace(left=dense.left.detach())
    want = reference.solve(plain, 3000, 1e-13)
    got = triton.solve(given, 200, 1e-6)
    for one, other in zip(got[:4], want[:4], strict=True):
        close(one, other, slack(torch.float32) + 1e-6 / EPS)
    up = upstream(given.a, given.b)
    f, g = want.f.float(), want.g.float()
    mine, _ = triton.implicit_gradient(given, f, g, up, True, True)
    by, _ = reference.implicit_gradient(plain, f.double(), g.double(), Upstream(*wide(*up)), True, True)
    for one, other in zip(mine, (*by_features(dense, by.left, leaves), *by[2:]), strict=True):
        close(one, other, slack(torch.float32, room=300.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sqeuclidean", "dot"])
def test_the_cost_of_a_kind_is_kept(kind: str, dtype: torch.dtype) -> None:
    """It is never negative for distances, and half-precision features are read as they are."""
    given, *_ = kind_problem(kind, torch.float32)
    given = given._replace(left=given.left.to(dtype), right=given.right.to(dtype))
    kept = torch.full((2, 9, 21), float("nan"))
    solution = triton.solve(given, 5, 0.0, kept)
    close(kept, COSTS[kind](*wide(given.left, given.right)), slack(torch.float32))
    if kind == "sqeuclidean":
        assert bool((kept >= 0).all()) and float(kept[:, 0, 2].max()) < slack(torch.float32)
    by, _ = triton.implicit_gradient(given, *solution[:2], upstream(given.a, given.b), True, True, kept)
    assert by.left.dtype == dtype and by.left.isfinite().all() and by.right.dtype == dtype


def test_points_without_mass_do_not_move_the_centre() -> None:
    """As a mask leaves them: at 0, far from the others."""
    x, y, a, b = problem("features", 9, 11, torch.float32)
    live_a, live_b = a > 0, b > 0
    x, y = (torch.where(live.unsqueeze(-1), t / 4 + 1024, 0.0) for t, live in ((x, live_a), (y, live_b)))
    kept = torch.empty(2, 9, 11)
    triton.solve(Problem(x, y, a, b, EPS, kind="sqeuclidean"), 1, 0.0, kept)
    both = live_a.unsqueeze(-1) & live_b.unsqueeze(-2)
    close(kept[both], COSTS["sqeuclidean"](*wide(x, y))[both], slack(torch.float32))
