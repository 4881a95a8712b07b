"""SimSiam (Chen, He 2021, arXiv 2011.10566): predict the other view's projection, which is held constant.

Settings after github.com/facebookresearch/simsiam (main_simsiam.py with ``--fix-pred-lr``, simsiam/builder.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from ..network import FEATURE_DIM
from ..settings import AugmentConfig, PretrainConfig
from ..views import Views, symmetric_views
from .base import Method, StepOutput, spread
from .options import SimSiamOptions


class SimSiam(Method):
    """Without negatives and without a second network: the stopped gradient and the predictor prevent collapse.

    ``std_q`` is near 1/√dim while embeddings are spread over the sphere, and near 0 after a collapse onto a point. It
    does not see one onto few dimensions: the projector's last norm stretches each dimension by itself.
    """

    constant_rate = frozenset({"predictor"})

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        o: SimSiamOptions = config.options.simsiam
        # Other norms are put in place later, and a frozen zero would cut a block's branch for good.
        if o.zero_init_residual and config.norm == "batch" and config.init == "random":
            for block in self.backbone.modules():
                if isinstance(block, BasicBlock):
                    nn.init.zeros_(block.bn2.weight)
        self.projector = SimSiamProjectionHead(FEATURE_DIM, o.hidden, o.dim)
        self.predictor = SimSiamPredictionHead(o.dim, o.bottleneck, o.dim)

    @classmethod
    def views(cls, image_size: int, config: AugmentConfig) -> Views:
        return symmetric_views(image_size, config, jitter=0.4)

    def watched(self) -> dict[str, nn.Module | None]:
        return {**super().watched(), "projector": self.projector, "predictor": self.predictor}

    def step(self, first: Tensor, second: Tensor) -> StepOutput:
        _, g_s = self.backbone(first)
        _, g_t = self.backbone(second)
        z_s, z_t = self.projector(g_s), self.projector(g_t)
        p_s, p_t = self.predictor(z_s), self.predictor(z_t)
        with torch.autocast(z_s.device.type, enabled=False):
            z_s, z_t, p_s, p_t = z_s.float(), z_t.float(), p_s.float(), p_t.float()
            to_t = -F.cosine_similarity(p_s, z_t.detach()).mean()
            to_s = -F.cosine_similarity(p_t, z_s.detach()).mean()
            parts = {"to_t": to_t, "to_s": to_s, "std_q": spread(F.normalize(z_s, dim=1)), "std_g": spread(g_s)}
        return StepOutput((to_t + to_s) / 2, parts)
