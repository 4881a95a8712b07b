"""Several processes as one: who this process is under ``torchrun``, and batches gathered from all of them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from lightly.utils.dist import gather
from torch import Tensor

from ..errors import CommandError


@dataclass(frozen=True)
class World:
    """This process among those that ``torchrun`` started; one process where it started none."""

    rank: int = 0
    size: int = 1
    per_node: int = 1

    @classmethod
    def of_environment(cls) -> World:
        if not dist.is_torchelastic_launched():
            return cls()
        rank, size, per_node = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        return cls(rank, size, per_node)

    @property
    def nodes(self) -> int:
        return self.size // self.per_node

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """How many images of a batch are this process's."""
        if batch_size % self.size:
            raise CommandError(f"--batch-size {batch_size} (of all processes together) does not divide by {self.size}")
        return batch_size // self.size


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_with_grad(x: Tensor) -> Tensor:
    """All processes' rows in float32, in the order of one process's batch, with the gradient of the whole batch.

    Backward sums what all processes want of these rows; after DistributedDataParallel's averaging, parameters
    get the gradient that one process with the whole batch would have computed.
    """
    return torch.cat(gather(x.float().contiguous())) if _distributed() else x.float()


def all_gather_stack(values: Tensor) -> Tensor:
    """The tensors (*shape) of all processes as (processes, *shape), without gradient."""
    values = values.detach().contiguous()
    if not _distributed():
        return values[None]
    rows = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, values)
    return torch.stack(rows)
