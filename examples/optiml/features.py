"""Frozen features: every image once through the backbone, without augmentation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .data import ChestIndex, ImageStore
from .model import Backbone

#: ImageNet's statistics, as the augmented views use them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def grey_batch(images: ImageStore, rows: NDArray[np.intp], size: int) -> Tensor:
    """Images as a normalised (B, 3, size, size) tensor: grey repeated over ImageNet's three channels."""
    pixels = [np.asarray(images[int(i)].resize((size, size), resample=2)) for i in rows]  # 2: bilinear
    grey = torch.from_numpy(np.stack(pixels))[:, None].float() / 255
    return (grey - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@dataclass(frozen=True)
class Features:
    """Features (n, d) with what is needed to score them."""

    x: Tensor
    index: ChestIndex


@torch.no_grad()
def extract(backbone: Backbone, index: ChestIndex, image_size: int, batch_size: int = 128) -> Features:
    """Pooled features of all rows of ``index``, in its order."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = backbone.eval().to(device)
    images = ImageStore(index.paths, image_size)
    rows = np.arange(len(index))
    parts = [
        backbone(grey_batch(images, rows[i : i + batch_size], image_size).to(device))[1].float().cpu()
        for i in range(0, len(rows), batch_size)
    ]
    return Features(torch.cat(parts), index)
