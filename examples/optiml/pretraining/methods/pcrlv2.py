"""PCRLv2 (Zhou, Lu, Chen, Yang, Yu: A Unified Visual Information Preservation Framework, TPAMI 2023), its 2-D form.

Numbers are those of the authors' code, github.com/RL4M/PCRLv2.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate, mse_loss

from ..settings import AugmentConfig, PretrainConfig
from ..views import Views, generator_of
from .base import Method, StepOutput, spread
from .crops import GlobalAndLocal
from .decoder import Decoder


class PCRLv2(Method):
    """Reconstruct a crop from a changed view of it, and make views agree at scales that are drawn in every step.

    Loss: MSE(last maps, target) + β(t) MSE(maps of scale k, target) + S_k(first, second) + mean of S over every pair
    of a global and a local view, each at a scale of its own; β(t) = (1 + cos πt) / 2 with t the share of the run done,
    and S is SimSiam's: minus the cosine of one view's prediction with the other's embedding, which gets no gradient.
    """

    strategy: ClassVar[str] = "ddp_find_unused_parameters_true"  # heads of scales that were not drawn

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(config.options.pcrlv2.channels, self.backbone.stride)

    @classmethod
    def views(cls, image_size: int, config: AugmentConfig) -> Views:
        return GlobalAndLocal(image_size, config)

    def watched(self) -> dict[str, nn.Module | None]:
        return {**super().watched(), "decoder": self.decoder}

    def scales(self, count: int) -> list[int]:
        """The scales of this step. All processes draw the same, since their images are one batch."""
        generator = generator_of(self.config.seed, self.global_step)
        drawn: list[int] = torch.randint(len(self.decoder.blocks), (count,), generator=generator).tolist()
        return drawn

    def step(self, first: Tensor, second: Tensor, target: Tensor, *local: Tensor) -> StepOutput:
        scale, *local_scales = self.scales(1 + 2 * len(local))
        features = [self.backbone(x) for x in (first, second, torch.cat(local))]
        maps = [self.decoder(z) for z, _ in features]
        views = {k: self.embed(k, maps, len(local)) for k in sorted({scale, *local_scales})}
        image, coarse_image = self.decoder.head(maps[0][-1]), self.decoder.blocks[scale].supervision(maps[0][scale])
        with torch.autocast(target.device.type, enabled=False):
            fine, coarse = _squared_error(image, target), _squared_error(coarse_image, target)
            pair = _agreement(*views[scale][:2])
            local_pairs = [_agreement(views[k][i % 2], views[k][2 + i // 2]) for i, k in enumerate(local_scales)]
            small = torch.stack(local_pairs).mean()
            beta = fine.new_tensor(0.5 * (1.0 + math.cos(math.pi * self.done())))
            loss = fine + beta * coarse + pair + small
        parts = {"reconstruction": fine, "reconstruction_scale": coarse, "pair": pair, "local": small, "beta": beta}
        return StepOutput(loss, {**parts, "std_g": spread(features[0][1])})

    def embed(self, k: int, maps: list[list[Tensor]], count: int) -> list[tuple[Tensor, Tensor]]:
        """Embeddings and predictions at scale k: of both global views, then of each of the ``count`` local ones."""
        first, second, (x, p) = (self.decoder.blocks[k].embed(view[k]) for view in maps)
        return [first, second, *zip(x.chunk(count), p.chunk(count), strict=True)]


def _squared_error(image: Tensor, target: Tensor) -> Tensor:
    """Mean over images, channels and pixels; a coarse image, or one of a size that 32 does not divide, is resized."""
    return mse_loss(interpolate(image.float(), target.shape[-2:], mode="bilinear"), target)


def _agreement(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """S of two views, each as its embeddings and predictions (B, C)."""
    (x, p), (y, q) = ((v.float() for v in view) for view in (one, other))
    return -0.5 * (cosine_similarity(p, y.detach()).mean() + cosine_similarity(q, x.detach()).mean())
