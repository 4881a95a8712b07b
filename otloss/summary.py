"""What to look at first after a solve: :class:`Summary`, which ``out.summary()`` makes."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from otloss.output import SinkhornOutput

__all__ = ["Summary", "summarise"]


class Summary(NamedTuple):
    """Figures of a batch of problems, as Python numbers. Printed, it is a text of three lines.

    A perplexity is exp(entropy), the effective number of points. Of no problems, all averages are NaN.
    """

    problems: int
    n: int
    m: int
    converged: int
    """How many problems converged."""
    iterations: float
    """Median over the problems."""
    most_iterations: int
    marginal_error: float
    """The largest."""
    perplexity_a: float
    """Of the marginal a, at most n; the mean over the problems."""
    perplexity_b: float
    perplexity_rows: float
    """Of the columns that a row's mass goes to; the mean over the mass of a problem, then over the problems."""
    matched: float
    """Mass of the plan, of the mean total of a and b; the mean over the problems."""

    def __str__(self) -> str:
        return (
            f"{self.converged} of {self.problems} problems of {self.n} x {self.m} points converged in "
            f"{self.iterations:g} iterations (median; most {self.most_iterations}), "
            f"marginal error at most {self.marginal_error:.2g}\n"
            f"perplexity: a {self.perplexity_a:.4g} of {self.n}, b {self.perplexity_b:.4g} of {self.m}, "
            f"rows of the plan {self.perplexity_rows:.4g} of {self.m}\n"
            f"mass matched: {self.matched:.4g}"
        )


def _perplexity(mass: Tensor) -> Tensor:
    total = mass.sum(-1, keepdim=True)
    shares = mass / torch.where(total > 0, total, 1.0)
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return entropy.exp()


@torch.no_grad()
def summarise(out: SinkhornOutput) -> Summary:
    """See :meth:`otloss.SinkhornOutput.summary`."""
    plan, a, b = out.plan.detach(), *out._source.masses(constant=True)
    if out._source.slack is not None:
        a, b = (mass[:, :-1] * out._source.slack.total.detach().unsqueeze(-1) for mass in (a, b))
    n, m = plan.shape[-2:]
    iterations = out.n_iter.flatten().tolist()
    if not iterations:
        return Summary(0, n, m, 0, math.nan, 0, *[math.nan] * 5)
    rows = plan.sum(-1)
    of_rows = (rows * _perplexity(plan)).sum(-1) / rows.sum(-1)
    return Summary(
        problems=len(iterations),
        n=n,
        m=m,
        converged=int(out.converged.sum()),
        iterations=float(median(iterations)),
        most_iterations=max(iterations),
        marginal_error=float(out.marginal_error.max()),
        perplexity_a=float(_perplexity(a).mean()),
        perplexity_b=float(_perplexity(b).mean()),
        perplexity_rows=float(of_rows.mean()),
        matched=float((2 * rows.sum(-1).flatten() / (a.sum(-1) + b.sum(-1))).mean()),
    )
