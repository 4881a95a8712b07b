"""The transport losses: each is its function, its objective and its reduction, and nothing else."""

from __future__ import annotations

import itertools

import ot
import pytest
import torch
from torch import Tensor

import otloss
from otloss.losses import CosineCost, CosineSinkhornLoss, SinkhornLoss

F64 = torch.float64


@pytest.fixture
def features() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y, a, b of three problems with n ≠ m and non-uniform masses."""
    x, y = torch.randn(3, 5, 4, dtype=F64), torch.randn(3, 7, 4, dtype=F64)
    return x, y, torch.randn(3, 5, dtype=F64).softmax(-1), torch.randn(3, 7, dtype=F64).softmax(-1)


def test_cosine_cost_is_the_function(features: tuple[Tensor, ...]) -> None:
    x, y, *_ = features
    assert torch.equal(CosineCost()(x, y), otloss.cosine_cost(x, y))
    torch.testing.assert_close(CosineCost()(x, y), 1 - torch.cosine_similarity(x[:, :, None], y[:, None], dim=-1))


@pytest.mark.parametrize("objective", ["transport_cost", "value"])
def test_agrees_with_pot(objective: str, features: tuple[Tensor, ...]) -> None:
    x, y, a, b = features
    cost = otloss.cosine_cost(x, y)
    options = {"eps": 0.2, "objective": objective, "max_iter": 5000, "tol": 1e-12, "reduction": "none"}
    dense = SinkhornLoss(**options)(cost, a, b)
    factored = CosineSinkhornLoss(**options)(x, y, a, b)
    for i in range(3):
        peer = ot.solve(cost[i].numpy(), a[i].numpy(), b[i].numpy(), reg=0.2, reg_type="KL", max_iter=20000, tol=1e-13)
        expected = peer.value_linear if objective == "transport_cost" else peer.value
        assert dense[i].item() == pytest.approx(expected, rel=1e-8)
        assert factored[i].item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("module", [SinkhornLoss, CosineSinkhornLoss])
def test_reductions(module: type[SinkhornLoss], features: tuple[Tensor, ...]) -> None:
    x, y, a, b = features
    data = (x, y) if module is CosineSinkhornLoss else (otloss.cosine_cost(x, y),)
    none = module(reduction="none")(*data, a, b)
    assert none.shape == (3,) and none.std() > 1e-3
    torch.testing.assert_close(module()(*data, a, b), none.mean())
    torch.testing.assert_close(module(reduction="sum")(*data, a, b), none.sum())


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_any_number_of_batch_dimensions(batch: tuple[int, ...]) -> None:
    x, y = torch.randn(*batch, 5, 4, dtype=F64), torch.randn(*batch, 6, 4, dtype=F64)
    for objective in ("transport_cost", "divergence"):
        assert CosineSinkhornLoss(0.3, objective, reduction="none")(x, y).shape == batch
        assert CosineSinkhornLoss(0.3, objective)(x, y).shape == ()


def test_masses_and_their_logarithms_are_the_same(features: tuple[Tensor, ...]) -> None:
    x, y, a, b = features
    for objective in ("transport_cost", "value", "divergence"):
        loss = CosineSinkhornLoss(eps=0.5, objective=objective)
        torch.testing.assert_close(loss(x, y, log_a=a.log(), log_b=b.log()), loss(x, y, a, b), rtol=1e-10, atol=1e-12)
        assert abs(loss(x, y) - loss(x, y, a, b)) > 1e-4  # and they matter
    cost = otloss.cosine_cost(x, y)
    torch.testing.assert_close(SinkhornLoss()(cost, log_a=a.log(), b=b), SinkhornLoss()(cost, a, b))


def test_divergence_is_its_definition(features: tuple[Tensor, ...]) -> None:
    x, y, a, b = features
    value = CosineSinkhornLoss(0.5, "value", tol=1e-10, max_iter=2000, reduction="none")
    divergence = CosineSinkhornLoss(0.5, "divergence", tol=1e-10, max_iter=2000, reduction="none")
    expected = value(x, y, a, b) - value(x, x, a, a) / 2 - value(y, y, b, b) / 2
    torch.testing.assert_close(divergence(x, y, a, b), expected, rtol=1e-10, atol=1e-12)
    assert (divergence(x, y, a, b) > 1e-3).all()
    # Zero for equal measures, also when their points come in another order; the value alone is not.
    order = torch.randperm(5)
    assert divergence(x, x[:, order], a, a[:, order]).abs().max() < 1e-9
    assert (value(x, x[:, order], a, a[:, order]) > 1e-3).all()


def test_hand_computed() -> None:
    """One row and one column each: the plan is the product of the masses, whatever eps is."""
    cost = torch.tensor([[0.25, 0.75]])
    assert SinkhornLoss()(cost, b=torch.tensor([0.5, 0.5])).item() == pytest.approx(0.5)
    assert SinkhornLoss(objective="value")(cost, b=torch.tensor([0.2, 0.8])).item() == pytest.approx(0.65)
    x, y = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0], [-3.0, 0.0]])  # cosines 0 and -1
    assert CosineSinkhornLoss()(x, y, b=torch.tensor([0.25, 0.75])).item() == pytest.approx(0.25 * 1 + 0.75 * 2)


@pytest.mark.parametrize("objective", ["transport_cost", "value", "divergence"])
@pytest.mark.parametrize("gradient", ["implicit", "unroll"])
def test_gradcheck(objective: str, gradient: str) -> None:
    x, y, z, w = (torch.randn(2, *shape, dtype=F64, requires_grad=True) for shape in ((4, 3), (5, 3), (4,), (5,)))
    loss = CosineSinkhornLoss(1.0, objective, max_iter=500, tol=1e-12, gradient=gradient, backend="reference")

    def function(x: Tensor, y: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return loss(x, y, log_a=z.log_softmax(-1), log_b=w.log_softmax(-1))

    assert torch.autograd.gradcheck(function, (x, y, z, w), atol=1e-6, fast_mode=True)
    if objective != "divergence":
        dense = SinkhornLoss(1.0, objective, max_iter=500, tol=1e-12, gradient=gradient, backend="reference")
        cost = torch.rand(2, 4, 5, dtype=F64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda cost, z: dense(cost, log_a=z.log_softmax(-1)), (cost, z), atol=1e-6, fast_mode=True
        )


def test_gradient_none_holds_the_plan() -> None:
    cost = torch.rand(4, 5, dtype=F64, requires_grad=True)
    SinkhornLoss(gradient="none")(cost).backward()
    torch.testing.assert_close(cost.grad, otloss.sinkhorn(cost.detach()).plan)


def test_backend_is_passed_on() -> None:
    with pytest.raises((ValueError, RuntimeError), match="abacus"):
        SinkhornLoss(backend="abacus")(torch.rand(3, 3))


def test_max_iter_and_tol_are_passed_on() -> None:
    cost = torch.rand(6, 6, dtype=F64)
    a = torch.randn(6, dtype=F64).softmax(-1)
    with pytest.warns(otloss.ConvergenceWarning):
        short = SinkhornLoss(eps=0.01, max_iter=1)(cost, a)
    long = SinkhornLoss(eps=0.01, max_iter=20000, tol=1e-9)(cost, a)
    assert abs(short - long) > 1e-3 * long


@pytest.mark.parametrize("module", [SinkhornLoss, CosineSinkhornLoss])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"eps": -1.0}, ValueError, "eps must be positive"),
        ({"eps": float("nan")}, ValueError, "eps"),
        ({"eps": "small"}, TypeError, "eps must be a number, got str"),
        ({"objective": "cost"}, ValueError, "objective must be one of 'transport_cost', 'value'.*got 'cost'"),
        ({"max_iter": 0}, ValueError, "max_iter must be at least 1"),
        ({"max_iter": 1.5}, TypeError, "max_iter must be an integer"),
        ({"tol": -1e-3}, ValueError, "tol must be at least 0"),
        ({"gradient": "exact"}, ValueError, "gradient must be one of"),
        ({"reduction": "median"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'median'"),
        ({"gradient": "none", "objective": "value"}, ValueError, "differentiates objective 'transport_cost' only"),
    ],
)
def test_bad_options(module: type[SinkhornLoss], options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        module(**options)


@pytest.mark.parametrize("by_log", [False, True])
def test_divergence_on_a_dense_cost(backend: str, by_log: bool) -> None:
    """The cosine cost given as a matrix: value and gradients are those of the features."""
    x, y, z, w = (torch.randn(2, *shape, dtype=F64, requires_grad=True) for shape in ((4, 3), (5, 3), (4,), (5,)))
    options = {"objective": "divergence", "tol": 1e-12, "max_iter": 2000, "reduction": "none", "backend": backend}
    log_a, log_b = z.log_softmax(-1), w.log_softmax(-1)
    masses = {"log_a": log_a, "log_b": log_b} if by_log else {"a": log_a.exp(), "b": log_b.exp()}
    cost = otloss.cosine_cost
    dense = SinkhornLoss(0.5, **options)(cost(x, y), **masses, cost_xx=cost(x, x), cost_yy=cost(y, y))
    factored = CosineSinkhornLoss(0.5, **options)(x, y, **masses)
    assert dense.shape == (2,)
    torch.testing.assert_close(dense, factored, rtol=1e-9, atol=1e-11)
    got, want = (torch.autograd.grad(loss.sum(), (x, y, z, w), retain_graph=True) for loss in (dense, factored))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("gradient", ["implicit", "unroll"])
def test_gradcheck_of_a_dense_divergence(gradient: str) -> None:
    """Three costs that know nothing of each other, none of them symmetric: the three gradients add up in the masses."""
    loss = SinkhornLoss(0.5, "divergence", max_iter=500, tol=1e-12, gradient=gradient, backend="reference")
    costs = [torch.rand(2, *shape, dtype=F64, requires_grad=True) for shape in ((4, 5), (4, 4), (5, 5))]
    z, w = (torch.randn(2, k, dtype=F64, requires_grad=True) for k in (4, 5))

    def function(cost: Tensor, xx: Tensor, yy: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return loss(cost, z.softmax(-1), log_b=w.log_softmax(-1), cost_xx=xx, cost_yy=yy)

    assert torch.autograd.gradcheck(function, (*costs, z, w), atol=1e-6, fast_mode=True)


def test_a_dense_divergence_is_zero_for_equal_sets() -> None:
    x = torch.randn(3, 6, 2, dtype=F64)
    order, a = torch.randperm(6), torch.randn(3, 6, dtype=F64).softmax(-1)
    cost, loss = otloss.sqeuclidean_cost, SinkhornLoss(0.5, "divergence", tol=1e-10, reduction="none")
    y = x[:, order]
    within = {"cost_xx": cost(x, x), "cost_yy": cost(y, y)}
    assert loss(cost(x, y), a, a[:, order], **within).abs().max() < 1e-9
    assert (loss(cost(x, y + 1), a, a[:, order], **within) > 0.1).all()


@pytest.mark.parametrize(
    ("within", "message"),
    [
        ({}, "objective 'divergence' needs .* missing: cost_xx and cost_yy"),
        ({"cost_xx": torch.rand(3, 3)}, "missing: cost_yy$"),
        ({"cost_yy": torch.rand(4, 4)}, "missing: cost_xx$"),
        ({"cost_xx": torch.rand(4, 4), "cost_yy": torch.rand(4, 4)}, r"cost_xx must have shape \(3, 3\), got \(4, 4\)"),
        ({"cost_xx": torch.rand(3, 3), "cost_yy": torch.rand(2, 4, 4)}, r"cost_yy must have shape \(4, 4\)"),
    ],
)
def test_what_a_dense_divergence_lacks_is_named(within: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SinkhornLoss(objective="divergence")(torch.rand(3, 4), **within)


def test_costs_within_the_sets_are_refused_by_other_objectives() -> None:
    with pytest.raises(ValueError, match="cost_xx must be given with objective 'divergence' only, got 'value'"):
        SinkhornLoss(objective="value")(torch.rand(3, 4), cost_xx=torch.rand(3, 3))
    with pytest.raises(TypeError, match="float64 does not mix"):
        within = {"cost_xx": torch.rand(3, 3).double(), "cost_yy": torch.rand(4, 4)}
        SinkhornLoss(objective="divergence")(torch.rand(3, 4), **within)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="x and y"):
        CosineSinkhornLoss()(torch.randn(3, 4), torch.randn(3, 5))
    with pytest.raises(TypeError, match="cost"):
        SinkhornLoss()([[0.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not both"):
        SinkhornLoss()(torch.rand(2, 2), torch.ones(2), log_a=torch.zeros(2))


def test_repr_shows_the_options() -> None:
    for eps, objective in itertools.product((0.05, 0.2), ("transport_cost", "value")):
        text = repr(SinkhornLoss(eps, objective, reduction="sum"))
        assert f"eps={eps}" in text and repr(objective) in text and "reduction='sum'" in text
