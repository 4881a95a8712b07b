"""Pooled features: every image once through the backbone, without augmentation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.batches import grey_batches
from ..data.images import ImageStore
from ..data.index import ChestIndex
from .network import Backbone, device


@torch.no_grad()
def extract(backbone: Backbone, index: ChestIndex, image_size: int, batch_size: int = 128) -> Tensor:
    """Pooled features (n, d) of all rows of ``index``, in its order."""
    backbone = backbone.eval().to(device())
    images = ImageStore(index.paths, image_size)
    parts = [backbone(x.to(device()))[1].float().cpu() for x in grey_batches(images, image_size, batch_size)]
    return torch.cat(parts)
