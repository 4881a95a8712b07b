"""A cost of +inf forbids a pair: plan and gradient are 0 there, and the rest is the limit of a large cost.

The oracle is the reference in float64 with a finite cost of 1e4 in place of inf, whose kernel underflows to 0.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import relative
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import otloss
from otloss import SinkhornLoss, sinkhorn
from otloss.backends import get_backend

EPS, LARGE = 0.2, 1e4


def problem(n: int, m: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """A cost with forbidden pairs, and masses of a plan that is positive on the others, which connect all points."""
    allowed = torch.rand(batch, n, m) < 0.6
    allowed[:, 0] = allowed[..., 0] = True
    plan = torch.where(allowed, 0.1 + torch.rand(batch, n, m, dtype=torch.float64), 0.0)
    plan = plan / plan.sum((-1, -2), keepdim=True)
    cost = torch.where(allowed, 2 * torch.rand(batch, n, m, dtype=torch.float64) - 1, torch.inf)
    return cost.to(dtype), plan.sum(-1).to(dtype), plan.sum(-2).to(dtype)


def results(cost: Tensor, a: Tensor, b: Tensor, mode: str, **options: Any) -> list[Tensor]:
    """Outputs, and gradients of every output that the mode differentiates, by the cost and the masses."""
    leaves = [t.clone().requires_grad_() for t in (cost, a, b)]
    out = sinkhorn(*leaves, gradient=mode, **options)
    loss = out.transport_cost.sum()
    if mode != "none":
        loss = loss + 2 * out.value.sum()
    if mode == "implicit":
        weights = torch.linspace(-1, 1, out.plan.numel(), dtype=torch.float64).to(cost.dtype).reshape(out.plan.shape)
        loss = loss + (weights * out.plan).sum() + out.f[:, 0].sum() - out.g[:, -1].square().sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    shown = [out.transport_cost, out.value, out.plan, out.f, out.g]
    return [t.detach() for t in shown] + [g for g in grads if g is not None]


@pytest.mark.parametrize(
    "solver, mode", [("auto", "implicit"), ("plain", "implicit"), ("plain", "unroll"), ("auto", "none")]
)
@pytest.mark.parametrize("size", [(3, 3), (17, 31), (40, 70), (70, 40)])  # lanes and their remainders, single problems
def test_is_the_limit_of_a_large_cost(backend: str, size: tuple[int, int], solver: str, mode: str) -> None:
    cost, a, b = problem(*size)
    forbidden = cost == torch.inf
    options = {"eps": EPS, "tol": 1e-12, "max_iter": 3000, "solver": solver}
    if mode == "unroll":
        options |= {"tol": 0.0, "max_iter": 20}
    got = results(cost, a, b, mode, backend=backend, **options)
    want = results(cost.clamp(max=LARGE), a, b, mode, backend="reference", **options)
    assert not got[2][forbidden].any() and not got[5][forbidden].any()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("size", [(9, 14), (66, 70)])
def test_float32_and_small_eps(backend: str, size: tuple[int, int]) -> None:
    """In units of eps a forbidden pair lies no nearer. An entry of the plan is known to u |C| / eps, and to 10 tol."""
    eps = 0.02
    cost, a, b = problem(*size)
    single = (cost.float().double(), a, b)
    options = {"eps": eps, "max_iter": 20_000}
    want = results(*single, "implicit", backend="reference", tol=1e-11, **options)
    got = results(cost.float(), a.float(), b.float(), "implicit", backend=backend, tol=1e-6, **options)
    known = 10 * 1e-6 + 16 * 2**-24 * 2 / eps
    assert not got[2][cost == torch.inf].any() and not got[5][cost == torch.inf].any()
    for one, other in zip(got[:3], want[:3], strict=True):
        assert relative(one, other) < known
    assert relative(got[5], want[5]) < 10 * known / eps


def test_parts_of_a_large_problem(kernel_backend: str) -> None:
    """So large that the rows are split, with points that have no mass: kernels against the reference."""
    cost, a, b = problem(700, 800, batch=1)
    a[:, 3], b[:, 5] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    cost[:, 3] = torch.inf  # forbidden to all
    options = {"eps": 1.0, "tol": 1e-9}
    got, want = (results(cost, a, b, "implicit", backend=name, **options) for name in (kernel_backend, "reference"))
    assert not got[2][cost == torch.inf].any() and not got[5][cost == torch.inf].any()
    got[6][:, 3] = want[6][:, 3] = 0  # which means nothing
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("size", [(6, 5), (70, 66)])
@pytest.mark.parametrize("mode", ["implicit", "unroll"])
def test_points_without_mass_beside_forbidden_pairs(backend: str, mode: str, size: tuple[int, int]) -> None:
    """One row and one column without mass are forbidden to all, others to some: the rest is the cropped problem."""
    n, m = size
    cost, a, b = problem(n - 2, m - 2)
    wide = torch.full((2, n, m), torch.inf, dtype=torch.float64)
    wide[:, : n - 2, : m - 2] = cost
    wide[:, n - 1, ::2] = wide[:, ::2, m - 1] = 0.5
    masses = torch.nn.functional.pad(a, (0, 2)), torch.nn.functional.pad(b, (0, 2))
    options = {"eps": EPS, "backend": backend, "tol": 1e-12, "max_iter": 3000}
    if mode == "unroll":
        options |= {"tol": 0.0, "max_iter": 10}
    crop = (slice(None), slice(n - 2), slice(m - 2))

    def run(*given: Tensor) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        leaves = [t.clone().requires_grad_() for t in given]
        out = sinkhorn(*leaves, gradient=mode, **options)
        parts = [out.transport_cost, out.value, out.plan, out.f, out.g]
        loss = (out.transport_cost + out.value).sum()
        if mode == "implicit":
            loss = loss + out.plan.square().sum() + out.f.sin().sum()
        return [p.detach() for p in parts], torch.autograd.grad(loss, leaves)

    (got, by), (want, by_crop) = run(wide, *masses), run(cost, a, b)
    assert all(t.isfinite().all() for t in (*got, *by))
    assert not by[0][wide == torch.inf].any() and not got[2][wide == torch.inf].any()
    torch.testing.assert_close(got[2][crop], want[2])
    for one, other in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(got[3][:, : n - 2], want[3])
    if mode == "unroll":
        torch.testing.assert_close(by[0][crop], by_crop[0])
        torch.testing.assert_close(by[1][:, : n - 2], by_crop[1])


def test_a_mask_makes_what_stands_there_irrelevant(backend: str) -> None:
    cost, a, b = problem(6, 5)
    mask = torch.tensor([True, True, False, True, True, True])
    options = {"eps": EPS, "backend": backend, "tol": 1e-12, "max_iter": 3000}
    kept = torch.where(cost[:, mask] < torch.inf, torch.rand(2, 5, 5, dtype=torch.float64), 0.0)
    a, b = torch.zeros_like(a).masked_scatter(mask.expand(2, 6), kept.sum(-1)), kept.sum(-2)
    cost.requires_grad_()
    for bad in (torch.inf, torch.nan, -torch.inf):
        changed = cost.masked_fill(~mask[:, None], bad)
        out = sinkhorn(changed, a, b, mask_x=mask, **options)
        crop = sinkhorn(cost[:, mask], a[:, mask], b, **options)
        torch.testing.assert_close(out.plan[:, mask], crop.plan)
        torch.testing.assert_close(out.f[:, mask], crop.f)
        (grad,) = torch.autograd.grad(out.value.sum(), cost)
        assert grad.isfinite().all() and not grad[:, 2].any()


@pytest.mark.parametrize("size", [4, 40])
def test_blocks_are_problems_of_their_own(backend: str, size: int) -> None:
    """Two blocks that share no pair, each of mass 1/2: the plan is half of each, and KL counts their choice, log 2."""
    blocks = torch.rand(2, size, size + 1, dtype=torch.float64)
    a, b = torch.rand(2, size, dtype=torch.float64), torch.rand(2, size + 1, dtype=torch.float64)
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    cost = torch.full((2 * size, 2 * size + 2), torch.inf, dtype=torch.float64)
    parts = (slice(size), slice(size + 1)), (slice(size, None), slice(size + 1, None))
    for block, place in zip(blocks, parts, strict=True):
        cost[place] = block
    options = {"eps": EPS, "backend": backend, "tol": 1e-12, "max_iter": 3000}
    cost.requires_grad_()
    blocks.requires_grad_()
    out, alone = sinkhorn(cost, a.flatten() / 2, b.flatten() / 2, **options), sinkhorn(blocks, a, b, **options)
    assert bool(out.converged)
    for k, place in enumerate(parts):
        torch.testing.assert_close(out.plan[place], alone.plan[k] / 2)
    torch.testing.assert_close(out.transport_cost, alone.transport_cost.mean())
    torch.testing.assert_close(out.value, alone.value.mean() + EPS * torch.log(torch.tensor(2.0, dtype=torch.float64)))
    loss = out.transport_cost + out.value + 4 * out.plan.square().sum()
    (grad,) = torch.autograd.grad(loss, cost)
    (want,) = torch.autograd.grad((alone.transport_cost + alone.value).mean() + alone.plan.square().sum(), blocks)
    for k, place in enumerate(parts):
        torch.testing.assert_close(grad[place], want[k], atol=1e-8, rtol=1e-8)
    assert not grad[cost == torch.inf].any()


@pytest.mark.parametrize("kind", ["balanced", "eps", "rho"])
def test_gradients(backend: str, kind: str) -> None:
    """Finite differences over the allowed pairs, masses, and eps or penalties; second ones on the reference."""
    if kind == "rho" and not get_backend(backend).RELAXES:
        pytest.skip(f"the backend {backend} has no penalties")
    cost, a, b = problem(4, 5, batch=1)
    allowed = cost < torch.inf
    values, za, zb = cost[allowed].requires_grad_(), a.log().requires_grad_(), b.log().requires_grad_()
    extra = [] if kind == "balanced" else [torch.tensor([0.3], dtype=torch.float64).requires_grad_()]

    def outputs(values: Tensor, za: Tensor, zb: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        full = torch.full_like(cost, torch.inf).masked_scatter(allowed, values)
        named: dict[str, Any] = {"eps": 0.3} if kind != "eps" else {"eps": more[0]}
        if kind == "rho":
            named |= {"rho_a": more[0], "rho_b": 0.7}
        masses = za.softmax(-1), zb.softmax(-1)
        out = sinkhorn(full, *masses, tol=1e-13, max_iter=5000, backend=backend, **named)
        return out.transport_cost, out.value, out.plan, out.log_plan[allowed], out.f, out.g

    leaves = (values, za, zb, *extra)
    assert gradcheck(outputs, leaves, atol=1e-6, rtol=1e-5)
    if backend == "reference":
        assert gradgradcheck(outputs, leaves, atol=1e-4, rtol=1e-3, fast_mode=True)


def test_second_derivative_by_unrolling() -> None:
    cost, a, b = problem(4, 3, batch=1)
    cost = torch.nn.functional.pad(cost, (0, 0, 0, 1), value=torch.inf).requires_grad_()  # one row is forbidden to all
    a = torch.nn.functional.pad(a, (0, 1)).requires_grad_()
    out = sinkhorn(cost, a, b, eps=0.3, max_iter=5, tol=0.0, gradient="unroll", backend="reference")
    first = torch.autograd.grad(out.transport_cost.sum() + out.value.sum(), (cost, a), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (cost, a))
    assert all(g.isfinite().all() for g in second) and second[0].any() and not second[0][cost == torch.inf].any()


def test_what_is_made_of_the_plan(backend: str) -> None:
    cost, a, b = problem(5, 4)
    a[:, 2], cost[:, 2] = 0, torch.inf
    cost.requires_grad_()
    out = sinkhorn(cost, a / a.sum(-1, keepdim=True), b, eps=EPS, max_iter=30, tol=0.0, backend=backend)
    forbidden = cost == torch.inf
    assert torch.equal(out.log_plan == -torch.inf, forbidden)
    y = torch.rand(4, 3, dtype=torch.float64)
    means = otloss.barycentric(out, y)
    rows = out.plan.sum(-1, keepdim=True)
    torch.testing.assert_close(means * rows, out.plan @ y)
    assert not means[:, 2].any()
    match = otloss.assign(out)
    assert (match[:, 2] == -1).all()
    assert not forbidden.gather(-1, match.clamp(min=0).unsqueeze(-1))[match.unsqueeze(-1) >= 0].any()
    assert "mass matched: 1" in str(out.summary())
    (grad,) = torch.autograd.grad(means.square().sum() + torch.where(forbidden, 0.0, out.log_plan).sum(), cost)
    assert grad.isfinite().all() and not grad[forbidden].any()


def test_the_divergence_of_a_cost(backend: str) -> None:
    costs = [problem(5, 5)[0].requires_grad_() for _ in range(3)]
    for cost in costs:
        with torch.no_grad():
            cost.diagonal(dim1=-2, dim2=-1).fill_(0.0)  # uniform marginals have a plan
    loss = SinkhornLoss(eps=EPS, objective="divergence", backend=backend, tol=1e-11, max_iter=3000)
    value = loss(costs[0], cost_xx=costs[1], cost_yy=costs[2])
    between, within_x, within_y = (cost.detach().clamp(max=LARGE) for cost in costs)
    large = loss(between, cost_xx=within_x, cost_yy=within_y)
    torch.testing.assert_close(value, large, atol=1e-9, rtol=1e-9)
    for cost, grad in zip(costs, torch.autograd.grad(value, costs), strict=True):
        assert grad.isfinite().all() and not grad[cost == torch.inf].any()


@pytest.mark.parametrize("size", [3, 70])
def test_a_plan_that_does_not_exist_does_not_converge(backend: str, size: int) -> None:
    """Every row but one can only go to the first column, which takes too little."""
    cost = torch.full((size, size), torch.inf)
    cost[:, 0], cost[0] = 0.0, 0.5
    cost.requires_grad_()
    with pytest.warns(otloss.ConvergenceWarning, match="did not reach tol"):
        out = sinkhorn(cost, eps=EPS, max_iter=200, backend=backend)
    assert not out.converged and out.marginal_error > 0.1
    assert out.f.isfinite().all() and not out.plan[cost == torch.inf].any() and out.transport_cost.isfinite()
    (grad,) = torch.autograd.grad(out.value, cost)
    assert grad.isfinite().all() and not grad[cost == torch.inf].any()


@pytest.mark.parametrize("solver", ["auto", "plain"])
@pytest.mark.parametrize("tol", [1e-5, 0.0])
@pytest.mark.parametrize("size", [6, 70])
def test_mass_that_has_nowhere_to_go_is_named(backend: str, size: int, tol: float, solver: str) -> None:
    cost = torch.rand(2, size, size)
    options = {"backend": backend, "tol": tol, "max_iter": 20, "solver": solver}
    bad = cost.clone()
    bad[1, 3] = torch.inf
    with pytest.raises(ValueError, match=r"^cost must be finite .* row 3 of problem 1 is forbidden .* to all columns"):
        sinkhorn(bad, **options)
    bad = cost.clone()
    bad[0, :, 2] = torch.inf
    with pytest.raises(ValueError, match=r"column 2 of problem 0 is forbidden .* to all rows"):
        sinkhorn(bad, **options)
    mask = torch.arange(size) != 1
    bad = cost.clone()
    bad[1, 4, mask] = torch.inf  # finite for a column without mass alone
    with pytest.raises(ValueError, match="row 4 of problem 1"):
        sinkhorn(bad, b=mask.float() / mask.sum(), **options)


@pytest.mark.parametrize("place", [(0, 0), (0, 3), (2, 1)])
def test_what_no_output_shows_is_looked_at(backend: str, place: tuple[int, int]) -> None:
    """Of points without mass: nothing follows from inf; NaN and -inf are errors."""
    cost, a, b = torch.rand(3, 4), torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.0, 0.25, 0.25, 0.5])
    for bad, name in ((torch.nan, "NaN"), (-torch.inf, "-inf")):
        cost[place] = bad
        with pytest.raises(ValueError, match=rf"^cost must be finite, got {name}; inf forbids a pair"):
            sinkhorn(cost, a, b, backend=backend)
    cost[place] = torch.inf
    given = [t.requires_grad_() for t in (cost, a, b)]
    out = sinkhorn(*given, backend=backend)
    grads = torch.autograd.grad(out.value + out.plan.square().sum(), given)
    assert out.f.isfinite().all() and all(g.isfinite().all() for g in grads) and grads[0][place] == 0


def test_relaxed_mass_that_has_nowhere_to_go_is_named() -> None:
    cost = torch.rand(4, 5)
    cost[1] = torch.inf
    with pytest.raises(ValueError, match="row 1 of problem 0"):
        sinkhorn(cost, rho_a=1.0, rho_b=1.0, backend="reference", max_iter=5)


def test_relaxed_points_without_mass() -> None:
    cost, a, b = problem(5, 4)
    a[:, 2], cost[:, 2] = 0, torch.inf
    given = [t.requires_grad_() for t in (cost, a, b)]
    out = sinkhorn(*given, eps=EPS, rho_a=0.5, rho_b=1.0, tol=1e-12, max_iter=3000)
    rows = [0, 1, 3, 4]
    crop = sinkhorn(cost[:, rows], a[:, rows], b, eps=EPS, rho_a=0.5, rho_b=1.0, tol=1e-12, max_iter=3000)
    torch.testing.assert_close(out.plan[:, rows], crop.plan)
    grads = torch.autograd.grad((out.transport_cost + out.value).sum() + out.f.square().sum(), given)
    assert all(g.isfinite().all() for g in grads) and not grads[0][cost == torch.inf].any()


def test_transforms_and_half_precision() -> None:
    cost, a, b = problem(5, 4, batch=3, dtype=torch.float32)

    def loss(cost: Tensor, eps: Tensor) -> Tensor:
        return sinkhorn(cost, a[0], b[0], eps=eps, max_iter=50, tol=0.0).value.sum()

    same = torch.where(cost[:1] < torch.inf, torch.rand_like(cost), torch.inf)
    eps = torch.tensor(0.3)
    want = torch.func.grad(loss, argnums=(0, 1))(same, eps)
    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(same, eps)
    assert relative(each[0], want[0]) < 1e-5 and relative(each[1].sum(), want[1]) < 1e-5
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert abs(float(compiled(same, eps) - loss(same, eps))) < 1e-5
    half = same.half().requires_grad_()
    out = sinkhorn(half, a[0], b[0], eps=0.3)
    (grad,) = torch.autograd.grad(out.value.sum(), half)
    assert grad.isfinite().all() and not grad[half == torch.inf].any() and not out.plan[half == torch.inf].any()
