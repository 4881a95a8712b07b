"""OPTiML, Eq. 3 of the paper: transport between the feature maps of two views, variance, covariance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import otloss

from ..network import FEATURE_DIM, expander, mlp
from ..settings import PretrainConfig
from .base import Method, StepOutput, spread
from .options import OPTiMLOptions


class OPTiML(Method):
    """Eq. 3, and what it lacks: a term for the invariance of the embeddings, and a head for the maps.

    Without both, as printed, all agreement between views comes from the transport of the backbone's maps.
    """

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
        matched = o.objective == "matched"
        self.criterion = otloss.OPTiMLLoss(
            o.dense or dim,
            alpha=0.0 if matched else o.alpha,
            beta=o.beta,
            eta=o.eta,
            eps=o.eps,
            match=o.match,
            marginals=o.marginals,
            perplexity=o.perplexity,
            invariance=o.invariance,
            tokens=o.tokens,
            num_heads=o.heads,
            shared=o.shared,
            gradient=o.gradient,
            objective="transport_cost" if matched else o.objective,
            max_iter=o.max_iter,
            gather=True,
        )

    def watched(self) -> dict[str, nn.Module | None]:
        return {**super().watched(), "cvsim": self.criterion.cvsim, "dense": self.dense}

    def step(self, first: Tensor, second: Tensor) -> StepOutput:
        o = self.options
        (*maps_s, g_s), (*maps_t, g_t) = self.backbone.stages(first), self.backbone.stages(second)
        q_s, q_t = self.expander(g_s), self.expander(g_t)
        z_s, z_t = maps_s[o.stage - 3], maps_t[o.stage - 3]
        dense: dict[str, Tensor] = {}
        if self.dense is not None:
            (z_s, p_s), (z_t, p_t) = _projected(z_s, self.dense), _projected(z_t, self.dense)
            dense["dense_variance"] = self.dense_variance(p_s) + self.dense_variance(p_t)
            dense["dense_covariance"] = self.dense_covariance(p_s) + self.dense_covariance(p_t)
        out = self.criterion(z_s, z_t, q_s, q_t)
        loss = out.loss
        if dense:
            loss = loss + o.beta * dense["dense_variance"] + o.eta * dense["dense_covariance"]
        if o.objective == "matched":
            out = out._replace(ot=self.matched(z_s, z_t))
            loss = loss + o.alpha * out.ot
        parts = {name: value.detach() for name, value in out._asdict().items() if name != "loss"}
        log = {**parts, **dense, "map_std": _map_deviation(z_s)}
        return StepOutput(loss, {**log, "std_q": spread(q_s), "std_g": spread(g_s)})

    def matched(self, z_s: Tensor, z_t: Tensor) -> Tensor:
        """Mean over images of Σ_ij T_ij ‖z_i − z_j‖² / d, where T is the plan of the cosine cost, d the length of z_i.

        The plan is a constant under the option ``gradient="none"``. As in VICRegL (arXiv:2210.01571), vectors are
        compared as they are, and their variance and covariance are to keep them from collapsing.
        """
        with torch.autocast(z_s.device.type, enabled=False):
            x, y = (z.float().flatten(2) for z in (z_s, z_t))
            if self.options.match == "position":
                x, y = x.mT, y.mT
            _, solved = self.criterion.transport.per_problem(x, y)
            return (solved.plan * otloss.sqeuclidean_cost(x, y)).sum((1, 2)).mean() / x.shape[2]


def _projected(maps: Tensor, head: nn.Module) -> tuple[Tensor, Tensor]:
    """Maps (B, d, h, w) through a head at every position: as maps, and as a row per image and position."""
    rows = head(maps.permute(0, 2, 3, 1).flatten(0, 2))
    return rows.unflatten(0, (len(maps), *maps.shape[2:])).permute(0, 3, 1, 2), rows


def _map_deviation(z: Tensor) -> Tensor:
    """Deviation over positions as a share of the root mean square, per image: near 0 for maps constant in space."""
    z = z.detach().float().flatten(2)
    share = z.std(dim=2, correction=0).square().mean(1) / z.square().mean((1, 2)).clamp_min(1e-12)
    return share.sqrt().mean()
