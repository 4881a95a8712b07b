"""OPTiML, Eq. 3 of the paper: transport between the feature maps of two views, variance, covariance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor, nn

import otloss

from ..model import FEATURE_DIM, expander, mlp
from .base import Method, StepOutput, spread

if TYPE_CHECKING:
    from ..config import PretrainConfig


@dataclass(frozen=True)
class OPTiMLOptions:
    """The loss; where the paper leaves a choice, see ``otloss.OPTiMLLoss``."""

    alpha: float = 0.6
    """Weight of the transport cost."""
    beta: float = 25.0
    """Weight of variance."""
    eta: float = 1.0
    """Weight of covariance."""
    eps: float = 0.05
    """Entropic regularisation of the transport."""
    match: Literal["channel", "position"] = "channel"
    """What is transported: channels (d x d, as printed) or positions (hw x hw)."""
    marginals: Literal["perplexity", "hardest", "learned", "detached", "uniform"] | None = None
    """How CV-SIM sets the marginals; "learned" is as printed and is known to collapse, "hardest" raises the transport
    cost. Unset: the preset's."""
    perplexity: float = 0.5
    """Share of the points that the marginals are spread over, under the policies "perplexity" and "hardest"."""
    tokens: Literal["channel", "batch"] = "channel"
    """What CV-SIM attends over; under several processes "batch" is each process's share of the batch."""
    heads: int = 8
    """Heads of CV-SIM; the paper gives no number."""
    shared: bool = True
    """Whether R_s and R_t are one module."""
    gradient: Literal["implicit", "unroll", "none"] = "implicit"
    """How the transport is differentiated; "none" holds the plan fixed, and CV-SIM is then not trained."""
    objective: Literal["transport_cost", "value", "divergence"] = "transport_cost"
    """What L_OT is; "transport_cost" is as printed."""
    max_iter: int = 200
    """Sinkhorn iterations at most; images that converge earlier stop earlier."""
    invariance: float | None = None
    """Weight of the mean squared difference between the two views' embeddings. The paper has none, VICReg 25. Unset:
    the preset's."""
    dense: int = 0
    """Channels of a projection head at every position, whose maps are transported in place of the backbone's; variance
    and covariance, over positions and images, keep them from collapsing. 0: the backbone's maps, as printed."""
    stage: Literal[3, 4] = 4
    """Stage of the ResNet whose maps these are: the last, or the one before, with four times as many positions."""


class OPTiML(Method):
    """Eq. 3, and what it lacks: a term for the invariance of the embeddings, and a dense head that cannot collapse.

    Without both, as printed, all agreement between views comes from the transport of the backbone's maps.
    """

    Options = OPTiMLOptions

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        self.expander = expander(config.expander)
        o: OPTiMLOptions = config.options.optiml
        self.options, dim = o, FEATURE_DIM if o.stage == 4 else FEATURE_DIM // 2
        self.dense: nn.Module | None = None
        if o.dense:
            self.dense = mlp(dim, o.dense, layers=2)
            self.dense_variance = otloss.VarianceLoss(gather=True)
            self.dense_covariance = otloss.CovarianceLoss(gather=True)
        self.criterion = otloss.OPTiMLLoss(
            o.dense or dim,
            alpha=o.alpha,
            beta=o.beta,
            eta=o.eta,
            eps=o.eps,
            match=o.match,
            marginals=o.marginals,
            perplexity=o.perplexity,
            tokens=o.tokens,
            num_heads=o.heads,
            shared=o.shared,
            gradient=o.gradient,
            objective=o.objective,
            max_iter=o.max_iter,
            gather=True,
        )

    def watched(self) -> dict[str, nn.Module | None]:
        return {**super().watched(), "cvsim": self.criterion.cvsim}

    def step(self, first: Tensor, second: Tensor) -> StepOutput:
        o = self.options
        (*maps_s, g_s), (*maps_t, g_t) = self.backbone.stages(first), self.backbone.stages(second)
        q_s, q_t = self.expander(g_s), self.expander(g_t)
        z_s, z_t = maps_s[o.stage - 3], maps_t[o.stage - 3]
        if self.dense is not None:
            z_s, z_t = self._projected(z_s), self._projected(z_t)
        out = self.criterion(z_s, z_t, q_s, q_t)
        loss = out.loss
        parts = {name: value.detach() for name, value in out._asdict().items() if name != "loss"}
        if o.invariance:
            parts["invariance"] = F.mse_loss(q_s.float(), q_t.float())
            loss = loss + o.invariance * parts["invariance"]
        if self.dense is not None:
            p_s, p_t = _positions(z_s), _positions(z_t)
            parts["dense_variance"] = self.dense_variance(p_s) + self.dense_variance(p_t)
            parts["dense_covariance"] = self.dense_covariance(p_s) + self.dense_covariance(p_t)
            loss = loss + o.beta * parts["dense_variance"] + o.eta * parts["dense_covariance"]
        parts["map_std"] = _map_deviation(z_s)
        return StepOutput(loss, {**parts, "std_q": spread(q_s), "std_g": spread(g_s)})

    def _projected(self, maps: Tensor) -> Tensor:
        """The projection head at every position of maps (B, d, h, w)."""
        assert self.dense is not None
        return self.dense(_positions(maps)).unflatten(0, (len(maps), *maps.shape[2:])).permute(0, 3, 1, 2)


def _positions(maps: Tensor) -> Tensor:
    """Maps (B, d, h, w) as a row of d features per image and position."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _map_deviation(z: Tensor) -> Tensor:
    """Deviation over positions as a share of the root mean square: near 0 means maps that are constant in space."""
    z = z.detach().float().flatten(2)
    return z.std(dim=2, correction=0).square().mean().sqrt() / z.square().mean().sqrt().clamp_min(1e-12)
