"""The half-steps of the reference backend in the log-domain, with constraints and with penalties alike.

A cost of +inf forbids a pair: its kernel is 0. Beside the kernel the cost itself counts as 0 there, since 0 times inf
is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


def f_step(cost: Tensor, log_b: Tensor, g: Tensor, eps: float) -> Tensor:
    """f that gives every row its marginal: -eps log sum_j b_j exp((g_j - C_ij) / eps)."""
    return -eps * torch.logsumexp((g.unsqueeze(-2) - cost) / eps + log_b.unsqueeze(-2), dim=-1)


def g_step(cost: Tensor, log_a: Tensor, f: Tensor, eps: float) -> Tensor:
    """g that gives every column its marginal."""
    return -eps * torch.logsumexp((f.unsqueeze(-1) - cost) / eps + log_a.unsqueeze(-1), dim=-2)


def without_forbidden(cost: Tensor) -> Tensor:
    """The cost with 0 for forbidden pairs, for sums in which it is multiplied by their plan of 0."""
    return cost.masked_fill(cost == torch.inf, 0.0)


def bounded_exp(exponent: Tensor) -> Tensor:
    """exp, bounded so that a pair without mass cannot turn 0 * inf into NaN."""
    return exponent.clamp(max=60.0 if exponent.dtype == torch.float32 else 600.0).exp()
