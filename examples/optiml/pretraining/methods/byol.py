"""BYOL (Grill et al. 2020, arXiv 2006.07733): predict what a slowly moving copy of the network says of the other view.

Settings after github.com/google-deepmind/deepmind-research/tree/master/byol (configs/byol.py for 300 epochs). There the
copy starts from weights of its own, with no difference seen by its authors, and moves at the end of a step; here it
starts equal and moves at the beginning of the next step, by that step's momentum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..network import FEATURE_DIM
from ..settings import PretrainConfig
from .base import Method, StepOutput, spread
from .momentum import Target, cosine_momentum


class BYOL(Method):
    """A predictor turns each view's projection into the target's of the other view; nothing is a negative."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        o = self.options = config.options.byol
        self.projector = byol_head(FEATURE_DIM, o.hidden, o.dim)
        self.predictor = byol_head(o.dim, o.hidden, o.dim)
        self.target_backbone, self.target_projector = Target(self.backbone), Target(self.projector)

    def watched(self) -> dict[str, nn.Module | None]:
        return {**super().watched(), "projector": self.projector, "predictor": self.predictor}

    def step(self, first: Tensor, second: Tensor) -> StepOutput:
        momentum = cosine_momentum(self.options.momentum, self.done())
        self.target_backbone.follow(self.backbone, momentum)
        self.target_projector.follow(self.projector, momentum)
        _, g_s = self.backbone(first)
        _, g_t = self.backbone(second)
        q_s, q_t = self.projector(g_s), self.projector(g_t)
        to_t = squared_distance(self.predictor(q_s), self.target_projector(self.target_backbone(second)[1]))
        to_s = squared_distance(self.predictor(q_t), self.target_projector(self.target_backbone(first)[1]))
        with torch.autocast(q_s.device.type, enabled=False):
            std_q = spread(F.normalize(q_s.float(), dim=1))
        parts = {"to_t": to_t, "to_s": to_s, "momentum": to_t.new_tensor(momentum), "std_q": std_q}
        return StepOutput(to_t + to_s, {**parts, "std_g": spread(g_s)})


def squared_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of ‖p/‖p‖ − z/‖z‖‖² = 2 − 2 cos(p, z)."""
    with torch.autocast(prediction.device.type, enabled=False):
        return 2 - 2 * F.cosine_similarity(prediction.float(), target.float()).mean()


def byol_head(in_dim: int, hidden: int, out_dim: int) -> nn.Sequential:
    """The official heads; lightly's have the bias in the other of the two layers."""
    first, last = nn.Linear(in_dim, hidden), nn.Linear(hidden, out_dim, bias=False)
    return nn.Sequential(first, nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), last)
