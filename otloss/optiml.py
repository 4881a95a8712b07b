"""OPTiML's loss: optimal transport between two views' features, plus variance and covariance terms."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from otloss.checks import check_choice, check_device, check_number, check_tensor, no_autocast, warn, working_dtype
from otloss.cost import unit_rows
from otloss.cvsim import CVSIM, check_cvsim, log_softmax_with_perplexity
from otloss.losses import CosineSinkhornLoss
from otloss.regularizers import CovarianceLoss, VarianceLoss, whole_batch

__all__ = ["MarginalCollapseWarning", "OPTiMLLoss", "OPTiMLOutput"]

MATCHES = ("channel", "position")
MARGINALS = ("perplexity", "hardest", "learned", "detached", "uniform")
COLLAPSE = 0.05  # marginals count as collapsed when their mean perplexity is below 1 + COLLAPSE * (points - 1)


class MarginalCollapseWarning(UserWarning):
    """Nearly all of the learned mass sits on a few points, so the transport loss compares almost nothing."""


class OPTiMLOutput(NamedTuple):
    """What `OPTiMLLoss` returns; every field is a scalar tensor.

    The first six carry gradients. The others are diagnostics without gradient.
    """

    loss: Tensor
    """alpha·ot + beta·variance + eta·covariance + invariance weight·invariance."""
    ot: Tensor
    """L_OT, the mean of the objective over images."""
    variance: Tensor
    """v(q_s) + v(q_t)."""
    covariance: Tensor
    """c(q_s) + c(q_t)."""
    invariance: Tensor
    """Mean squared difference of q_s and q_t."""
    transport_cost: Tensor
    """Mean over images of <T, M>; the same tensor as ``ot`` when that is the objective."""
    independent_cost: Tensor
    """Mean over images of <mu nu', M>, the cost of the independent coupling, which matches nothing."""
    perplexity: Tensor
    """exp(entropy), the effective number of points, averaged over mu, nu and images."""
    marginal_error: Tensor
    """Largest L1 distance, over images, of the plan's marginals from mu and nu."""
    converged: Tensor
    """Share of images whose solver converged, between 0 and 1."""


