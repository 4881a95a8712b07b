"""``partial=s``: only a mass of s is sent. The minimum, its gradients, and exact partial transport as eps goes to 0."""

from __future__ import annotations

from typing import Any

import ot
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import otloss
from otloss import sinkhorn

EPS = 0.3
EXACT = {"tol": 1e-13, "max_iter": 10_000}


def problem(batch: int = 2, n: int = 5, m: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """A cost, and masses of different totals."""
    cost = torch.rand(batch, n, m, dtype=torch.float64) + 0.1
    return cost, *(0.1 + torch.rand(batch, k, dtype=torch.float64) for k in (n, m))


def share(a: Tensor, b: Tensor, part: float) -> Tensor:
    return part * torch.minimum(a.sum(-1), b.sum(-1))


@pytest.mark.parametrize("size", [(5, 4), (70, 66)])
@pytest.mark.parametrize("part", [0.3, 0.9, 1.0])
def test_the_plan_is_the_minimum(backend: str, part: float, size: tuple[int, int]) -> None:
    cost, a, b = problem(2, *size)
    sent = share(a, b, part)
    out = sinkhorn(cost, a, b, eps=EPS, partial=sent, backend=backend, **EXACT)
    assert bool(out.converged.all()) and out.plan.shape == cost.shape
    torch.testing.assert_close(out.plan.sum((-1, -2)), sent)
    assert (out.plan.sum(-1) < a * (1 + 1e-9)).all() and (out.plan.sum(-2) < b * (1 + 1e-9)).all()
    torch.testing.assert_close(out.transport_cost, (out.plan * cost).sum((-1, -2)))

    total = (a.sum(-1) + b.sum(-1) - sent)[:, None, None]
    left_a, left_b = (a.sum(-1) - sent)[:, None], (b.sum(-1) - sent)[:, None]

    def value(plan: Tensor) -> Tensor:
        """<T, C> + eps sum T' log(T' M / (a' b')), the slack's rows and columns written out."""
        xlogy = torch.special.xlogy
        unsent, ungot = (a - plan.sum(-1)).clamp(min=0), (b - plan.sum(-2)).clamp(min=0)
        inner = xlogy(plan, plan * total / (a.unsqueeze(-1) * b.unsqueeze(-2))).sum((-1, -2))
        by_rows = xlogy(unsent, unsent * total[..., 0] / (a * left_a.clamp(min=1e-300))).sum(-1)
        by_columns = xlogy(ungot, ungot * total[..., 0] / (b * left_b.clamp(min=1e-300))).sum(-1)
        slack = by_rows * (left_a[:, 0] > 1e-9) + by_columns * (left_b[:, 0] > 1e-9)
        return (plan * cost).sum((-1, -2)) + EPS * (inner + slack)

    torch.testing.assert_close(out.value, value(out.plan), atol=1e-7, rtol=1e-7)
    if part < 1:
        for _ in range(5):
            change = torch.randn_like(cost)
            change = change - change.mean((-1, -2), keepdim=True)
            rooms = [(a - out.plan.sum(-1)).amin(-1) / size[1], (b - out.plan.sum(-2)).amin(-1) / size[0]]
            room = torch.minimum(out.plan.amin((-1, -2)), torch.minimum(*rooms))
            moved = out.plan + 0.2 * room[:, None, None] * change / change.abs().amax((-1, -2), keepdim=True)
            assert (value(moved) > out.value).all()
    whole = a.unsqueeze(-1) * b.unsqueeze(-2) / total
    kernel = torch.exp((out.f.unsqueeze(-1) + out.g.unsqueeze(-2) - cost) / EPS)
    torch.testing.assert_close(out.plan, whole * kernel)
    torch.testing.assert_close((a * out.f).sum(-1), (b * out.g).sum(-1))
    torch.testing.assert_close(out.log_plan, out.plan.log(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_becomes_exact_partial_transport(backend: str, part: float) -> None:
    """eps adds at most eps KL(T'|a'b'/M) of the exact plan to the cost, and T' M / (a'b') <= M / min(a', b')."""
    cost, a, b = problem(1, 6, 5)
    a, b = a / a.sum(), 0.8 * b / b.sum()
    sent = part * 0.8
    want = ot.partial.partial_wasserstein(a[0].numpy(), b[0].numpy(), cost[0].numpy(), m=sent)
    exact, total = float((torch.from_numpy(want) * cost[0]).sum()), 1.8 - sent
    masses = torch.cat((a[0], b[0], torch.tensor([1 - sent, 0.8 - sent], dtype=torch.float64)))
    most = total * float(torch.log(total / masses[masses > 1e-9].min()))
    for eps in (1e-2, 2e-4):
        options = {"eps": eps, "partial": sent, "tol": 1e-9, "max_iter": 100_000, "backend": backend}
        out = sinkhorn(cost, a, b, **options)
        assert -1e-8 < float(out.transport_cost) - exact < most * eps
    torch.testing.assert_close(out.plan[0], torch.from_numpy(want), atol=1e-3, rtol=0.0)


@pytest.mark.parametrize("kind", ["dense", "logs", "eps", "all", "unroll"])
def test_gradients(backend: str, kind: str) -> None:
    cost, a, b = problem(2, 4, 3)
    if kind != "all":
        sent = share(a, b, 0.6).requires_grad_()
    else:  # everything of a is sent: the derivative by its mass is along s = the total of a
        sent = torch.zeros(2, dtype=torch.float64).requires_grad_()
        b = b * (2 * a.sum(-1) / b.sum(-1)).unsqueeze(-1)
    leaves = [t.requires_grad_() for t in (cost, a, b, sent)]
    if kind == "eps":
        leaves.append(torch.tensor(0.3, dtype=torch.float64).requires_grad_())

    def outputs(cost: Tensor, a: Tensor, b: Tensor, sent: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        masses = {"log_a": a.log(), "b": b} if kind == "logs" else {"a": a, "b": b}
        options: dict[str, Any] = {"eps": more[0] if more else EPS, "backend": backend, **EXACT}
        if kind == "all":
            sent = a.sum(-1) + 0 * sent
        if kind == "unroll":
            options |= {"gradient": "unroll", "tol": 0.0, "max_iter": 6}
        out = sinkhorn(cost, **masses, partial=sent, **options)
        if kind == "unroll":
            return out.transport_cost, out.value
        return out.transport_cost, out.value, out.plan, out.log_plan, out.f, out.g

    assert gradcheck(outputs, leaves, atol=1e-6, rtol=1e-5, fast_mode=kind != "dense")
    if backend == "reference" and kind == "dense":
        assert gradgradcheck(outputs, leaves, atol=1e-4, rtol=1e-3, fast_mode=True)


def test_the_plan_as_a_constant() -> None:
    cost, a, b = (t.requires_grad_() for t in problem())
    out = sinkhorn(cost, a, b, eps=EPS, partial=share(a, b, 0.5), gradient="none", **EXACT)
    assert not out.value.requires_grad and not out.plan.requires_grad and not out.f.requires_grad
    by_cost, by_a = torch.autograd.grad(out.transport_cost.sum(), (cost, a), allow_unused=True)
    assert by_a is None
    torch.testing.assert_close(by_cost, out.plan)


@pytest.mark.parametrize("kind", ["cosine", "sqeuclidean"])
def test_features(backend: str, kind: str) -> None:
    x, y = (torch.randn(2, k, 3, dtype=torch.float64).requires_grad_() for k in (6, 5))
    options = {"eps": 0.5, "partial": 0.7, "backend": backend, **EXACT}
    mask = torch.tensor([True, True, False, True, True])
    out = otloss.feature_sinkhorn(x, y, cost=kind, mask_y=mask, **options)
    made = {"cosine": otloss.cosine_cost, "sqeuclidean": otloss.sqeuclidean_cost}[kind](x, y[:, mask])
    dense = sinkhorn(made, **options)
    torch.testing.assert_close(out.plan[..., mask], dense.plan)
    assert not out.plan[..., 2].any() and not out.g[:, 2].any()
    pairs = zip(*(torch.autograd.grad(o.value.sum(), (x, y)) for o in (out, dense)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_all_of_equal_totals_is_the_balanced_problem(backend: str) -> None:
    cost, a, b = problem()
    a, b = 2 * a / a.sum(-1, keepdim=True), 2 * b / b.sum(-1, keepdim=True)
    options = {"eps": EPS, "backend": backend, **EXACT}
    out, whole = sinkhorn(cost, a, b, partial=2.0, **options), sinkhorn(cost, a, b, **options)
    torch.testing.assert_close(out.plan, 2 * whole.plan)
    torch.testing.assert_close(out.value, 2 * whole.value)
    torch.testing.assert_close(out.f, whole.f)


def test_an_offset_costs_no_digits(backend: str) -> None:
    """As in test_offsets.py: float32 against the float64 problem of the rounded cost."""
    cost = (torch.rand(2, 20, 18) + 1e4).requires_grad_()
    options = {"eps": EPS, "partial": 0.6, "max_iter": 2000}
    out = sinkhorn(cost, tol=1e-6, backend=backend, **options)
    want = sinkhorn(cost.detach().double(), tol=1e-11, backend="reference", **options)
    assert out.converged.all()
    known = 10 * 1e-6 + 16 * 2**-24 * 2 / EPS
    assert ((out.plan - want.plan).abs() < known * want.plan.max()).all()
    assert ((out.transport_cost - want.transport_cost).abs() < 8 * 2**-24 * 1e4).all()


def test_what_is_made_of_the_plan(backend: str) -> None:
    """Two rows match, the third is far from all: it is left, and takes no column."""
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 3.0]], dtype=torch.float64)
    a, b = torch.ones(3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    out = sinkhorn(cost, a, b, eps=0.1, partial=2.0, backend=backend, tol=1e-10)
    assert otloss.assign(out).tolist() == [0, 1, -1] and otloss.assign(out, mutual=True).tolist() == [0, 1, -1]
    y = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(otloss.barycentric(out, y), (out.plan @ y) / out.plan.sum(-1, keepdim=True))
    summary = out.summary()
    assert (summary.n, summary.m) == (3, 2) and summary.perplexity_a == pytest.approx(3)
    assert summary.matched == pytest.approx(2 * 2 / 5)
    forbidden = cost.clone()
    forbidden[2] = torch.inf  # with nowhere to go, all of its mass is left
    out = sinkhorn(forbidden, a, b, eps=0.1, partial=1.5, backend=backend, tol=1e-10)
    assert bool(out.converged) and not out.plan[2].any() and float(out.plan.sum()) == pytest.approx(1.5)


def test_barycentric_means_have_the_gradient_of_their_plan(backend: str) -> None:
    cost, a, b = problem(1, 4, 3)
    y = torch.randn(3, 2, dtype=torch.float64)

    def means(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        out = sinkhorn(cost, a, b, eps=EPS, partial=0.4, backend=backend, **EXACT)
        return otloss.barycentric(out, y)

    assert gradcheck(means, [t.requires_grad_() for t in (cost, a, b)], atol=1e-6, rtol=1e-5)


def test_bad_input_is_named() -> None:
    cost, a, b = problem()
    most = torch.minimum(a.sum(-1), b.sum(-1))
    with pytest.raises(ValueError, match=r"^partial must be at most the smaller .* in problem 1"):
        sinkhorn(cost, a, b, partial=torch.stack((most[0], 1.1 * most[1])))
    with pytest.raises(ValueError, match=r"^partial must be positive"):
        sinkhorn(cost, a, b, partial=0.0)
    with pytest.raises(ValueError, match=r"^partial must be positive and finite in every problem"):
        sinkhorn(cost, a, b, partial=torch.tensor([0.1, -0.1], dtype=torch.float64))
    with pytest.raises(TypeError, match=r"^partial must be a number"):
        sinkhorn(cost, a, b, partial="0.5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give partial, or rho_a and rho_b, not both"):
        sinkhorn(cost, a, b, partial=0.1, rho_a=1.0)
    with pytest.raises(ValueError, match="must not hold negative mass"):  # not looked at before, under vmap
        torch.func.vmap(lambda c, s: sinkhorn(c, partial=s).value)(cost, torch.tensor([0.5, 1.5], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"broadcastable.* partial \(3,\)"):
        sinkhorn(cost, a, b, partial=torch.ones(3, dtype=torch.float64))


def test_transforms() -> None:
    cost, a, b = problem(3)

    def loss(cost: Tensor, a: Tensor, sent: Tensor) -> Tensor:
        out = sinkhorn(cost, a, b[0], eps=EPS, partial=sent, tol=1e-12)
        return out.value.sum() + out.plan.square().sum()

    sent = torch.tensor(0.3, dtype=torch.float64)
    want = [torch.func.grad(loss, (0, 1, 2))(cost[k], a[k], sent) for k in range(3)]
    each = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (0, 0, None))(cost, a, sent)
    for mine, theirs in zip(each, zip(*want, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.stack(theirs))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(cost, a, sent), loss(cost, a, sent))


@pytest.mark.parametrize("objective", ["transport_cost", "value"])
def test_the_losses_are_the_functions(backend: str, objective: str) -> None:
    """Value and gradients, also by the share where that is a parameter of the module."""
    x, y = (torch.randn(3, k, 4, dtype=torch.float64).requires_grad_() for k in (5, 6))
    a, b = (0.1 + torch.rand(3, k, dtype=torch.float64) for k in (5, 6))
    sent = torch.nn.Parameter(share(a, b, 0.6))
    options: dict[str, Any] = {"eps": EPS, "partial": sent, "backend": backend, **EXACT}
    shown = {"objective": objective, "reduction": "none"}
    dense = otloss.SinkhornLoss(**options, **shown)
    assert dict(dense.named_parameters()) == {"partial": sent}
    cosine, squared = otloss.cosine_cost(x, y), otloss.sqeuclidean_cost(x, y)
    of_cosine, of_squared = (sinkhorn(cost, a, b, **options) for cost in (cosine, squared))
    pairs = (
        (dense(cosine, a, b), of_cosine),
        (otloss.CosineSinkhornLoss(**options, **shown)(x, y, a, b), of_cosine),
        (otloss.FeatureSinkhornLoss("sqeuclidean", **options, **shown)(x, y, a, b), of_squared),
    )
    for loss, out in pairs:
        wanted = getattr(out, objective)
        assert loss.shape == (3,)
        torch.testing.assert_close(loss, wanted)
        mine, theirs = (torch.autograd.grad(t.sum(), (x, y, sent), retain_graph=True) for t in (loss, wanted))
        assert all(grad.abs().max() > 1e-3 for grad in mine)
        torch.testing.assert_close(mine, theirs)


def test_a_loss_of_sets_of_different_sizes() -> None:
    x, y = [torch.randn(k, 3) for k in (5, 8)], [torch.randn(k, 3) for k in (6, 4)]
    loss = otloss.CosineSinkhornLoss(partial=0.4, reduction="none", tol=1e-7)
    alone = [otloss.CosineSinkhornLoss(partial=0.4, tol=1e-7)(*pair) for pair in zip(x, y, strict=True)]
    torch.testing.assert_close(loss(x, y), torch.stack(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss", [otloss.SinkhornLoss, otloss.FeatureSinkhornLoss, otloss.CosineSinkhornLoss])
def test_what_a_loss_refuses_is_named(loss: type[otloss.SinkhornLoss]) -> None:
    with pytest.raises(ValueError, match=r"^partial must be positive"):
        loss(partial=-0.5)
    with pytest.raises(TypeError, match=r"^partial must be a number"):
        loss(partial="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"objective 'divergence' does not take partial, got partial=0.5"):
        loss(objective="divergence", partial=0.5)
    for rho in ("rho_a", "rho_b"):
        with pytest.raises(ValueError, match="give partial, or rho_a and rho_b, not both"):
            loss(partial=0.5, **{rho: 1.0})
    assert "partial=0.5" in repr(loss(partial=0.5)) and "partial" not in repr(loss())
