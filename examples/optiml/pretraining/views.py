"""Random views of every image, from lightly's transforms, repeatable whatever process makes them.

The random numbers of a view belong to (seed, epoch, image) and to nothing else. So a resumed run sees the
views an uninterrupted one would have seen, and the number of worker processes changes nothing.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightly.transforms import BYOLTransform, SimCLRTransform
from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..data.images import ImageStore
from .distributed import World
from .settings import AugmentConfig


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, all global random generators follow ``key``; afterwards they are as they were before.

    lightly and torchvision draw from three of them (torch, NumPy, the standard library).
    """
    before = torch.random.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    seed = _number(key)
    torch.random.default_generator.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])


def seed_all(*key: int) -> None:
    """From here on all global random generators, those of devices too, follow ``key``."""
    seed = _number(key)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def generator_of(*key: int) -> torch.Generator:
    """A generator by itself that follows ``key``, for draws in which all processes must agree."""
    return torch.Generator().manual_seed(_number(key))


def _number(key: tuple[int, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "big")


Views = Callable[[Image], "list[Tensor]"]
"""Turns a film into its views, drawing from the global generators."""


def two_views(image_size: int, config: AugmentConfig) -> Views:
    """VICReg's asymmetric pair. lightly's own ``VICRegTransform`` is symmetric; its BYOL views are the pair.

    Hue, saturation and grayscale do nothing to grey images; normalisation by ImageNet's three means turns the
    one channel into three.
    """
    shared: dict[str, Any] = {"input_size": image_size, "min_scale": config.min_scale, "hf_prob": config.hflip}
    return BYOLTransform(BYOLView1Transform(**shared), BYOLView2Transform(**shared))


def symmetric_views(image_size: int, config: AugmentConfig, jitter: float) -> Views:
    """Two views drawn alike: crop, mirror, brightness and contrast by ±``jitter``, blur of every other; grey as above.

    SimCLR's jitter is 0.8, that of MoCo v2 and SimSiam 0.4; of the jitter of hue and saturation nothing is left.
    """
    strength = {"cj_bright": jitter, "cj_contrast": jitter, "cj_sat": jitter, "cj_hue": jitter / 4}
    return SimCLRTransform(image_size, min_scale=config.min_scale, hf_prob=config.hflip, **strength)


class ViewDataset(Dataset[tuple[Tensor, ...]]):
    """Images by (epoch, row), each as its views."""

    def __init__(self, images: ImageStore, views: Views, seed: int) -> None:
        self.images, self.views, self.seed = images, views, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, ...]:  # type: ignore[override]
        epoch, row = key
        with seeded(self.seed, epoch, row):
            return tuple(self.views(self.images[row]))


class EpochSampler(Sampler[tuple[int, int]]):
    """A new order each epoch, given by (seed, epoch); hands the epoch on to the data set.

    Of several processes each takes its stretch of every batch, so that together they see the batches that one
    process would. It starts an epoch in the middle where a run goes on there.
    """

    def __init__(self, count: int, seed: int, batch_size: int | None = None, world: World | None = None) -> None:
        """``batch_size`` is that of all processes together; it may be unset for a single process."""
        self.count, self.seed = count, seed
        self.batch_size, self.world = batch_size or 1, world or World()
        self.share = self.world.share(self.batch_size)
        self.epoch, self.start = 0, (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch, also after a resume."""
        self.epoch = epoch

    def go_to(self, epoch: int, batch: int) -> None:
        """Go on in this epoch, and there after so many batches."""
        self.epoch, self.start = epoch, (epoch, batch)

    def __len__(self) -> int:
        return self.count // self.batch_size * self.share

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        batches = order[: self.count // self.batch_size * self.batch_size].reshape(-1, self.batch_size)
        done = self.start[1] if self.start[0] == self.epoch else 0
        mine = batches[done:, self.world.rank * self.share : (self.world.rank + 1) * self.share]
        return iter([(self.epoch, int(row)) for row in mine.ravel()])