class OPTiMLLoss(nn.Module):
    r"""The objective of OPTiML (later OTCXR) for two views of a batch of images.

    .. math::
        L = \alpha\, L_{OT} + \beta\, [v(q_s) + v(q_t)] + \eta\, [c(q_s) + c(q_t)], \qquad
        L_{OT} = \langle T^*, M \rangle, \quad M_{ij} = 1 - \cos(z_{s,i}, z_{t,j}), \quad T^* \in \Pi(\mu, \nu)

    (Eq. 1–3). The marginals come from CV-SIM on the pooled maps :math:`g = \mathrm{GAP}(z)`:
    :math:`r_s = \mathrm{CVSIM}(g_s, g_t)`, :math:`r_t = \mathrm{CVSIM}(g_t, g_s)`, and :math:`\mu, \nu` are their
    softmax. v and c are `VarianceLoss` and `CovarianceLoss`. Each gives one value per view. VICReg's code halves the
    sum of the two values; this loss does not.

    **What is matched** (``match``). ``"channel"`` matches the d channels. Each is a vector of its hw activations, and M
    is d × d, as the paper's symbols say. ``"position"`` matches the hw positions. Each is a vector of d features, and
    M is hw × hw, as the paper's words say. r has no entry per position. For positions we therefore add
    :math:`\mu_i = \mathrm{softmax}_i\, \langle r_s, z_{s,i} \rangle / \sqrt d`, and :math:`\nu` likewise. The tokens
    of a transformer are positions: N tokens are a map with hw = N. Leave out the class token.

    **Where the mass goes** (``marginals``). The gradient of L_OT by its marginals moves mass to the cheapest pairs.
    Nothing in Eq. 3 opposes this. The options are:

    * ``"perplexity"`` (default): the softmax has a temperature. It is solved for each image, so that the perplexity of
      the marginal is a given share of the points (`otloss.cvsim.log_softmax_with_perplexity`). CV-SIM decides *where*
      the mass goes and cannot collapse it. The gradient includes that of the temperature.
    * ``"hardest"``: as ``"perplexity"``, but CV-SIM gets the reversed gradient and so learns to *raise* L_OT. The mass
      moves to what the views match worst, at the given perplexity. The maps get no gradient through the marginals.
    * ``"learned"``: the plain softmax, as printed. It collapses onto few points. The module warns once when it has.
    * ``"detached"``: CV-SIM gives the marginals, but no gradient flows to it or through it. Its weights stay random.
    * ``"uniform"``: equal masses and no CV-SIM.

    CV-SIM's parameters are frozen where they get no gradient: with ``"detached"`` and with ``gradient="none"``.

    **What Eq. 3 lacks** (``invariance``). No term of Eq. 3 compares q_s with q_t. Only L_OT asks that two views of one
    image be alike. A weight above 0 adds the mean of :math:`(q_s - q_t)^2`, as VICReg does with a weight of 25.

    The loss is computed in float32 (float64 for float64 input), also under autocast. Only CV-SIM runs in the dtype of
    its parameters. Move the module to the device and give its parameters to the optimiser.

    Args:
        dim: number of channels d of the feature maps.
        alpha, beta, eta: weights of the three terms. The defaults are the paper's values.
        eps: strength of the entropy in the transport problem. The paper does not give it.
        match: ``"channel"`` or ``"position"``.
        marginals: ``"perplexity"``, ``"hardest"``, ``"learned"``, ``"detached"`` or ``"uniform"``.
        perplexity: the wanted share of d (of hw for positions), in (0, 1), for ``"perplexity"`` and ``"hardest"``.
        invariance: weight of the mean squared difference of q_s and q_t; 0 is Eq. 3.
        num_heads, tokens: options of CV-SIM, see `CVSIM`.
        shared: whether one CV-SIM serves both directions. If not, the second direction has its own weights.
        objective: what L_OT is: ``"transport_cost"`` (the paper's), ``"value"`` or ``"divergence"``, see
            `CosineSinkhornLoss`.
        max_iter, tol, gradient, solver, backend: options of the solver, see :func:`otloss.sinkhorn`.
        gather: collect q_s and q_t from all processes for v and c, see `VarianceLoss`. L_OT is always per image.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or value.

    Source: Singh, Gorade and Mishra, arXiv:2404.11868.

    Example:
        >>> import torch, otloss
        >>> loss = otloss.OPTiMLLoss(dim=32)
        >>> z_s, z_t = torch.rand(8, 32, 4, 4), torch.rand(8, 32, 4, 4)
        >>> q_s, q_t = torch.randn(8, 64), torch.randn(8, 64)
        >>> out = loss(z_s, z_t, q_s, q_t)
        >>> out.loss.backward()
        >>> round(out.perplexity.item(), 2), bool(out.transport_cost < out.independent_cost)
        (16.0, True)
    """

    def __init__(
        self,
        dim: int,
        *,
        alpha: float = 0.6,
        beta: float = 25.0,
        eta: float = 1.0,
        eps: float = 0.05,
        match: str = "channel",
        marginals: str = "perplexity",
        objective: str = "transport_cost",
        perplexity: float = 0.5,
        invariance: float = 0.0,
        num_heads: int = 8,
        tokens: str = "channel",
        shared: bool = True,
        max_iter: int = 1000,
        tol: float = 1e-5,
        gradient: str = "implicit",
        solver: str = "auto",
        backend: str | None = None,
        gather: bool = False,
    ) -> None:
        super().__init__()
        check_cvsim(dim, num_heads, tokens)  # also for uniform marginals, which use no CV-SIM
        for name, weight in (("alpha", alpha), ("beta", beta), ("eta", eta), ("invariance", invariance)):
            check_number(name, weight, positive=False)
        check_choice("match", match, MATCHES)
        check_choice("marginals", marginals, MARGINALS)
        check_number("perplexity", perplexity, positive=True)
        if perplexity >= 1:
            raise ValueError(
                f"perplexity must be a share below 1, got {perplexity}; for equal masses take marginals='uniform'"
            )
        self.dim, self.alpha, self.beta, self.eta, self.invariance = dim, alpha, beta, eta, invariance
        self.match, self.marginals, self.perplexity = match, marginals, perplexity
        self.transport = CosineSinkhornLoss(
            eps, objective, max_iter, tol, gradient, reduction="none", solver=solver, backend=backend
        )
        self.variance, self.covariance = VarianceLoss(), CovarianceLoss()
        self.gather = gather  # forward gathers once for both terms

        self.cvsim: CVSIM | None = None
        self.cvsim_t: CVSIM | None = None  # for the direction from t to s, unless shared
        if marginals != "uniform":
            self.cvsim = CVSIM(dim, num_heads, tokens)
            self.cvsim_t = None if shared else CVSIM(dim, num_heads, tokens)
        self._marginals_learn = marginals in ("perplexity", "hardest", "learned") and gradient != "none"
        if not self._marginals_learn:
            self.requires_grad_(False)
        self._collapse_reported, self._calls = False, 0

    def forward(self, z_s: Tensor, z_t: Tensor, q_s: Tensor, q_t: Tensor) -> OPTiMLOutput:
        """The loss of features ``z_s``, ``z_t`` and expanded embeddings ``q_s``, ``q_t (B, D)``.

        The features are maps ``(B, d, h, w)`` or tokens ``(B, N, d)``, of both views alike. With ``match="position"``
        the views may have different numbers of positions. The embeddings need at least two rows (after gathering).

        Raises:
            TypeError: an input is no floating-point tensor, or one view is in float64 and the other is not.
            ValueError: an input's shape does not fit, the batch has one image only, or features are not finite.
        """
        self._check(z_s, z_t, q_s, q_t)
        with no_autocast(z_s):
            dtype = working_dtype(z_s=z_s, z_t=z_t)
            maps_s, maps_t = (_as_map(z.to(dtype)) for z in (z_s, z_t))  # (B, d, hw)
            x, y = (maps_s, maps_t) if self.match == "channel" else (maps_s.mT, maps_t.mT)
            log_mu, log_nu = self._log_marginals(maps_s, maps_t)
            try:
                per_image, solved = self.transport.per_problem(x, y, log_a=log_mu, log_b=log_nu)
            except ValueError as error:  # its message names the solver's arguments
                with suppress(RuntimeError):  # under vmap there is no single answer
                    marginals = f"the marginals of CV-SIM (marginals={self.marginals!r})"
                    for name, z in (("z_s", z_s), ("z_t", z_t), (marginals, log_mu), (marginals, log_nu)):
                        if z is not None and not torch.isfinite(z).all():
                            message = f"{name} must be finite, got NaN or inf: has training diverged?"
                            raise ValueError(message) from error
                raise
            ot = per_image.mean()
            all_s, all_t = whole_batch("q_s", q_s, self.gather), whole_batch("q_t", q_t, self.gather)
            variance = self.variance(all_s) + self.variance(all_t)
            covariance = self.covariance(all_s) + self.covariance(all_t)
            q_dtype = working_dtype(q_s=q_s, q_t=q_t)
            invariance = (q_s.to(q_dtype) - q_t.to(q_dtype)).square().mean()
            loss = self.alpha * ot + self.beta * variance + self.eta * covariance + self.invariance * invariance
            transport_cost = ot if self.transport.objective == "transport_cost" else solved.transport_cost.mean()
            with torch.no_grad():
                perplexity, independent_cost = _describe(x, y, log_mu, log_nu)
                self._report_collapse(perplexity, x.shape[1])
        return OPTiMLOutput(
            loss=loss,
            ot=ot,
            variance=variance,
            covariance=covariance,
            invariance=invariance,
            transport_cost=transport_cost,
            independent_cost=independent_cost,
            perplexity=perplexity,
            marginal_error=solved.marginal_error.detach().amax(),
            converged=solved.converged.to(dtype).mean(),
        )

    def _log_marginals(self, maps_s: Tensor, maps_t: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """log mu and log nu, each ``(B, points)``, of maps ``(B, d, hw)``. None stands for uniform masses."""
        if self.cvsim is None:
            return None, None
        if self.marginals == "hardest":  # the maps must not learn to be hard to match
            maps_s, maps_t = maps_s.detach(), maps_t.detach()
        with torch.set_grad_enabled(self._marginals_learn and torch.is_grad_enabled()):
            weight_dtype = self.cvsim.query.weight.dtype
            g_s, g_t = (maps.mean(-1).to(weight_dtype) for maps in (maps_s, maps_t))
            r_s = self.cvsim(g_s, g_t).to(maps_s.dtype)
            r_t = (self.cvsim_t or self.cvsim)(g_t, g_s).to(maps_t.dtype)
            return self._to_log_mass(r_s, maps_s), self._to_log_mass(r_t, maps_t)

    def _to_log_mass(self, r: Tensor, maps: Tensor) -> Tensor:
        scores = r if self.match == "channel" else torch.einsum("bd,bdp->bp", r, maps) / self.dim**0.5
        if self.marginals in ("perplexity", "hardest"):
            log_mass = log_softmax_with_perplexity(scores, self.perplexity * scores.shape[-1])
            return log_mass if self.marginals == "perplexity" else 2 * log_mass.detach() - log_mass  # gradient reversed
        return scores.log_softmax(-1)

    def _report_collapse(self, perplexity: Tensor, points: int) -> None:
        """Warn once. Reading the number makes a GPU wait, so on a GPU only every hundredth call reads it."""
        free = self.marginals in ("learned", "detached")
        if self._collapse_reported or not free or torch.compiler.is_compiling():
            return
        self._calls += 1
        if perplexity.device.type != "cpu" and self._calls % 100:
            return
        try:
            collapsed = bool(perplexity - 1 < COLLAPSE * (points - 1))
        except RuntimeError:  # under vmap there is no single number
            return
        if collapsed:
            self._collapse_reported = True
            warn(
                f"the marginals have collapsed: their mean perplexity is {float(perplexity):.1f} of {points} points, "
                "so L_OT compares almost nothing; take marginals='perplexity'",
                MarginalCollapseWarning,
            )

    def _check(self, z_s: Tensor, z_t: Tensor, q_s: Tensor, q_t: Tensor) -> None:
        shapes = f"(B, {self.dim}, h, w) or (B, N, {self.dim})"
        for name, z in (("z_s", z_s), ("z_t", z_t)):
            check_tensor(name, z, 3, shapes)
            if z.dim() not in (3, 4) or z.shape[1 if z.dim() == 4 else 2] != self.dim or 0 in z.shape[1:]:
                raise ValueError(f"{name} must have shape {shapes}, got {tuple(z.shape)}")
        if z_s.dim() != z_t.dim():
            raise ValueError(
                f"z_s and z_t must both be maps or both be tokens, got {tuple(z_s.shape)} and {tuple(z_t.shape)}"
            )
        if self.match == "channel" and z_s.shape[1:] != z_t.shape[1:]:
            raise ValueError(
                "z_s and z_t must have the same height and width, or equally many tokens, to compare channels, "
                f"got {tuple(z_s.shape)} and {tuple(z_t.shape)}"
            )
        for name, q in (("q_s", q_s), ("q_t", q_t)):
            check_tensor(name, q, 2, "(B, D)")
            if q.dim() != 2:
                raise ValueError(f"{name} must have shape (B, D), got {tuple(q.shape)}")
        check_device(z_s=z_s, z_t=z_t, q_s=q_s, q_t=q_t)
        if q_s.shape[1] != q_t.shape[1]:
            raise ValueError(f"q_s and q_t must be equally wide, got {tuple(q_s.shape)} and {tuple(q_t.shape)}")
        sizes = [len(t) for t in (z_s, z_t, q_s, q_t)]
        if len(set(sizes)) > 1:
            raise ValueError(f"z_s, z_t, q_s and q_t must hold equally many images, got {sizes}")

    def extra_repr(self) -> str:
        share = f"perplexity={self.perplexity}, " if self.marginals in ("perplexity", "hardest") else ""
        return (
            f"dim={self.dim}, alpha={self.alpha}, beta={self.beta}, eta={self.eta}, invariance={self.invariance}, "
            f"match={self.match!r}, marginals={self.marginals!r}, {share}shared={self.cvsim_t is None}, "
            f"gather={self.gather}"
        )


def _as_map(z: Tensor) -> Tensor:
    """Maps ``(B, d, h, w)`` or tokens ``(B, N, d)`` as ``(B, d, positions)``."""
    return z.flatten(2) if z.dim() == 4 else z.mT


def _describe(x: Tensor, y: Tensor, log_mu: Tensor | None, log_nu: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean perplexity of the marginals, and mean cost of the independent coupling.

    The identity <mu nu', M> = 1 - <sum_i mu_i x̂_i, sum_j nu_j ŷ_j> needs no ``(B, n, m)`` tensor.
    """
    centers, perplexities = [], []
    for points, log_mass in ((x, log_mu), (y, log_nu)):
        if log_mass is None:
            mass = x.new_full(points.shape[:2], 1 / points.shape[1])
        else:
            mass = log_mass.exp()
        perplexities.append(torch.special.entr(mass).sum(-1).exp())
        centers.append((mass.unsqueeze(1) @ unit_rows(points)).squeeze(1))
    independent = 1 - (centers[0] * centers[1]).sum(-1)
    return torch.cat(perplexities).mean(), independent.mean()
