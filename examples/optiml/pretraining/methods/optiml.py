"""OPTiML, Eq. 3 of the paper: transport between the feature maps of two views, variance, covariance."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

import otloss

from ..network import FEATURE_DIM, expander, mlp
from ..settings import AugmentConfig, PretrainConfig
from ..views import Views, two_views
from .base import Method, StepOutput, spread
from .options import OPTiMLOptions
from .places import PlacedViews, centres, shared


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
        usual = (
            o if not o.solved_here else replace(o, alpha=0.0, marginals="uniform", objective="transport_cost", near=0.0)
        )
        self.criterion = otloss.OPTiMLLoss(
            o.dense or dim,
            alpha=usual.alpha,
            beta=o.beta,
            eta=o.eta,
            eps=o.eps,
            match=o.match,
            marginals=usual.marginals,
            perplexity=o.perplexity,
            invariance=o.invariance,
            tokens=o.tokens,
            num_heads=o.heads,
            shared=o.shared,
            gradient=o.gradient,
            objective=usual.objective,
            max_iter=o.max_iter,
            gather=True,
        )

    def watched(self) -> dict[str, nn.Module | None]:
        return {**super().watched(), "cvsim": self.criterion.cvsim, "dense": self.dense}

    @classmethod
    def views(cls, image_size: int, config: AugmentConfig) -> Views:
        return PlacedViews(two_views(image_size, config))

    def step(self, first: Tensor, second: Tensor, *places: Tensor) -> StepOutput:
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
        if o.solved_here:
            out = out._replace(**self.transport(z_s, z_t, *places))
            loss = loss + o.alpha * out.ot
        parts = {name: value.detach() for name, value in out._asdict().items() if name != "loss"}
        log = {**parts, **dense, "map_std": _map_deviation(z_s)}
        return StepOutput(loss, {**log, "std_q": spread(q_s), "std_g": spread(g_s)})

    def transport(self, z_s: Tensor, z_t: Tensor, *places: Tensor) -> dict[str, Tensor]:
        """L_OT where ``OPTiMLLoss`` cannot compute it, and its diagnostics, of maps of views at ``places`` (B, 4).

        The cost is 1 - cos plus ``near`` times the squared distance between what positions show. L_OT is the transport
        cost or the value; or, as the objective "matched", the mean over images of Σ_ij T_ij ‖z_i - z_j‖² / d, where d
        is the length of z_i. As in VICRegL (arXiv:2210.01571) vectors are then compared as they are, and their variance
        and covariance are to keep them from collapsing. Under the option ``gradient="none"`` the plan T is a constant.
        """
        o, (rows, columns) = self.options, z_s.shape[2:]
        with torch.autocast(z_s.device.type, enabled=False):
            x, y = (z.float().flatten(2) for z in (z_s, z_t))
            if o.match == "position":
                x, y = x.mT, y.mT
            cost, masses = otloss.cosine_cost(x, y), [x.new_full(x.shape[:2], 1 / x.shape[1])] * 2
            if o.near:
                cost = cost + o.near * otloss.sqeuclidean_cost(*(centres(place, rows, columns) for place in places))
            if o.marginals == "overlap":
                masses = [_normalised(shared(*pair, rows, columns)) for pair in (places, places[::-1])]
            solved = otloss.sinkhorn(cost, *masses, eps=o.eps, max_iter=o.max_iter, gradient=o.gradient)
            if o.objective == "matched":
                ot = (solved.plan * otloss.sqeuclidean_cost(x, y)).sum((1, 2)).mean() / x.shape[2]
            else:
                ot = getattr(solved, o.objective).mean()
            return {
                "ot": ot,
                "transport_cost": solved.transport_cost.mean(),
                "perplexity": torch.special.entr(torch.cat(masses)).sum(1).exp().mean(),
                "marginal_error": solved.marginal_error.detach().amax(),
                "converged": solved.converged.float().mean(),
            }


def _normalised(mass: Tensor) -> Tensor:
    """Masses (B, n) that add up to 1; equal ones where there are none."""
    total = mass.sum(1, keepdim=True)
    return torch.where(total > 0, mass / total.clamp_min(1e-30), 1 / mass.shape[1])


def _projected(maps: Tensor, head: nn.Module) -> tuple[Tensor, Tensor]:
    """Maps (B, d, h, w) through a head at every position: as maps, and as a row per image and position."""
    rows = head(maps.permute(0, 2, 3, 1).flatten(0, 2))
    return rows.unflatten(0, (len(maps), *maps.shape[2:])).permute(0, 3, 1, 2), rows


def _map_deviation(z: Tensor) -> Tensor:
    """Deviation over positions as a share of the root mean square, per image: near 0 for maps constant in space."""
    z = z.detach().float().flatten(2)
    share = z.std(dim=2, correction=0).square().mean(1) / z.square().mean((1, 2)).clamp_min(1e-12)
    return share.sqrt().mean()
