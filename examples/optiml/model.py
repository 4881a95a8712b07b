"""The network: torchvision's ResNet18 as a trunk that also returns its feature maps, and the expander."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

if TYPE_CHECKING:
    from .config import ExpanderConfig

FEATURE_DIM = 512


class Backbone(ResNet):
    """ResNet18 without classifier. Parameter names are torchvision's, so its weights load anywhere."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.fc = nn.Identity()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) to maps (B, 512, H/32, W/32) and their global average (B, 512)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return maps, torch.flatten(self.avgpool(maps), 1)


def load_backbone(path: Path | None, seed: int = 0) -> Backbone:
    """The backbone of a run (its ``backbone.pth``), or, for ``None``, an untrained one that follows ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = Backbone()
    if path is not None:
        backbone.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return backbone.eval()


def expander(config: ExpanderConfig, in_dim: int = FEATURE_DIM) -> nn.Sequential:
    """VICReg's expander: Linear-BN-ReLU blocks, then a bare Linear without bias.

    The paper's sentence ("three linear layers ... accompanied by ReLU and BN within each layer") can also be
    read as a normalised, rectified last layer; ``last_act`` builds that. It makes embeddings non-negative,
    which the variance and covariance terms do not like, so it is off by default.
    """
    layers: list[nn.Module] = []
    for i in range(config.layers):
        last = i == config.layers - 1
        layers.append(nn.Linear(in_dim, config.dim, bias=not last))
        if not last or config.last_act:
            layers += [nn.BatchNorm1d(config.dim), nn.ReLU(inplace=True)]
        in_dim = config.dim
    return nn.Sequential(*layers)
