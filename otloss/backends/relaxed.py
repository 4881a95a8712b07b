r"""Penalties on the marginals in place of constraints, for the reference backend.

.. math:: \min_T \langle T, C \rangle + \varepsilon\, \mathrm{KL}(T | ab^\top)
          + \rho_a \mathrm{KL}(T1 | a) + \rho_b \mathrm{KL}(T^\top 1 | b), \qquad
          \mathrm{KL}(p | q) = \sum p \log(p/q) - p + q

At the solution :math:`T1 = a\, e^{-f/\rho_a}` and :math:`T^\top 1 = b\, e^{-g/\rho_b}`, and a half-step multiplies the
balanced one by :math:`\rho / (\rho + \varepsilon)`. Without a penalty (rho is None) the marginal is a constraint, which
is the limit of a large rho.

Half-steps change the total mass slowly. So every iteration ends with the constant t that is best for the dual along
(f + t, g - t). It makes the totals of both targets equal and leaves the plan as it is.

Source: Chizat et al. 2018 (arXiv 1607.05816) for the half-steps; Séjourné, Vialard and Peyré 2022 (2201.00730) for the
constant.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from otloss.backends.protocol import Problem, Upstream
from otloss.backends.steps import Opened, bounded_exp, without_forbidden
from otloss.checks import wide


class Penalty(NamedTuple):
    """The penalty on one marginal, as a batch of columns ``(B, 1)``; None is a constraint."""

    rho: Tensor | None
    eps: float

    @property
    def damping(self) -> Tensor | float:
        """What a half-step is multiplied by."""
        return 1.0 if self.rho is None else self.rho / (self.rho + self.eps)

    @property
    def stiffness(self) -> Tensor | float:
        """What the diagonal of the adjoint system is multiplied by: 1 + eps / rho."""
        return 1.0 if self.rho is None else 1 + self.eps / self.rho

    @property
    def inverse(self) -> Tensor | float:
        """1 / rho."""
        return 0.0 if self.rho is None else 1 / self.rho

    def share(self, potential: Tensor) -> Tensor:
        """The marginal that the potential asks for, relative to its mass."""
        return torch.ones_like(potential) if self.rho is None else torch.exp(-potential / self.rho)

    def slope(self, potential: Tensor) -> Tensor:
        """The derivative of the penalty's part of the dual by the mass: rho (1 - exp(-f / rho)), or f."""
        return potential if self.rho is None else -self.rho * torch.expm1(-potential / self.rho)

    def divergence(self, marginal: Tensor, mass: Tensor) -> Tensor:
        """rho KL(marginal | mass) of each problem; 0 for a constraint."""
        if self.rho is None:
            return marginal.new_zeros(marginal.shape[:-1])
        some = (marginal > 0) & (mass > 0)
        ratio = torch.where(some, marginal, 1.0) / torch.where(some, mass, 1.0)
        terms = torch.where(some, marginal * ratio.log(), 0.0) - marginal + mass
        return (self.rho * terms).sum(-1)

    def by_rho(self, marginal: Tensor, mass: Tensor) -> Tensor:
        """KL(marginal | mass) of each problem: the derivative of the value by rho."""
        return Penalty(torch.ones_like(mass[..., :1]), self.eps).divergence(marginal, mass)


def penalties(problem: Problem) -> tuple[Penalty, Penalty]:
    """The penalties on both marginals."""
    rhos = (None if rho is None else rho.unsqueeze(-1) for rho in (problem.rho_a, problem.rho_b))
    of_a, of_b = (Penalty(rho, problem.eps) for rho in rhos)
    return of_a, of_b


def _constant(a: Tensor, b: Tensor, f: Tensor, g: Tensor, of_a: Penalty, of_b: Penalty) -> Tensor:
    """The constant t ``(B, 1)`` that makes the totals of a exp(-(f + t) / rho_a) and b exp(-(g - t) / rho_b) equal."""
    log_a = torch.log((a * of_a.share(f)).sum(-1, keepdim=True))
    log_b = torch.log((b * of_b.share(g)).sum(-1, keepdim=True))
    rate = of_a.inverse + of_b.inverse
    return (log_a - log_b) / rate


