"""PCRLv2's decoder: a U-Net's without skip connections, so that all the backbone knows passes through its last maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from ..network import FEATURE_DIM, STRIDES


def _conv_norm(in_channels: int, out_channels: int, bias: bool = False) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


class Block(nn.Module):
    """One scale: an embedding with its predictor, and a reconstruction of its own.

    The heads are apart from :meth:`forward`, since a step uses them at the scales it draws only.
    """

    def __init__(self, in_channels: int, channels: int, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.convs = nn.Sequential(*_conv_norm(in_channels, channels), *_conv_norm(channels, channels))
        self.norm = nn.BatchNorm1d(channels)
        self.predictor = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.BatchNorm1d(2 * channels), nn.ReLU(inplace=True),
            nn.Linear(2 * channels, channels),
        )  # fmt: skip
        self.supervision = nn.Sequential(*_conv_norm(channels, channels, bias=True), nn.Conv2d(channels, 3, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) to (B, channels, scale H, scale W)."""
        out: Tensor = self.convs(interpolate(maps, scale_factor=float(self.scale), mode="nearest"))
        return out

    def embed(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """This block's maps to an embedding (B, channels) and what the predictor makes of it."""
        embedding = self.norm(torch.flatten(adaptive_avg_pool2d(maps, 1), 1))
        return embedding, self.predictor(embedding)


class Decoder(nn.Module):
    """Five blocks, one for each halving of the standard backbone, and a last convolution to an image.

    Under a stem that halves less often, the last blocks do not double: the image is as large as the film.
    """

    def __init__(self, channels: tuple[int, ...], stride: int = STRIDES["standard"]) -> None:
        super().__init__()
        halvings = stride.bit_length() - 1
        widths = zip((FEATURE_DIM, *channels), channels, strict=False)
        self.blocks = nn.ModuleList(Block(*pair, 2 if i < halvings else 1) for i, pair in enumerate(widths))
        self.head = nn.Conv2d(channels[-1], 3, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.head:
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, maps: Tensor) -> list[Tensor]:
        """The backbone's maps (B, 512, h, w) to those of all blocks, from the coarsest to the image's size."""
        scales = []
        for block in self.blocks:
            maps = block(maps)
            scales.append(maps)
        return scales
