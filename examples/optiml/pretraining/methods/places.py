"""Where two views lie on the film that both show, and what that says of their positions.

A place is (left, top, right, bottom) as shares of the film's width and height. A mirrored view's left lies to the right
of its right.
"""

from __future__ import annotations

import torch
from lightly.transforms import BYOLTransform
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms.v2.functional import horizontal_flip


class PlacedViews:
    """The views of a pair, bit for bit, and after them the place (4,) of each.

    The pair's transforms do not tell what they cut out, so cropping and mirroring are done here, from the same draws.
    """

    def __init__(self, pair: BYOLTransform) -> None:
        self.transforms = pair.transforms

    def __call__(self, film: Image) -> list[Tensor]:
        views, places = list[Tensor](), list[Tensor]()
        width, height = film.size
        for view in self.transforms:
            crop, mirror, *rest = view.transform.transforms
            cut = crop.make_params([film])
            image = crop.transform(film, cut)
            left, right = cut["left"] / width, (cut["left"] + cut["width"]) / width
            if torch.rand(1) < mirror.p:
                image, left, right = horizontal_flip(image), right, left
            for change in rest:
                image = change(image)
            views.append(image)
            places.append(torch.tensor([left, cut["top"] / height, right, (cut["top"] + cut["height"]) / height]))
        return [*views, *places]


def centres(places: Tensor, rows: int, columns: int) -> Tensor:
    """Where on the film the centres of a view's positions lie: places (B, 4) to (B, rows · columns, 2), row by row."""
    x = _cut(places[:, 0], places[:, 2], columns).unfold(1, 2, 1).mean(2)
    y = _cut(places[:, 1], places[:, 3], rows).unfold(1, 2, 1).mean(2)
    return torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), dim=3).flatten(1, 2)


def shared(places: Tensor, other: Tensor, rows: int, columns: int) -> Tensor:
    """The share of each position's part of the film that the other view shows, too: (B, rows · columns)."""
    x = _covered(_cut(places[:, 0], places[:, 2], columns), other[:, 0::2])
    y = _covered(_cut(places[:, 1], places[:, 3], rows), other[:, 1::2])
    return (y[:, :, None] * x[:, None]).flatten(1)


def _cut(begin: Tensor, end: Tensor, count: int) -> Tensor:
    """The bounds (B, count + 1) of equal parts from ``begin`` (B,) to ``end``."""
    return begin[:, None] + (end - begin)[:, None] * torch.linspace(0, 1, count + 1, device=begin.device)


def _covered(bounds: Tensor, ends: Tensor) -> Tensor:
    """The share (B, parts) of every part between two bounds that lies between two ends (B, 2), in whatever order."""
    parts = bounds.unfold(1, 2, 1)
    low, high = parts.amin(2), parts.amax(2)
    inside = torch.minimum(high, ends.amax(1, keepdim=True)) - torch.maximum(low, ends.amin(1, keepdim=True))
    return inside.clamp_min(0) / (high - low)
