"""VICReg (Bardes, Ponce, LeCun 2022, arXiv 2105.04906): the yardstick; nearest to OPTiML of all the methods.

Settings after github.com/facebookresearch/vicreg (main_vicreg.py); the expander is as wide as OPTiML's, not 8192.
"""

from __future__ import annotations

import torch
from lightly.loss.vicreg_loss import covariance_loss, invariance_loss, variance_loss
from torch import Tensor

from ..distributed import gather_with_grad
from ..network import expander
from ..settings import PretrainConfig
from .base import Method, StepOutput, spread
from .options import VICRegOptions


class VICReg(Method):
    """Embeddings of two views agree; each dimension varies over the batch, and no two say the same."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        self.expander = expander(config.expander)
        self.weights: VICRegOptions = config.options.vicreg

    def step(self, first: Tensor, second: Tensor) -> StepOutput:
        _, g_s = self.backbone(first)
        _, g_t = self.backbone(second)
        q_s, q_t = self.expander(g_s), self.expander(g_t)
        with torch.autocast(q_s.device.type, enabled=False):  # covariances overflow half precision
            invariance = invariance_loss(q_s.float(), q_t.float())
            all_s, all_t = gather_with_grad(q_s), gather_with_grad(q_t)
            variance = 0.5 * (variance_loss(all_s) + variance_loss(all_t))
            covariance = covariance_loss(all_s) + covariance_loss(all_t)
        w = self.weights
        loss = w.invariance * invariance + w.variance * variance + w.covariance * covariance
        parts = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return StepOutput(loss, {**parts, "std_q": spread(q_s), "std_g": spread(g_s)})
