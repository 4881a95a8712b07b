"""Losses where PyTorch runs in several processes, and where it is asked to be deterministic."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import otloss

BATCH, POINTS, DIM = 4, 9, 6
SHARDS = not torch.__version__.startswith("2.6.")  # there fully_shard asks for events, which streams of CPUs lack


class Model(nn.Module):
    """A layer with the loss behind it, whose eps is a parameter. Its loss is the mean over the images it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, DIM, dtype=torch.float64)
        self.log_eps = nn.Parameter(torch.full((1,), -1.0, dtype=torch.float64))
        self.loss = otloss.CosineSinkhornLoss(objective="divergence", tol=1e-12, max_iter=5000)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.loss.eps = self.log_eps.exp()
        return self.loss(self.layer(x), self.layer(y))


def model_and_data() -> tuple[Model, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x, y = (torch.randn(BATCH, k, DIM, generator=generator, dtype=torch.float64) for k in (POINTS, POINTS + 2))
    return Model(), x, y


def gradients(model: nn.Module, rank: int, world: int, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    model(x[part], y[part]).backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def _worker(rank: int, world: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model, x, y = model_and_data()
    found = {"ddp": gradients(nn.parallel.DistributedDataParallel(model), rank, world, x, y)}
    if SHARDS:
        model, x, y = model_and_data()
        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        fully_shard(model.layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        sharded = gradients(model, rank, world, x, y)
        found["fsdp"] = {name: grad.full_tensor() for name, grad in sharded.items()}  # type: ignore[attr-defined]
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_one() -> None:
    """Under DistributedDataParallel and under ``fully_shard``."""
    world = 2
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, args=(world, folder), nprocs=world)
        results = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world)]
    one, x, y = model_and_data()
    want = gradients(one, 0, 1, x, y)
    assert len(want) == 3 and all(grad.abs().max() > 1e-6 for grad in want.values())
    for found in results:
        for kind in ("ddp", "fsdp") if SHARDS else ("ddp",):
            assert found[kind].keys() == want.keys()
            for name, grad in want.items():
                torch.testing.assert_close(found[kind][name], grad, rtol=1e-9, atol=1e-12)


class Problems(Dataset[tuple[Tensor, Tensor]]):
    """The gradient and the cost of a problem that is solved where it is asked for."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        cost = torch.rand(6, 40, 30, generator=generator).requires_grad_()
        out = otloss.sinkhorn(cost, backend="cpu")
        return torch.autograd.grad(out.transport_cost.sum(), cost)[0], out.transport_cost.detach()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_data_loader_solves_after_its_parent_has(kernel_backend: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        want = [Problems()[index] for index in range(4)]  # the parent's pool has threads, which a fork loses
        loader = DataLoader(Problems(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
        for got, expected in zip(loader, want, strict=True):
            assert all(map(torch.equal, got, expected))
    finally:
        torch.set_num_threads(before)


def test_deterministic_algorithms_are_enough(backend: str) -> None:
    """Nothing is refused, and two runs give the same bits."""

    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(3, k, 5, generator=generator).requires_grad_() for k in (7, 6))
        cost = torch.rand(3, 7, 6, generator=generator).requires_grad_()
        mask = torch.rand(3, 7, generator=generator) < 0.7
        mask[:, 0] = True
        features = otloss.feature_sinkhorn(x, y, mask_x=mask, eps=torch.full((3,), 0.2), backend=backend)
        dense = otloss.sinkhorn(cost, eps=0.2, backend=backend)
        loss = features.value.sum() + dense.transport_cost.sum() + dense.plan.square().sum()
        first = torch.autograd.grad(loss, (x, y, cost), create_graph=True)
        return [*first, *torch.autograd.grad(first[2].square().sum(), cost)]

    torch.use_deterministic_algorithms(True)
    try:
        assert all(map(torch.equal, run(), run()))
    finally:
        torch.use_deterministic_algorithms(False)
