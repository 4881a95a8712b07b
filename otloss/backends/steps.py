"""The half-steps of the reference backend in the log-domain, with constraints and with penalties alike.

A cost of +inf forbids a pair: its kernel is 0. Beside the kernel the cost itself counts as 0 there, since 0 times inf
is NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from otloss.backends.massless import live, log_mass


class Opened(NamedTuple):
    """A problem as half-steps take it."""

    cost: Tensor
    """``(B, n, m)``, 0 in lost rows and columns: a half-step gives them a finite number, which reaches nobody."""
    a: Tensor
    b: Tensor
    log_a: Tensor
    """-inf where there is no mass."""
    log_b: Tensor
    eps: float
    lost_a: Tensor
    """``(B, n)``: which rows have no mass, and are forbidden to all columns that have."""
    lost_b: Tensor
    """``(B, m)`` likewise."""

    def f_step(self, g: Tensor) -> Tensor:
        """f that gives every row its marginal: -eps log sum_j b_j exp((g_j - C_ij) / eps)."""
        exponent = (g.unsqueeze(-2) - self.cost) / self.eps + self.log_b.unsqueeze(-2)
        return -self.eps * torch.logsumexp(exponent, dim=-1)

    def g_step(self, f: Tensor) -> Tensor:
        """g that gives every column its marginal."""
        exponent = (f.unsqueeze(-1) - self.cost) / self.eps + self.log_a.unsqueeze(-1)
        return -self.eps * torch.logsumexp(exponent, dim=-2)


def opened(cost: Tensor, a: Tensor, b: Tensor, eps: float) -> Opened:
    """The problem of this cost and these masses for half-steps."""
    barred = cost == torch.inf
    rows = (barred | ~live(b).unsqueeze(-2)).all(-1) & ~live(a)
    columns = (barred | ~live(a).unsqueeze(-1)).all(-2) & ~live(b)
    cost = cost.masked_fill(rows.unsqueeze(-1) | columns.unsqueeze(-2), 0.0)
    return Opened(cost, a, b, log_mass(a), log_mass(b), eps, rows, columns)


def without_forbidden(cost: Tensor) -> Tensor:
    """The cost with 0 for forbidden pairs, for sums in which it is multiplied by their plan of 0."""
    return cost.masked_fill(cost == torch.inf, 0.0)


def bounded_exp(exponent: Tensor) -> Tensor:
    """exp, bounded so that a pair without mass cannot turn 0 * inf into NaN."""
    return exponent.clamp(max=60.0 if exponent.dtype == torch.float32 else 600.0).exp()


def log_sum(exponent: Tensor, dim: int) -> Tensor:
    """``logsumexp``, but 0 with gradient 0 where every term is exp(-inf)."""
    nothing = (exponent == -torch.inf).all(dim, keepdim=True)
    return torch.logsumexp(exponent.masked_fill(nothing, 0.0), dim).masked_fill(nothing.squeeze(dim), 0.0)
