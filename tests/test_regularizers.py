"""VICReg's variance and covariance: printed formulas, both ways of computing, autocast, and the distributed gather."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from otloss.regularizers import CovarianceLoss, VarianceLoss


def literal_variance(z: Tensor, gamma: float, eps: float) -> float:
    """VICReg Eq. 1, one dimension at a time."""
    total = 0.0
    for column in z.T.tolist():
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / (len(column) - 1)
        total += max(0.0, gamma - (variance + eps) ** 0.5)
    return total / z.shape[1]


def literal_covariance(z: Tensor) -> float:
    """VICReg Eq. 3 and 4, one pair of dimensions at a time."""
    rows, dim = z.tolist(), z.shape[1]
    means = [sum(row[j] for row in rows) / len(rows) for j in range(dim)]
    total = 0.0
    for i in range(dim):
        for j in range(dim):
            if i != j:
                cov = sum((row[i] - means[i]) * (row[j] - means[j]) for row in rows) / (len(rows) - 1)
                total += cov**2
    return total / dim


@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_variance_is_the_printed_formula(gamma: float) -> None:
    z = torch.randn(7, 5, dtype=torch.float64) * torch.tensor([0.0, 0.1, 0.5, 1.0, 3.0], dtype=torch.float64) + 4
    assert VarianceLoss(gamma, eps=1e-3)(z).item() == pytest.approx(literal_variance(z, gamma, 1e-3), rel=1e-12)


# Both sides of the switch between the D×D and the B×B product, and the switch itself (2B = D).
@pytest.mark.parametrize(("batch", "dim"), [(20, 3), (4, 7), (4, 8), (4, 9), (3, 30), (2, 1)])
def test_covariance_is_the_printed_formula(batch: int, dim: int) -> None:
    z = torch.randn(batch, dim, dtype=torch.float64) @ torch.randn(dim, dim, dtype=torch.float64) + 2
    assert CovarianceLoss()(z).item() == pytest.approx(literal_covariance(z), rel=1e-11, abs=1e-13)


def test_one_large_dimension_does_not_drown_the_others() -> None:
    scale = torch.full((64,), 0.01).index_fill(0, torch.tensor([5]), 3000.0)
    z = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * scale
    exact = CovarianceLoss()(z.double())
    assert float(CovarianceLoss()(z)) == pytest.approx(float(exact), rel=1e-5)


def test_hand_computed() -> None:
    z = torch.tensor([[1.0, 2.0], [3.0, 2.0]])  # variances 2 and 0, covariance 0
    assert VarianceLoss(gamma=1.0, eps=1e-4)(z).item() == pytest.approx((0 + 1 - 0.01) / 2)
    assert CovarianceLoss()(z).item() == 0.0
    z = torch.tensor([[0.0, 0.0], [2.0, -4.0]])  # covariance -4, in two cells of two dimensions
    assert CovarianceLoss()(z).item() == pytest.approx(16.0)


def test_twice_the_published_code_for_variance_and_the_same_for_covariance() -> None:
    """lightly copies VICReg's published code, which halves the variance of the two branches but not the covariance."""
    reference = pytest.importorskip("lightly.loss.vicreg_loss")
    x, y = torch.randn(16, 24), torch.randn(16, 24)
    theirs = 0.5 * (reference.variance_loss(x, 1e-4) + reference.variance_loss(y, 1e-4))
    ours = VarianceLoss()(x) + VarianceLoss()(y)
    assert ours.item() == pytest.approx(2 * theirs.item(), rel=1e-5)
    assert CovarianceLoss()(x).item() == pytest.approx(reference.covariance_loss(x).item(), rel=1e-5)


@pytest.mark.parametrize(("batch", "dim"), [(6, 3), (3, 8)])
def test_gradients(batch: int, dim: int) -> None:
    z = torch.randn(batch, dim, dtype=torch.float64) * 0.5
    z.requires_grad_()
    assert torch.autograd.gradcheck(VarianceLoss(), z)
    assert torch.autograd.gradcheck(CovarianceLoss(), z)


def test_collapsed_embedding_has_a_finite_gradient() -> None:
    z = torch.ones(8, 4, requires_grad=True)
    loss = VarianceLoss()(z) + CovarianceLoss()(z)
    loss.backward()
    assert loss.item() == pytest.approx(0.99)
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_compute_in_float32(dtype: torch.dtype) -> None:
    z = torch.randn(64, 32)
    exact = [VarianceLoss()(z.to(dtype).float()), CovarianceLoss()(z.to(dtype).float())]
    assert [VarianceLoss()(z.to(dtype)), CovarianceLoss()(z.to(dtype))] == exact
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert CovarianceLoss()(z.to(dtype)) == exact[1]  # the product would be bfloat16
        assert VarianceLoss()(z.to(dtype)).dtype == torch.float32
    assert VarianceLoss()(z.double()).dtype == torch.float64


@pytest.mark.parametrize("loss", [VarianceLoss(), CovarianceLoss()])
@pytest.mark.parametrize(
    ("z", "error", "message"),
    [
        (torch.randn(1, 4), ValueError, r"z must have at least 2 rows.*\(1, 4\)"),
        (torch.randn(4), ValueError, r"z must have shape \(B, D\).*\(4,\)"),
        (torch.randn(2, 3, 4), ValueError, r"z must have shape \(B, D\).*\(2, 3, 4\)"),
        (torch.randn(2, 0), ValueError, r"z must have shape \(B, D\).*\(2, 0\)"),
        (torch.ones(4, 4, dtype=torch.int64), TypeError, r"z must be a floating-point tensor.*int64"),
        ([[1.0], [2.0]], TypeError, r"z must be a tensor.*list"),
    ],
)
def test_bad_input(loss: torch.nn.Module, z: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loss(z)


@pytest.mark.parametrize(
    ("options", "error"), [({"gamma": 0.0}, ValueError), ({"eps": -1.0}, ValueError), ({"gamma": "1"}, TypeError)]
)
def test_bad_options(options: dict, error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        VarianceLoss(**options)


def _layer_and_data(world: int) -> tuple[torch.nn.Linear, Tensor]:
    torch.manual_seed(0)
    return torch.nn.Linear(6, 5).double(), 0.3 * torch.randn(4 * world, 6, dtype=torch.float64)


def _combined(z: Tensor, gather: bool) -> Tensor:
    return 25 * VarianceLoss(gather=gather)(z) + CovarianceLoss(gather=gather)(z)


def _worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    layer, data = _layer_and_data(world)
    parallel = torch.nn.parallel.DistributedDataParallel(layer)
    loss = _combined(parallel(data[rank * 4 : (rank + 1) * 4]), gather=True)
    loss.backward()
    torch.save([loss.detach(), layer.weight.grad], os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_gather_under_ddp_equals_one_process() -> None:
    """Value and parameter gradient over two processes are those of the whole batch in one."""
    world = 2
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, args=(world, folder), nprocs=world)
        results = [torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=True) for rank in range(world)]
    layer, data = _layer_and_data(world)
    loss = _combined(layer(data), gather=False)
    loss.backward()
    for value, grad in results:
        torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, layer.weight.grad, rtol=1e-10, atol=1e-12)
    # The halves' own losses differ from the whole's, so that the comparison above says something.
    halves = torch.stack([_combined(layer(part), gather=False) for part in data.chunk(world)]).mean()
    assert (halves - loss).abs() > 1e-3 * loss.abs()


def test_gather_without_process_group_is_local() -> None:
    z = torch.randn(4, 3)
    assert VarianceLoss(gather=True)(z) == VarianceLoss()(z)
