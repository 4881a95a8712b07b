"""OPTiML's loss: transport between two views' feature maps under learned marginals, with variance and covariance."""

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
COLLAPSE = 0.05  # share of the way from 1 point to all below which the mean perplexity is called collapsed


class MarginalCollapseWarning(UserWarning):
    """Nearly all of the learned mass sits on a few points; the transport loss has little left to say."""


class OPTiMLOutput(NamedTuple):
    """What `OPTiMLLoss` returns; every field is a scalar tensor.

    The first six are part of the graph, the others are diagnostics without gradient.
    """

    loss: Tensor
    """alpha·ot + beta·variance + eta·covariance + invariance weight·invariance."""
    ot: Tensor
    """L_OT: mean over images of the objective."""
    variance: Tensor
    """v(q_s) + v(q_t)."""
    covariance: Tensor
    """c(q_s) + c(q_t)."""
    invariance: Tensor
    """Mean squared difference of q_s and q_t."""
    transport_cost: Tensor
    """Mean over images of <T, M>; the same tensor as ``ot`` when that is the objective."""
    independent_cost: Tensor
    """Mean over images of <mu nu', M>: what the transport costs when nothing is matched."""
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
    softmax. v and c are `VarianceLoss` and `CovarianceLoss`, one value per view, without the halving of
    VICReg's code.

    **What is matched** (``match``). ``"channel"``: the d channels, each a vector of its hw activations; M is d × d, as
    the paper's symbols say. ``"position"``: the hw positions, each a vector of d features; M is hw × hw, as the
    paper's words say. r has no entry per position, so there :math:`\mu_i = \mathrm{softmax}_i\,
    \langle r_s, z_{s,i} \rangle / \sqrt d`, and :math:`\nu` likewise; that is our addition.

    **Where the mass goes** (``marginals``). The gradient of L_OT by its marginals moves mass to the cheapest pairs, and
    nothing in Eq. 3 opposes it:

    * ``"perplexity"`` (default): the softmax has a temperature, solved for each image so that the perplexity of the
      marginal is a given share of the points (`otloss.cvsim.log_softmax_with_perplexity`). CV-SIM says *where* the
      mass goes and cannot collapse it. The gradient includes that of the temperature.
    * ``"hardest"``: as ``"perplexity"``, but CV-SIM is trained to *raise* L_OT (its gradient is reversed), and the maps
      get no gradient through the marginals. The mass of the given perplexity moves to what the views match worst.
    * ``"learned"``: the plain softmax, as printed. It collapses onto few points; then a warning is given, once.
    * ``"detached"``: CV-SIM's marginals without gradient, to CV-SIM or through it. A module at random weights.
    * ``"uniform"``: equal masses and no CV-SIM.

    Parameters that get no gradient under a policy (CV-SIM when detached, or with ``gradient="none"``) are frozen.

    **What Eq. 3 lacks** (``invariance``). No term of it compares q_s with q_t; that two views of one image be alike is
    asked by L_OT alone. A weight above 0 adds the mean of :math:`(q_s - q_t)^2`, as VICReg does with a weight of 25.

    Everything is computed in float32 (float64 for float64 input), also under autocast, but CV-SIM in its parameters'
    dtype. Move the module to the device and give its parameters to the optimiser.

    Args:
        dim: number of channels d of the feature maps.
        alpha, beta, eta: weights of the three terms; the paper's values.
        eps: strength of the entropy in the transport problem; the paper does not give it.
        match: ``"channel"`` or ``"position"``.
        marginals: ``"perplexity"``, ``"hardest"``, ``"learned"``, ``"detached"`` or ``"uniform"``.
        perplexity: for the first two of these, the wanted share of d (or of hw for positions), in (0, 1).
        invariance: weight of the mean squared difference of q_s and q_t; 0 is Eq. 3.
        num_heads, tokens: of CV-SIM, see `CVSIM`.
        shared: whether one CV-SIM serves both directions; else the second has its own weights.
        objective: what L_OT is: ``"transport_cost"`` (the paper's), ``"value"`` or ``"divergence"``, see
            `CosineSinkhornLoss`.
        max_iter, tol, gradient, backend: of the solver, see :func:`otloss.sinkhorn`.
        gather: collect q_s and q_t from all processes for v and c, see `VarianceLoss`. L_OT is per image.

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
        max_iter: int = 200,
        tol: float = 1e-5,
        gradient: str = "implicit",
        backend: str | None = None,
        gather: bool = False,
    ) -> None:
        super().__init__()
        check_cvsim(dim, num_heads, tokens)  # also where the marginals do without one
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
        self.transport = CosineSinkhornLoss(eps, objective, max_iter, tol, gradient, reduction="none", backend=backend)
        self.variance, self.covariance = VarianceLoss(), CovarianceLoss()
        self.gather = gather  # in forward, once for both

        self.cvsim: CVSIM | None = None
        self.cvsim_t: CVSIM | None = None  # the other direction's own, unless shared
        if marginals != "uniform":
            self.cvsim = CVSIM(dim, num_heads, tokens)
            self.cvsim_t = None if shared else CVSIM(dim, num_heads, tokens)
        self._marginals_learn = marginals in ("perplexity", "hardest", "learned") and gradient != "none"
        if not self._marginals_learn:
            self.requires_grad_(False)
        self._collapse_reported, self._calls = False, 0

    def forward(self, z_s: Tensor, z_t: Tensor, q_s: Tensor, q_t: Tensor) -> OPTiMLOutput:
        """The loss of feature maps ``z_s``, ``z_t (B, d, h, w)`` and expanded embeddings ``q_s``, ``q_t (B, D)``.

        The maps' heights and widths may differ under ``match="position"``. The embeddings need at least two rows
        (after gathering).

        Raises:
            TypeError: an input is no floating-point tensor, or one view is in float64 and the other is not.
            ValueError: an input's shape does not fit, the batch has one image only, or a map is not finite.
        """
        self._check(z_s, z_t, q_s, q_t)
        with no_autocast(z_s):
            dtype = working_dtype(z_s=z_s, z_t=z_t)
            maps_s, maps_t = (z.to(dtype).flatten(2) for z in (z_s, z_t))  # (B, d, hw)
            x, y = (maps_s, maps_t) if self.match == "channel" else (maps_s.mT, maps_t.mT)
            log_mu, log_nu = self._log_marginals(maps_s, maps_t)
            try:
                per_image, solved = self.transport.per_problem(x, y, log_a=log_mu, log_b=log_nu)
            except ValueError as error:  # which names arguments of the solver
                with suppress(RuntimeError):  # under vmap there is no one answer
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
        """log mu and log nu, each ``(B, points)``, of maps ``(B, d, hw)``; None is uniform."""
        if self.cvsim is None:
            return None, None
        if self.marginals == "hardest":  # the maps are not to become hard
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
        """Warn once. Reading the number makes a GPU wait, so there only every hundredth call looks."""
        free = self.marginals in ("learned", "detached")
        if self._collapse_reported or not free or torch.compiler.is_compiling():
            return
        self._calls += 1
        if perplexity.device.type != "cpu" and self._calls % 100:
            return
        try:
            collapsed = bool(perplexity - 1 < COLLAPSE * (points - 1))
        except RuntimeError:  # under vmap there is no one number
            return
        if collapsed:
            self._collapse_reported = True
            warn(
                f"the marginals have collapsed: their mean perplexity is {float(perplexity):.1f} of {points} points, "
                "so L_OT compares almost nothing; take marginals='perplexity'",
                MarginalCollapseWarning,
            )

    def _check(self, z_s: Tensor, z_t: Tensor, q_s: Tensor, q_t: Tensor) -> None:
        for name, z in (("z_s", z_s), ("z_t", z_t)):
            check_tensor(name, z, 4, f"(B, {self.dim}, h, w)")
            if z.dim() != 4 or z.shape[1] != self.dim or 0 in z.shape[2:]:
                raise ValueError(f"{name} must have shape (B, {self.dim}, h, w), got {tuple(z.shape)}")
        if self.match == "channel" and z_s.shape[2:] != z_t.shape[2:]:
            raise ValueError(
                "z_s and z_t must have the same height and width to compare channels, "
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


def _describe(x: Tensor, y: Tensor, log_mu: Tensor | None, log_nu: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean perplexity of the marginals, and mean cost of the independent coupling.

    <mu nu', M> = 1 - <sum_i mu_i x̂_i, sum_j nu_j ŷ_j> needs no ``(B, n, m)`` tensor.
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
