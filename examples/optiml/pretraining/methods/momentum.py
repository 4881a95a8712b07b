"""What methods with a second, slowly moving network share: that network, its schedule, and a queue of its keys."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import CommandError
from ..distributed import all_gather_stack


class Target(nn.Module):
    """A copy of a network that no gradient reaches; its parameters follow the network by a moving average.

    Buffers (the statistics of batch norm) are its own, gathered in its own forward passes, as in MoCo and BYOL. Call
    :meth:`follow` at the beginning of a step: then a checkpoint after any step holds all that the next one needs.
    """

    def __init__(self, online: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(online).requires_grad_(False)

    @torch.no_grad()
    def follow(self, online: nn.Module, momentum: float) -> None:
        """θ' ← m θ' + (1 − m) θ; nothing changes, to the last bit, where both are equal."""
        for mine, theirs in zip(self.network.parameters(), online.parameters(), strict=True):
            mine.lerp_(theirs, 1 - momentum)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return self.network(x)


def cosine_momentum(start: float, done: float) -> float:
    """From ``start`` to 1 along half a cosine, as BYOL's; ``done`` is the share of the run that is over."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * done)) / 2


class Queue(nn.Module):
    """The last ``size`` keys of all processes, the oldest overwritten first; equal in all processes.

    Its buffers are part of a checkpoint. ``put`` must be given whole batches of ``batch_size`` keys over all processes.
    """

    keys: Tensor
    count: Tensor

    def __init__(self, size: int, dim: int, batch_size: int) -> None:
        super().__init__()
        if size < 1 or size % batch_size:
            raise CommandError(f"a queue of {size} keys does not divide by --batch-size {batch_size}")
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))  # of all keys that were ever put

    def filled(self) -> Tensor:
        """A copy (so that ``put`` leaves the gradient's operands alone) of the keys that were put, at most all."""
        return self.keys[: int(self.count)].clone()

    @torch.no_grad()
    def put(self, keys: Tensor) -> None:
        """This process's keys (B, d), and those of all others in the order of the whole batch."""
        rows = all_gather_stack(keys.float()).flatten(0, 1)
        start = int(self.count) % len(self.keys)
        self.keys[start : start + len(rows)] = rows
        self.count += len(rows)


def contrast(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """MoCo's loss and how often it is guessed right: which of 1 + K keys is the query's?

    −log softmax over (q·k, q·n_1, …, q·n_K) / T at the first place; rows (B, d), (B, d), (K, d) of length 1.
    """
    positive = (queries * keys).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, queries @ negatives.T], dim=1) / temperature
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, labels), (logits.detach().argmax(dim=1) == 0).float().mean()


__all__ = ["Queue", "Target", "contrast", "cosine_momentum"]
