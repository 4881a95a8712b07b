"""OPTiML, Eq. 3 of the paper: transport between the feature maps of two views, variance, covariance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

import otloss

from ..model import FEATURE_DIM, expander
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
    marginals: Literal["perplexity", "learned", "detached", "uniform"] | None = None
    """How CV-SIM sets the marginals; "learned" is as printed and is known to collapse. Unset: the preset's."""
    perplexity: float = 0.5
    """Share of the points that the marginals are spread over, under the policy of that name."""
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


class OPTiML(Method):
    """No term compares embeddings: all agreement between views comes from the transport of the maps."""

    Options = OPTiMLOptions

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        self.expander = expander(config.expander)
        o: OPTiMLOptions = config.options.optiml
        self.criterion = otloss.OPTiMLLoss(
            FEATURE_DIM,
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
        z_s, g_s = self.backbone(first)
        z_t, g_t = self.backbone(second)
        q_s, q_t = self.expander(g_s), self.expander(g_t)
        out = self.criterion(z_s, z_t, q_s, q_t)
        parts = {name: value.detach() for name, value in out._asdict().items() if name != "loss"}
        return StepOutput(out.loss, {**parts, "std_q": spread(q_s), "std_g": spread(g_s)})
