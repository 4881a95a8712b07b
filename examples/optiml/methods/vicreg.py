"""VICReg (Bardes, Ponce, LeCun 2022, arXiv 2105.04906): the yardstick; nearest to OPTiML of all the methods.

Settings after github.com/facebookresearch/vicreg (main_vicreg.py); the expander is as wide as OPTiML's, not 8192.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightly.loss.vicreg_loss import covariance_loss, invariance_loss, variance_loss
from torch import Tensor

from ..distributed import whole_batch
from ..model import expander
from .base import Method, StepOutput, spread

if TYPE_CHECKING:
    from ..config import PretrainConfig


@dataclass(frozen=True)
class VICRegOptions:
    """Weights of the three terms, as in the official code (which halves variance, unlike its paper)."""

    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0


class VICReg(Method):
    """Embeddings of two views agree; each dimension varies over the batch, and no two say the same."""

    Options = VICRegOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "official": {
            "optim.lr": 0.05,  # 0.2 for 256 images
            "optim.weight_decay": 1e-6,
            "optim.trust": 1e-3,
            "optim.warmup_epochs": 10,
            "expander.last_act": False,
        }
    }

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
            all_s, all_t = whole_batch(q_s), whole_batch(q_t)
            variance = 0.5 * (variance_loss(all_s) + variance_loss(all_t))
            covariance = covariance_loss(all_s) + covariance_loss(all_t)
        w = self.weights
        loss = w.invariance * invariance + w.variance * variance + w.covariance * covariance
        parts = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return StepOutput(loss, {**parts, "std_q": spread(q_s), "std_g": spread(g_s)})
