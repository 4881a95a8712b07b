"""What a plan is used for beside its loss: the logarithm of the plan, barycentric maps, and hard matches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otloss.backends.massless import live, log_mass
from otloss.backends.steps import log_sum
from otloss.checks import check_device, check_tensor, no_autocast, working_dtype

if TYPE_CHECKING:
    from otloss.output import SinkhornOutput

__all__ = ["assign", "barycentric", "log_plan"]


def log_plan(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float) -> Tensor:
    """log T_ij = log a_i + log b_j + (f_i + g_j - C_ij)/eps, and -inf with gradient 0 where there is no mass to send.

    That is where a_i or b_j is no mass, and where C_ij is inf. What a huge cost puts beyond the dtype gets the least
    finite number, so that nothing that multiplies it becomes NaN.
    """
    exponent = ((f.unsqueeze(-1) + g.unsqueeze(-2)) - cost) / eps
    exponent = torch.where(exponent == -torch.inf, torch.finfo(exponent.dtype).min, exponent)
    log_a, log_b = (torch.where(live(mass), mass, 1.0).log() for mass in (a, b))
    allowed = live(a).unsqueeze(-1) & live(b).unsqueeze(-2) & (cost != torch.inf)
    return torch.where(allowed, exponent + (log_a.unsqueeze(-1) + log_b.unsqueeze(-2)), -torch.inf)


def _row_kernel(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float, slack: int) -> Tensor:
    """k_ij = T_ij / (a_i b_j), each row times a factor that brings its sum with the masses b to about 1.

    The last ``slack`` rows and columns are left out. The factor is a constant of the gradient, for what divides by that
    sum does not depend on it. Columns without mass have a kernel too: it is the derivative by their mass. There the
    definition of g, that the sum with a is 1, takes back what rounding of a huge potential does.
    """
    exponent = ((f.detach().unsqueeze(-1) + g.unsqueeze(-2)) - cost) / eps
    with torch.no_grad():
        scale = torch.where(live(b), 0.0, log_sum(exponent + log_mass(a).unsqueeze(-1), -2)).unsqueeze(-2)
    if slack:
        exponent, scale, b = exponent[:, :-slack, :-slack], scale[..., :-slack], b[:, :-slack]
    with torch.no_grad():
        scale = scale + log_sum(exponent + log_mass(b).unsqueeze(-2), -1).unsqueeze(-1)
    # A kernel is at most the reciprocal of a mass, 1e30 (1e290). The bound stops what rounding makes of lost columns.
    return (exponent - scale).clamp(max=70.0 if exponent.dtype == torch.float32 else 668.0).exp()


def barycentric(out: SinkhornOutput, y: Tensor) -> Tensor:
    r"""The barycentric map of a plan: each row's mean of the points ``y``, weighted by the plan.

    .. math:: z_i = \frac{(T y)_i}{(T 1)_i}

    A row without mass gets the limit for a vanishing mass, the mean weighted by the row-normalised kernel, however far
    it is from every column; 0 if it is forbidden to every column with mass.

    Args:
        out: what :func:`otloss.sinkhorn` or :func:`otloss.cosine_sinkhorn` returned.
        y: points ``(B, m, k)``, or ``(m, k)`` for all problems, one for each column of the plan: positions, colours,
            features. float64 if the problem is, and only then.

    Returns:
        ``(B, n, k)``, float64 for a float64 problem and float32 otherwise. In mode "implicit" it is differentiable by
        ``y``, by the cost or the features, and by both masses. In the other modes the plan is a constant, and only
        ``y`` gets a gradient.

    Raises:
        TypeError: ``y`` is no floating-point tensor, or ``y`` or the problem is float64 and the other is not.
        ValueError: the shape or the device of ``y`` does not fit the problem.

    Example:
        >>> import torch, otloss
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> out = otloss.sinkhorn(cost, eps=0.05)
        >>> otloss.barycentric(out, torch.tensor([[1.0, 5.0], [2.0, 6.0]])).round(decimals=3).tolist()
        [[1.0, 5.0], [2.0, 6.0]]

    Source: Ferradans et al. 2014 (arXiv 1307.5551); Perrot et al. 2016 for the map between domains.
    """
    check_tensor("y", y, 2, "(B, m, k) or (m, k)")
    parts, batch = out._parts(), out._source.batch
    slack = 0 if out._source.slack is None else 1
    cost, m = parts.cost, parts.cost.shape[-1] - slack
    if y.shape[-2] != m or (y.dim() > 2 and y.shape[:-2] != batch):
        wanted = ", ".join(map(str, (*batch, m, "k")))
        raise ValueError(f"y must have shape ({wanted}) or ({m}, k), got {tuple(y.shape)}")
    check_device(y=y, plan=cost)
    y = y.to(working_dtype(y=y, plan=cost))
    with no_autocast(cost):
        weights = _row_kernel(*parts, slack) * parts.b[:, :m].unsqueeze(-2)
        points = y if y.dim() == 2 else y.reshape(len(cost), m, y.shape[-1])
        total = weights.sum(-1, keepdim=True)
        mapped = (weights @ points) / torch.where(total == 0, 1.0, total)
    return mapped.reshape(*batch, *mapped.shape[1:])


@torch.no_grad()
def assign(out: SinkhornOutput, *, mutual: bool = False) -> Tensor:
    r"""Hard matches of a plan, for evaluation: of each row the column that gets most of its mass.

    .. math:: j(i) = \arg\max_j T_{ij}, \qquad \text{with mutual=True only if also } i = \arg\max_{i'} T_{i'j(i)}

    Of equal entries the first counts.

    Args:
        out: what :func:`otloss.sinkhorn` or :func:`otloss.cosine_sinkhorn` returned.
        mutual: whether to keep only the matches in which each point is the other's best.

    Returns:
        ``(B, n)`` int64: the column of each row, and -1 where there is none: for a row without mass, with ``mutual``
        for a row whose best column prefers another row, and under ``partial`` for a row that leaves more of its mass
        than any column gets (``mutual``: also where the best column does). It has no gradient.

    Example:
        >>> import torch, otloss
        >>> cost = torch.tensor([[0.0, 0.9], [0.2, 0.9], [0.9, 0.0]])
        >>> out = otloss.sinkhorn(cost, b=torch.tensor([0.6, 0.4]))
        >>> otloss.assign(out).tolist(), otloss.assign(out, mutual=True).tolist()
        ([0, 0, 1], [0, -1, 1])
    """
    log_t = out._matrix(log_plan)
    n, m = (size - (out._source.slack is not None) for size in log_t.shape[-2:])
    best = log_t.argmax(-1)
    matched = log_t.amax(-1) > -torch.inf
    if mutual:
        back = log_t.argmax(-2).gather(-1, best)
        matched = matched & (back == torch.arange(log_t.shape[-2], device=back.device))
    return torch.where(matched & (best < m), best, -1)[..., :n]
