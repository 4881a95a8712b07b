"""A transport term in a model of lightly: VICReg, whose local features are matched between the two views as well.

Backbone, projection head, loss and transform are lightly's and torchvision's, as in lightly's own examples. What otloss
adds is a module and a line: positions of one view's feature map are transported to those of the other, under the cosine
cost, so that what is seen in both views gets like features wherever it lies. VICReg's variance keeps them apart.

    python -m examples.with_lightly --help

Source: Bardes et al. 2022, VICReg (arXiv 2105.04906); Singh et al. 2024, OPTiML (2404.11868), for the term.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from lightly.loss import VICRegLoss
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.transforms import SimCLRTransform
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.transforms.functional import to_pil_image

import otloss


class Model(nn.Module):
    """Local features ``(B, h w, 256)`` of the third stage, and an embedding of the picture."""

    def __init__(self) -> None:
        super().__init__()
        *stages, last, _, _ = resnet18(weights=None).children()
        self.early, self.last = nn.Sequential(*stages), last
        self.head = VICRegProjectionHead(512, 256, 256, num_layers=2)

    def forward(self, view: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.early(view)
        return maps.flatten(2).mT, self.head(self.last(maps).mean((2, 3)))


def pictures(count: int, size: int) -> list[Tensor]:
    """Smooth random pictures ``(3, size, size)``."""
    coarse = torch.rand(count, 3, 5, 5)
    return list(nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1))


def main(argv: Sequence[str] | None = None) -> list[tuple[float, float]]:
    """Train some steps on random pictures; return VICReg's loss and the transport cost of each."""
    parser = argparse.ArgumentParser(description="VICReg of lightly with a transport term between local features.")
    parser.add_argument("--steps", type=int, default=10, help="steps of training (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="pictures in a step (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of a view in pixels (%(default)s)")
    parser.add_argument("--weight", type=float, default=10.0, help="weight of the transport term (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of pictures and weights (%(default)s)")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    model, criterion = Model(), VICRegLoss()
    transport = otloss.CosineSinkhornLoss(eps=0.05)
    transform = SimCLRTransform(input_size=options.size, min_scale=0.5, gaussian_blur=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    films = [to_pil_image(picture) for picture in pictures(options.batch, options.size)]
    history = []
    for step in range(options.steps):
        first, second = (torch.stack(views) for views in zip(*map(transform, films), strict=True))
        (local_1, q_1), (local_2, q_2) = model(first), model(second)
        cost = transport(local_1, local_2)
        vicreg = criterion(q_1, q_2)
        optimizer.zero_grad()
        (vicreg + options.weight * cost).backward()
        optimizer.step()
        history.append((float(vicreg.detach()), float(cost.detach())))
        print(f"step {step:3d}  VICReg {history[-1][0]:7.3f}  transport cost {history[-1][1]:.4f}")
    return history


if __name__ == "__main__":
    main()
