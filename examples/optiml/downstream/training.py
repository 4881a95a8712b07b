"""The supervised loop that fine-tuning and segmentation share: seeded, resumable, chosen on validation.

Pretraining uses a Lightning Trainer; this does not. There are many short fits here, two in a row for each backbone
(fine-tuning, then the U-Net), and each keeps the weights that score best on validation. A Trainer's start-up for each
fit and its checkpoint format would cost more than this loop.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from ..atomic import torch_save_atomic
from ..data.batches import read_ahead
from ..errors import CommandError
from ..pretraining.network import device
from .settings import TrainConfig


@dataclass(frozen=True)
class Fitted:
    """What training says about itself; the model holds the weights of the best check."""

    steps: int
    best_step: int
    validation: float


def batches(count: int, config: TrainConfig, seed: int) -> NDArray[np.intp]:
    """Rows of every step, (steps, batch): permutations one after the other, cut into equal pieces."""
    steps, batch = config.steps(count), config.batch(count)
    rng = np.random.default_rng([seed, count])
    passes = math.ceil(steps * batch / count)
    order = np.concatenate([rng.permutation(count) for _ in range(passes)])
    return order[: steps * batch].reshape(steps, batch)


def fit(
    model: nn.Module,
    count: int,
    load: Callable[[NDArray[np.intp]], tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor, torch.Generator], Tensor],
    score_of: Callable[[], float],
    config: TrainConfig,
    seed: int,
    checkpoint: Path | None = None,
    identity: dict[str, Any] | None = None,
    every: float = 60.0,
) -> Fitted:
    """Train ``model`` on ``count`` images.

    Args:
        load: images and targets of these rows; called ahead of time, from threads.
        loss_of: the loss of such a pair, with a generator for the augmentation.
        score_of: how good the model is on validation, the larger the better; called in eval mode, no gradients.
        checkpoint: resume file; written after a check if the last is ``every`` seconds old, and at the end of a
            training that took longer. Whoever called removes it when what the training was for is written.
        identity: what the training depends on; a resume file of another identity is ignored.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    rows = batches(count, config, seed)
    total, started = len(rows), time.monotonic()
    saved = started
    looks = set(np.linspace(0, total, min(config.checks, total) + 1).round().astype(int)[1:].tolist())
    key = json.dumps(identity, sort_keys=True, default=str)
    step, best = 0, Fitted(total, 0, -math.inf)
    weights = copy.deepcopy(model.state_dict())
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if state["identity"] == key:
            model.load_state_dict(state["model"])
            optimiser.load_state_dict(state["optimiser"])
            weights, step, best = state["weights"], state["step"], Fitted(total, *state["best"])
    for x, y in read_ahead(load, rows[step:]):
        model.train()
        for group in optimiser.param_groups:
            group["lr"] = config.lr * _schedule(step, total)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        loss = loss_of(x.to(device()), y.to(device()), generator)
        if not torch.isfinite(loss):
            raise CommandError(f"the loss is {loss.item()} in step {step + 1} of {total}; a smaller lr usually helps")
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        step += 1
        if step in looks:
            model.eval()
            with torch.no_grad():
                score = score_of()
            if score > best.validation or best.best_step == 0:
                best, weights = Fitted(total, step, score), copy.deepcopy(model.state_dict())
            if checkpoint is not None and time.monotonic() - (started if step == total else saved) > every:
                state = {
                    "identity": key, "model": model.state_dict(), "optimiser": optimiser.state_dict(),
                    "weights": weights, "step": step, "best": [best.best_step, best.validation],
                }  # fmt: skip
                torch_save_atomic(state, checkpoint)
                saved = time.monotonic()
    model.load_state_dict(weights)
    model.eval()
    return best


def _schedule(step: int, total: int) -> float:
    warm = max(1, total // 10)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / total))


def jitter(x: Tensor, generator: torch.Generator, degrees: float = 10.0, shift: float = 0.06) -> Tensor:
    """Each image (B, C, H, W) mirrored or not, turned a little and moved a little; edges are reflected."""
    mirror, turn, right, down = torch.rand(4, len(x), generator=generator)
    angle = math.radians(degrees) * (2 * turn - 1)
    sign = torch.where(mirror < 0.5, -1.0, 1.0)
    matrix = torch.stack(
        [
            torch.stack([sign * angle.cos(), -angle.sin(), 2 * shift * (2 * right - 1)], 1),
            torch.stack([sign * angle.sin(), angle.cos(), 2 * shift * (2 * down - 1)], 1),
        ],
        1,
    ).to(x.device)
    grid = affine_grid(matrix, list(x.shape), align_corners=False)
    return grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
