"""MoCo v2 (Chen, Fan, Girshick, He 2020, arXiv 2003.04297; MoCo: arXiv 1911.05722): find the view's key among many.

Settings after github.com/facebookresearch/moco (README's command for v2, moco/builder.py). Unlike there, the queue does
not begin with random vectors: only keys that were put in are negatives, so the first step has none and a loss of 0.

Its shuffled batch norm is left out: of a batch that is normalised as a whole, in one process or synchronised between
GPUs, an order changes nothing. A step's queries and keys thus share statistics that older keys do not; its authors saw
that cost 4 % on CIFAR-10 (their notebook, "SplitBatchNorm"). ``--norm group`` shares none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.models.modules import MoCoProjectionHead
from torch import Tensor, nn

from ..network import FEATURE_DIM
from ..settings import AugmentConfig, PretrainConfig
from ..views import Views, symmetric_views
from .base import Method, StepOutput, spread
from .momentum import Queue, Target, contrast


class MoCo(Method):
    """Queries of the first view; keys of the second, by a slowly moving copy of the network."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        o = self.options = config.options.moco
        self.head = MoCoProjectionHead(FEATURE_DIM, o.hidden, o.dim)
        self.target_backbone, self.target_head = Target(self.backbone), Target(self.head)
        self.queue = Queue(o.queue, o.dim, config.batch_size)

    @classmethod
    def views(cls, image_size: int, config: AugmentConfig) -> Views:
        return symmetric_views(image_size, config, jitter=0.4)

    def watched(self) -> dict[str, nn.Module | None]:
        return {**super().watched(), "head": self.head}

    def step(self, first: Tensor, second: Tensor) -> StepOutput:
        self.target_backbone.follow(self.backbone, self.options.momentum)
        self.target_head.follow(self.head, self.options.momentum)
        _, g = self.backbone(first)
        q, k = self.head(g), self.target_head(self.target_backbone(second)[1])
        with torch.autocast(q.device.type, enabled=False):
            q, k = F.normalize(q.float(), dim=1), F.normalize(k.float(), dim=1)
            loss, accuracy = contrast(q, k, self.queue.filled(), self.options.temperature)
            self.queue.put(k)
            parts = {"accuracy": accuracy, "queue": self.queue.count.clamp(max=self.options.queue).float()}
            return StepOutput(loss, {**parts, "std_q": spread(q), "std_g": spread(g)})
