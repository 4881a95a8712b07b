"""``sqeuclidean_cost``: exact to the rounding of float32 wherever the points lie, never negative, twice differentiable.

In float32 the points are given to u = 2^-24 of themselves. A cost made of these points has one rounding of its own,
plus what float64 leaves of the cancellation, 2^-53 of the squared spread of the points around their mean.
"""

from __future__ import annotations

import geomloss
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from otloss import sinkhorn, sqeuclidean_cost

U = 2**-24


def by_differences(x: Tensor, y: Tensor) -> Tensor:
    return (x.double().unsqueeze(-2) - y.double().unsqueeze(-3)).square().sum(-1)


@pytest.mark.parametrize("d", [1, 3, 200])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_is_the_sum_of_squared_differences(batch: tuple[int, ...], d: int) -> None:
    x, y = torch.randn(*batch, 6, d), torch.randn(*batch, 4, d)
    want = by_differences(x, y)
    assert sqeuclidean_cost(x, y).dtype == torch.float32 and sqeuclidean_cost(x, y).shape == (*batch, 6, 4)
    assert ((sqeuclidean_cost(x, y) - want).abs() <= 2 * U * want).all()
    double = sqeuclidean_cost(x.double(), y.double())
    # 2 d products of at most 36 each, of which the sum is what is left.
    assert double.dtype == torch.float64 and ((double - want).abs() <= 2**-53 * 8 * d * 36).all()


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e6, 1e9])
def test_a_common_offset_costs_no_digits(offset: float) -> None:
    x, y = torch.rand(2, 30, 3) + offset, torch.rand(2, 20, 3) + offset
    leaf = x.clone().requires_grad_()
    cost, want = sqeuclidean_cost(leaf, y), by_differences(x, y)
    spread = max(1.0, float(want.max()))
    assert ((cost - want).abs() <= 2 * U * want + 2**-50 * spread).all()
    weight = torch.randn(2, 30, 20)
    (grad,) = torch.autograd.grad((weight * cost).sum(), leaf)
    difference = x.double().unsqueeze(-2) - y.double().unsqueeze(-3)
    terms = 2 * weight.unsqueeze(-1) * difference
    assert ((grad - terms.sum(-2)).abs() <= 2 * U * terms.sum(-2).abs() + 2**-48 * spread).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_equal_points_cost_nothing(dtype: torch.dtype, offset: float) -> None:
    x = (torch.randn(5, 7, dtype=torch.double) + offset).to(dtype).requires_grad_()
    cost = sqeuclidean_cost(x, x.detach())
    rounding = 2**-53 * 8 * 7 * 36  # see above
    assert (cost >= 0).all() and (cost.diagonal() <= rounding).all()
    (grad,) = torch.autograd.grad(cost.diagonal().sum(), x, retain_graph=True)
    assert grad.abs().max() <= 2**-53 * 8 * 6
    (root,) = torch.autograd.grad((cost + 1e-12).sqrt().sum(), x)
    assert root.isfinite().all()
    same = torch.full((4, 3), 0.1, dtype=dtype)
    assert (sqeuclidean_cost(same, same) <= 2**-53).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_that_of_a_set_with_itself_is_symmetric(dtype: torch.dtype) -> None:
    """Bit for bit, however the product rounds; a problem whose sets differ is left as it is."""
    for n, d in ((5, 3), (70, 3), (131, 40)):
        x, other = (torch.randn(k, n, d, dtype=dtype) for k in (3, 1))
        cost = sqeuclidean_cost(x, torch.cat((x[:2], other)))
        assert torch.equal(cost[:2], cost[:2].mT) and not torch.equal(cost[2], cost[2].mT)
        mapped = torch.func.vmap(sqeuclidean_cost)(x, x)
        assert torch.equal(mapped, mapped.mT)


def test_two_far_clusters() -> None:
    """Distances within a cluster keep their digits beside one 1e4 times as large."""
    x = torch.cat((torch.rand(5, 2), torch.rand(5, 2) + 1e4))
    want = by_differences(x, x)
    assert ((sqeuclidean_cost(x, x) - want).abs() <= 2 * U * want + 2**-50 * 1e8).all()


def test_gradients() -> None:
    x, y = (torch.randn(2, n, 3, dtype=torch.double, requires_grad=True) for n in (5, 4))
    assert gradcheck(sqeuclidean_cost, (x, y)) and gradgradcheck(sqeuclidean_cost, (x, y))
    same = x.detach().clone().requires_grad_()
    assert gradcheck(lambda z: sqeuclidean_cost(z, z).masked_fill(torch.eye(5, dtype=torch.bool), 0.0), same)


def test_gradients_through_the_solver(backend: str) -> None:
    x, y = (torch.rand(n, 2, dtype=torch.double, requires_grad=True) for n in (5, 4))
    z = torch.randn(5, dtype=torch.double, requires_grad=True)

    def loss(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        out = sinkhorn(sqeuclidean_cost(x, y), log_a=z.log_softmax(-1), eps=0.2, tol=1e-13, backend=backend)
        return out.transport_cost

    assert gradcheck(loss, (x, y, z))


def test_geomloss_has_half_of_it(backend: str) -> None:
    x, y = torch.rand(30, 2, dtype=torch.double), torch.rand(20, 2, dtype=torch.double)
    peer = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.4, scaling=0.99, debias=False, backend="tensorized")(x, y)
    value = sinkhorn(sqeuclidean_cost(x, y), eps=2 * 0.4**2, tol=1e-12, backend=backend).value
    assert abs(float(value) / 2 - float(peer)) < 1e-6  # geomloss stops after a fixed number of iterations


def test_under_autocast() -> None:
    x, y = torch.randn(5, 3), torch.randn(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = by_differences(x, y)
        assert ((sqeuclidean_cost(x, y) - want).abs() <= 2 * U * want + 2**-45).all()
        assert sqeuclidean_cost(x.half(), y.half()).dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.rand(3, 4), torch.rand(3, 5), ValueError, "one dimension d"),
        (torch.rand(2, 3, 4), torch.rand(3, 4), ValueError, "same leading dimensions"),
        (torch.rand(3, 4), torch.rand(3, 4).double(), TypeError, "float64 does not mix"),
        (torch.ones(3, 4).long(), torch.rand(3, 4), TypeError, "x must be a floating-point"),
        (torch.rand(0, 4), torch.rand(3, 4), ValueError, "at least one row"),
    ],
)
def test_bad_input(x: Tensor, y: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sqeuclidean_cost(x, y)
