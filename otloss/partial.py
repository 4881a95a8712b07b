r"""Partial transport: of the masses only a given total s is sent, and where it is left is part of the problem.

.. math:: \min_T \langle T, C \rangle \quad\text{under}\quad T1 \le a,\; T^\top 1 \le b,\; 1^\top T 1 = s

is a balanced problem with one more row and one more column, the *slack*, which take what is not sent. The column has
the mass :math:`1^\top a - s`, the row :math:`1^\top b - s`, and the pair of both is forbidden. All other pairs of the
slack have the same cost. Which one does not matter to the plan, as they always hold the same total. Here it is the
least cost of the problem, so that a constant of the cost takes no digits.

Source: Caffarelli and McCann 2010; Chapel, Alaya and Gasso 2020 (arXiv 2002.08276) for the extension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from otloss.compat import has_values

__all__ = ["Slack", "with_slack", "without_slack"]


class Slack(NamedTuple):
    """What a partial problem's outputs need beside those of its extension, whose last row and column are the slack."""

    total: Tensor
    """``(B,)``: the total of the extension's masses, of which the solver sees shares."""
    rest: Tensor
    """``(B,)``: how much of that the slack sends or gets."""
    price: Tensor
    """``(B,)``: the cost of the slack's pairs."""


def with_slack(
    cost: Tensor, a: Tensor, b: Tensor, sent: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Slack]:
    """Cost, masses and slack of the extension of a problem that sends ``sent (B,)``.

    Raises:
        ValueError: more is to be sent than there is. Only where that can be seen at once; else a mass is negative.
    """
    total_a, total_b = a.sum(-1), b.sum(-1)
    _check(sent, total_a, total_b, tolerance)
    left_a, left_b = _left(total_a, sent, tolerance), _left(total_b, sent, tolerance)
    least = cost.amin((-1, -2))
    price = torch.where(least.isfinite(), least, 0.0)[:, None, None]
    column, row = price.expand(-1, cost.shape[-2], 1), price.expand(-1, 1, cost.shape[-1])
    corner = torch.full_like(price, torch.inf)
    cost = torch.cat((torch.cat((cost, column), -1), torch.cat((row, corner), -1)), -2)
    a, b = torch.cat((a, left_b.unsqueeze(-1)), -1), torch.cat((b, left_a.unsqueeze(-1)), -1)
    return cost, a, b, Slack(total_a + total_b - sent, left_a + left_b, price[:, 0, 0])


def _left(total: Tensor, sent: Tensor, tolerance: float) -> Tensor:
    """What is not sent. Rounding may leave a little less than 0. More is negative mass, which the operators refuse."""
    left = total - sent
    return torch.where((left < 0) & (left > -tolerance * total), 0.0, left)


def without_slack(f: Tensor, g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The potentials of the problem from those and the masses of its extension, with <a, f> = <b, g>."""
    f, g, a, b = f[:, :-1], g[:, :-1], a[:, :-1], b[:, :-1]
    gap = ((b * g).sum(-1, keepdim=True) - (a * f).sum(-1, keepdim=True)) / (a.sum(-1) + b.sum(-1)).unsqueeze(-1)
    return f + gap, g - gap


def _check(sent: Tensor, total_a: Tensor, total_b: Tensor, tolerance: float) -> None:
    if not all(map(has_values, (sent, total_a, total_b))):
        return
    most = torch.minimum(total_a, total_b).detach()
    bad = sent.detach() > most * (1 + tolerance)
    if bool(bad.any()):
        first = int(bad.int().argmax())
        raise ValueError(
            f"partial must be at most the smaller of the totals of a and b, "
            f"got {float(sent[first]):.7g} for {float(most[first]):.7g} in problem {first}"
        )
