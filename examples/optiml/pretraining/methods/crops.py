"""PCRLv2's views of a film; lengths and probabilities are those of its authors' code."""

from __future__ import annotations

import torch
from lightly.transforms import GaussianBlur
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms import v2

from ...data.batches import MEAN, STD
from ..settings import AugmentConfig

LOCAL_VIEWS = 6


class GlobalAndLocal:
    """Two global crops, then what the first shows before its grey values are changed, then local crops.

    Films are grey, so brightness and contrast are all that is left of the official colour changes.
    """

    def __init__(self, image_size: int, config: AugmentConfig) -> None:
        assert config.min_scale is not None
        turn = [v2.RandomRotation(10), v2.RandomHorizontalFlip(config.hflip)]
        self.crop = v2.Compose([v2.RandomResizedCrop(image_size, (config.min_scale, 1.0)), *turn])
        self.crop_local = v2.Compose([v2.RandomResizedCrop(_share(96, image_size), (0.05, 0.3)), *turn])
        self.change = v2.Compose([GaussianBlur(prob=0.5, sigmas=(0.1, 2.0)), v2.ColorJitter(0.4, 0.4)])
        to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
        self.normal = v2.Compose([*to_tensor, v2.Normalize(MEAN, STD)])  # from here on three channels
        self.hole = _share(32, image_size)

    def __call__(self, film: Image) -> list[Tensor]:
        first, second = self.crop(film), self.crop(film)
        views = [self.cutout(self.normal(self.change(crop))) for crop in (first, second)]
        local = [self.normal(self.change(self.crop_local(film))) for _ in range(LOCAL_VIEWS)]
        return [*views, self.normal(first), *local]

    def cutout(self, x: Tensor, holes: int = 3) -> Tensor:
        """Squares of ImageNet's mean with their centres anywhere, so that some lie partly outside."""
        x, half = x.clone(), self.hole // 2
        for _ in range(holes):
            row, column = (int(torch.randint(size, ())) for size in x.shape[1:])
            x[:, max(row - half, 0) : row + half, max(column - half, 0) : column + half] = 0.0
        return x


def _share(pixels: int, image_size: int) -> int:
    """A length that is given for images of 224 pixels."""
    return max(round(pixels * image_size / 224), 1)
