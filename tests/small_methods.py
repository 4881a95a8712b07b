"""Pretraining methods with narrow heads, and their own views of random films."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from xray_runs import small

from examples.optiml.pretraining.methods import method_class
from examples.optiml.pretraining.methods.base import Method
from examples.optiml.pretraining.settings import MethodOptions, PretrainConfig
from examples.optiml.pretraining.trainer import build
from examples.optiml.pretraining.views import seeded

BATCH = 8
WIDTHS = {"hidden": 24, "dim": 16, "bottleneck": 8, "queue": 2 * BATCH, "channels": (16, 8, 8, 8, 4)}


def tiny(data: Path, out: Path, method: str, norm: str = "batch", **special: object) -> PretrainConfig:
    """A method with narrow heads; ``special`` are options of it."""
    options = MethodOptions()
    narrow = {name: width for name, width in WIDTHS.items() if hasattr(getattr(options, method), name)}
    chosen = dataclasses.replace(getattr(options, method), **{**narrow, **special})
    return small(
        data, out, method, norm=norm, keep_checkpoint=True, options=dataclasses.replace(options, **{method: chosen})
    )


def model_of(method: str, norm: str = "batch", **special: object) -> Method:
    return build(tiny(Path(), Path(), method, norm, **special).resolve()).train()


def batch_of(method: str, number: int = 0) -> list[Tensor]:
    """The method's own views of random films."""
    films = np.random.default_rng(number).integers(0, 256, (BATCH, 40, 40), dtype=np.uint8)
    views = method_class(method).views(32, tiny(Path(), Path(), method).resolve().augment)
    with seeded(number):
        return list(default_collate([tuple(views(Image.fromarray(film))) for film in films]))
