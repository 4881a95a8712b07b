"""SimCLR (Chen, Kornblith, Norouzi, Hinton 2020, arXiv 2002.05709): find the other view among the batch's images.

Settings after github.com/google-research/simclr (run.py, model_util.py, objective.py). As there, batch norm and
negatives span all processes; but each view is normalised by itself, as in all methods here, there both together. Its
code adds the losses of the two directions; this is their mean, as in the paper.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor, nn

from ..distributed import gather_with_grad
from ..network import FEATURE_DIM
from ..settings import AugmentConfig, PretrainConfig
from ..views import Views, symmetric_views
from .base import Method, StepOutput, spread
from .options import SimCLROptions


class SimCLR(Method):
    """Each embedding picks its image's other view out of all other embeddings of the batch."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        self.options: SimCLROptions = config.options.simclr
        self.head = SimCLRProjectionHead(FEATURE_DIM, self.options.hidden, self.options.dim)

    @classmethod
    def views(cls, image_size: int, config: AugmentConfig) -> Views:
        return symmetric_views(image_size, config, jitter=0.8)

    def watched(self) -> dict[str, nn.Module | None]:
        return {**super().watched(), "head": self.head}

    def step(self, first: Tensor, second: Tensor) -> StepOutput:
        _, g_s = self.backbone(first)
        _, g_t = self.backbone(second)
        q_s, q_t = self.head(g_s), self.head(g_t)
        with torch.autocast(q_s.device.type, enabled=False):
            z = F.normalize(torch.cat([gather_with_grad(q_s), gather_with_grad(q_t)]), dim=1)
            loss, accuracy = nt_xent(z, self.options.temperature)
            return StepOutput(loss, {"accuracy": accuracy, "std_q": z.detach().std(dim=0).mean(), "std_g": spread(g_s)})


def nt_xent(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean over i of −log softmax_j≠i (z_i·z_j / T) at i's other view, and how often that is the largest.

    Rows (2B, d) of length 1; row i + B is the other view of row i.
    """
    cosine = (z @ z.T).fill_diagonal_(-torch.inf)
    others = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy(cosine / temperature, others), (cosine.detach().argmax(dim=1) == others).float().mean()
