"""DenseCL (Wang, Zhang, Shen, Kong, Li 2021, arXiv 2011.09157): MoCo v2, and the same once more for every position.

Settings after github.com/WXinlong/DenseCL (openselfsup/models/densecl.py, configs/selfsup/densecl for ImageNet). What
``moco.py`` says of its queue and of batch norm holds here too. The heads are as wide inside as the backbone's features,
as there (2048 for ResNet50), so 512; and without the dense loss this is MoCo v2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.models.modules.heads import DenseCLProjectionHead
from torch import Tensor, nn

from ..network import FEATURE_DIM
from ..settings import AugmentConfig, PretrainConfig
from ..views import Views, symmetric_views
from .base import Method, StepOutput, spread
from .momentum import Queue, Target, contrast


class DenseCL(Method):
    """Queries of the first view; keys of the second, by a slowly moving copy of the network.

    A position's positive key is that of the position in the other view where the backbone's features are most alike;
    its negatives are one key per image, the mean over positions.
    """

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        o = self.options = config.options.densecl
        self.head, self.dense_head = (DenseCLProjectionHead(FEATURE_DIM, o.hidden, o.dim) for _ in range(2))
        self.target_backbone = Target(self.backbone)
        self.target_head, self.target_dense_head = Target(self.head), Target(self.dense_head)
        self.queue, self.dense_queue = (Queue(o.queue, o.dim, config.batch_size) for _ in range(2))

    @classmethod
    def views(cls, image_size: int, config: AugmentConfig) -> Views:
        return symmetric_views(image_size, config, jitter=0.4)

    def watched(self) -> dict[str, nn.Module | None]:
        return {**super().watched(), "head": self.head, "dense_head": self.dense_head}

    def step(self, first: Tensor, second: Tensor) -> StepOutput:
        o = self.options
        self.target_backbone.follow(self.backbone, o.momentum)
        self.target_head.follow(self.head, o.momentum)
        self.target_dense_head.follow(self.dense_head, o.momentum)
        z_q, g = self.backbone(first)
        z_k, g_k = self.target_backbone(second)
        z_q, z_k = (z.flatten(2).transpose(1, 2) for z in (z_q, z_k))
        q, q_dense = self.head(g), self.dense_head(z_q)
        k, k_dense = self.target_head(g_k), self.target_dense_head(z_k)
        with torch.autocast(g.device.type, enabled=False):
            q, q_dense, k, k_dense = (x.float() for x in (q, q_dense, k, k_dense))
            mean_key = _unit(k_dense.mean(dim=1))
            q, q_dense, k, k_dense = (_unit(x) for x in (q, q_dense, k, k_dense))
            single, accuracy = contrast(q, k, self.queue.filled(), o.temperature)
            match = corresponding(z_q.float(), z_k.float())
            matched = k_dense.gather(1, match[..., None].expand_as(k_dense))
            dense, dense_accuracy = contrast(
                q_dense.flatten(0, 1), matched.flatten(0, 1), self.dense_queue.filled(), o.temperature
            )
            self.queue.put(k)
            self.dense_queue.put(mean_key)
            used = torch.zeros_like(match).scatter_(1, match, 1).float().mean()  # share of positions that are matched
            parts = {"single": single, "dense": dense, "accuracy": accuracy, "dense_accuracy": dense_accuracy}
            log = {**parts, "matched": used, "std_q": spread(q), "std_dense": spread(q_dense.flatten(0, 1))}
            return StepOutput((1 - o.dense) * single + o.dense * dense, {**log, "std_g": spread(g)})


def corresponding(queries: Tensor, keys: Tensor) -> Tensor:
    """For each position of (B, N, C) the position of (B, M, C) with the largest cosine: (B, N)."""
    return (_unit(queries.detach()) @ _unit(keys).transpose(1, 2)).argmax(dim=2)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)