def iterate(
    steps: Opened, g: Tensor, of_a: Penalty, of_b: Penalty, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """f, g and the number of iterations of each problem, from this g.

    A problem stops where the L1 distance of both marginals from those that the potentials ask for is below ``tol`` of
    the plan's mass.
    """
    a, b, eps = steps.a, steps.b, steps.eps
    f, column_error = torch.zeros_like(a), a.new_zeros(len(a))
    n_iter = torch.zeros(len(a), dtype=torch.int64, device=a.device)
    running = torch.ones_like(n_iter, dtype=torch.bool)
    for iteration in range(max_iter):
        whole = steps.f_step(g)
        if iteration > 0:
            rows = torch.where(a > 0, a * torch.exp((f - whole) / eps), 0.0)
            row_error = torch.where(a > 0, rows - a * of_a.share(f), 0.0).abs().sum(-1)
            running = running & ~(row_error + column_error < tol * rows.sum(-1))
            if not running.any():
                break
        f_next = of_a.damping * whole
        g_next = of_b.damping * steps.g_step(f_next)
        t = _constant(a, b, torch.where(a > 0, f_next, 0.0), torch.where(b > 0, g_next, 0.0), of_a, of_b)
        columns, asked = of_b.share(g_next), of_b.share(g_next - t)
        changed = torch.where(b > 0, b * (columns - asked), 0.0).abs().sum(-1)
        keep = running.unsqueeze(-1)
        f, g = torch.where(keep, f_next + t, f), torch.where(keep, g_next - t, g)
        column_error = torch.where(running, changed, column_error)
        n_iter = n_iter + running
    return f, g, n_iter


def _multipliers(plan: Tensor, r: Tensor, s: Tensor, of_a: Penalty, of_b: Penalty) -> tuple[Tensor, Tensor]:
    """V of [m_a D_a, T; T', m_b D_b] [U; V] = [r; s], m = 1 + eps / rho, and the relative residual ``(B,)``.

    D holds the plan's marginals. The Schur complement on the columns is the Laplacian of the graph with weights
    T' (m_a D_a)^-1 T, plus D_b (m_b - 1 / m_a) on the diagonal. Both are sums without cancellation, and the second one
    makes it definite.
    """
    dtype = plan.dtype
    plan, r, s = wide(plan), wide(r), wide(s)
    soft_a = of_a.stiffness
    rows, columns = plan.sum(-1), plan.sum(-2)
    inverse = torch.where(rows > 0, 1 / (torch.where(rows > 0, rows, 1.0) * soft_a), 0.0)
    weights = plan.transpose(-1, -2) @ (plan * inverse.unsqueeze(-1))
    eye = torch.eye(plan.shape[-1], dtype=plan.dtype, device=plan.device)
    weights = weights * (1 - eye)
    degrees = weights.sum(-1) + columns * (of_b.eps * of_b.inverse + of_a.eps * of_a.inverse / soft_a)
    unroot = torch.where(degrees > 0, torch.where(degrees > 0, degrees, 1.0).rsqrt(), 0.0)
    matrix = eye - unroot.unsqueeze(-1) * weights * unroot.unsqueeze(-2)
    right = (unroot * (s - (plan * (inverse * r).unsqueeze(-1)).sum(-2))).unsqueeze(-1)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    z = torch.cholesky_solve(right, factor)
    z = z + torch.cholesky_solve(right - matrix @ z, factor)
    z = torch.where(failed[..., None, None] == 0, z, torch.nan)
    norm = torch.linalg.vector_norm
    size = norm(right, dim=(-1, -2))
    residual = torch.where(size > 0, norm(right - matrix @ z, dim=(-1, -2)) / torch.where(size > 0, size, 1.0), 0.0)
    return (unroot * z.squeeze(-1)).to(dtype), residual.detach().to(dtype)


class CostGradients(NamedTuple):
    """Gradients by the cost ``(B, n, m)``, the masses, and both penalties ``(B, 2)``, 0 for a constraint."""

    cost: Tensor
    a: Tensor
    b: Tensor
    rho: Tensor


def gradients(
    cost: Tensor,
    steps: Opened,
    f: Tensor,
    g: Tensor,
    of_a: Penalty,
    of_b: Penalty,
    upstream: Upstream,
    adjoint: bool,
) -> tuple[CostGradients, Tensor]:
    r"""Gradients by the implicit function theorem, and the relative residual of the adjoint system.

    With the symbols of ``otloss/gradients.py`` and :math:`m = 1 + \varepsilon / \rho`, the multipliers solve

    .. math::
        \begin{bmatrix} m_a D_a & T \\ T^\top & m_b D_b \end{bmatrix} \begin{bmatrix} U \\ V \end{bmatrix} =
        \begin{bmatrix} w ((R \circ T) 1 - \varepsilon\, T1 \circ f / \rho_a) - \varepsilon\, Q q / m_b \\
        w ((R \circ T)^\top 1 - \varepsilon\, T^\top 1 \circ g / \rho_b) - \varepsilon\, P^\top p / m_a \end{bmatrix}

        \partial C = T \circ \big[(U \oplus V - w R)/\varepsilon + w + w_V\big] + (p / m_a) \circ P + Q \circ (q / m_b)

        \partial a = e^{-f/\rho_a} m_a (U + w f)
                     + w_V \big(\rho_a (1 - e^{-f/\rho_a}) - \varepsilon (e^{-f/\rho_a} - b^\top 1)\big)

        \partial \rho_a = \big\langle a e^{-f/\rho_a} \circ f, w f + U \big\rangle / \rho_a^2
                          + \varepsilon \langle p, f \rangle / (m_a \rho_a^2) + w_V \mathrm{KL}(T1 | a)

    and likewise for b. P and Q are the plan, normalised by rows and by columns.
    """
    a, b, eps = steps.a, steps.b, steps.eps
    of_row = (g.unsqueeze(-2) - steps.cost) / eps + steps.log_b.unsqueeze(-2)
    of_column = (f.unsqueeze(-1) - steps.cost) / eps + steps.log_a.unsqueeze(-1)
    by_rows, by_columns = of_row.softmax(-1), of_column.softmax(-2)
    rows = a * torch.exp(f / eps + torch.logsumexp(of_row, -1))
    plan = rows.unsqueeze(-1) * by_rows
    columns = plan.sum(-2)
    none = torch.zeros_like(rows[..., :1])
    w = none if upstream.cost is None else upstream.cost.unsqueeze(-1)
    w_value = none if upstream.value is None else upstream.value.unsqueeze(-1)
    share_a, share_b = of_a.share(f), of_b.share(g)
    by_cost = (w + w_value).unsqueeze(-1) * plan
    by_a = w_value * (of_a.slope(f) - eps * (share_a - b.sum(-1, keepdim=True)))
    by_b = w_value * (of_b.slope(g) - eps * (share_b - a.sum(-1, keepdim=True)))
    by_rho_a = w_value[..., 0] * of_a.by_rho(rows, a)
    by_rho_b = w_value[..., 0] * of_b.by_rho(columns, b)
    residual = torch.zeros_like(w[..., 0])
    if adjoint:
        p = torch.zeros_like(f) if upstream.f is None else upstream.f / of_a.stiffness
        q = torch.zeros_like(g) if upstream.g is None else upstream.g / of_b.stiffness
        reduced = w.unsqueeze(-1) * without_forbidden(cost - f.unsqueeze(-1) - g.unsqueeze(-2))
        # T_ij / ((T1)_i (T'1)_j), which never divides by a mass.
        sides = (of_a.stiffness * f).unsqueeze(-1) + (of_b.stiffness * g).unsqueeze(-2)
        k = bounded_exp((sides - cost) / eps)
        pull_a = w * eps * f * of_a.inverse + eps * (k * q.unsqueeze(-2)).sum(-1)
        pull_b = w * eps * g * of_b.inverse + eps * (k * p.unsqueeze(-1)).sum(-2)
        r, s = (reduced * plan).sum(-1) - rows * pull_a, (reduced * plan).sum(-2) - columns * pull_b
        if plan.shape[-2] < plan.shape[-1]:  # the system of the shorter side
            u, residual = _multipliers(plan.transpose(-1, -2), s, r, of_b, of_a)
        else:
            v, residual = _multipliers(plan, r, s, of_a, of_b)
            u = _of_rows(by_rows, reduced, v, pull_a, of_a)
        v = _of_rows(by_columns.transpose(-1, -2), reduced.transpose(-1, -2), u, pull_b, of_b)
        u = _of_rows(by_rows, reduced, v, pull_a, of_a)
        by_cost = by_cost + plan * (u.unsqueeze(-1) + v.unsqueeze(-2) - reduced) / eps
        by_cost = by_cost + p.unsqueeze(-1) * by_rows + by_columns * q.unsqueeze(-2)
        by_a = by_a + share_a * of_a.stiffness * (u + w * f)
        by_b = by_b + share_b * of_b.stiffness * (v + w * g)
        by_rho_a = by_rho_a + ((rows * (w * f + u) + eps * p) * f * of_a.inverse**2).sum(-1)
        by_rho_b = by_rho_b + ((columns * (w * g + v) + eps * q) * g * of_b.inverse**2).sum(-1)
        by_cost = by_cost.masked_fill(cost == torch.inf, 0.0)
    both = ((of_a, by_rho_a), (of_b, by_rho_b))
    by_rho = torch.stack([torch.zeros_like(by) if penalty.rho is None else by for penalty, by in both], -1)
    return CostGradients(by_cost, by_a, by_b, by_rho), residual


def _of_rows(by_rows: Tensor, reduced: Tensor, v: Tensor, pull: Tensor, penalty: Penalty) -> Tensor:
    """The multipliers of the rows from those of the columns, also where a row has no mass."""
    return ((by_rows * (reduced - v.unsqueeze(-2))).sum(-1) - pull) / penalty.stiffness
