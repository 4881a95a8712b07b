"""Supervised training from scratch: the ceiling that the data set has, for the example's table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from .data import ChestIndex, ImageStore
from .evaluate import Scored
from .features import grey_batch
from .model import FEATURE_DIM, load_backbone


def train_supervised(
    index: ChestIndex,
    image_size: int,
    epochs: int,
    seed: int = 0,
    batch_size: int = 64,
    tick: Callable[[int, float], None] = lambda epoch, loss: None,
) -> Scored:
    """Train backbone and classifier end to end on the training split, score test after the last epoch.

    Mirror images and small shifts are the only augmentation; nothing is chosen on test or validation.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, test = index.split("train"), index.split("test")
    images = _pixels(train, image_size)
    labels = torch.from_numpy(train.labels).float()
    backbone = load_backbone(None, seed).train().to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(FEATURE_DIM, labels.shape[1]).to(device)
    optimiser = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], weight_decay=1e-2)
    steps = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=epochs * steps)
    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        order, total = torch.from_numpy(rng.permutation(len(images))), 0.0
        for rows in order[: steps * batch_size].split(batch_size):
            x = _jitter(images[rows], rng).to(device)
            loss = bce(head(backbone(x)[1]), labels[rows].to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        tick(epoch + 1, total / steps)
    backbone.eval()
    with torch.no_grad():
        scores = torch.cat([head(backbone(x.to(device))[1]).cpu() for x in _pixels(test, image_size).split(128)])
    return Scored(test, scores.double().numpy(), train.labels.max(axis=0) > 0, penalty=0.0)


def _pixels(index: ChestIndex, image_size: int) -> Tensor:
    return grey_batch(ImageStore(index.paths, image_size), np.arange(len(index)), image_size)


def _jitter(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Mirror each image with probability a half; shift the batch by up to a sixteenth of its size."""
    mirrored = torch.from_numpy(rng.random(len(x)) < 0.5)[:, None, None, None]
    x = torch.where(mirrored, x.flip(3), x)
    reach = x.shape[2] // 16
    down, right = rng.integers(-reach, reach + 1, 2)
    return torch.roll(x, (int(down), int(right)), (2, 3))
