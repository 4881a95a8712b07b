"""Cost builders: the cosine cost between two sets of features."""

from __future__ import annotations

import torch
from torch import Tensor

from otloss.checks import check_features, no_autocast, working_dtype

__all__ = ["cosine_cost"]


def unit_rows(x: Tensor) -> Tensor:
    """Rows of ``x`` scaled to length 1; a zero row stays zero and gets gradient exactly 0."""
    return torch.where(live_rows(x), x, 0.0) / row_norms(x)


def negligible(dtype: torch.dtype) -> float:
    """A number not above this counts as zero: its reciprocal nears the end of the dtype's range, and it moves nothing.

    The kernels use the same bound.
    """
    return 1e-290 if dtype == torch.float64 else 1e-30


def live_rows(x: Tensor) -> Tensor:
    """Which rows are not zero ``(B, n, 1)``."""
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    return ~(largest <= negligible(x.dtype))  # written so that a row with NaN counts as live


def row_norms(x: Tensor) -> Tensor:
    """Lengths of the rows ``(B, n, 1)``, 1 for a zero row.

    Each row is first divided by its largest entry, so that squares neither overflow nor underflow. That scale is a
    constant of the derivative: the result does not depend on it.
    """
    alive = live_rows(x)
    scale = torch.where(alive, x.detach().abs().amax(dim=-1, keepdim=True), 1.0)
    square = (x / scale).square().sum(dim=-1, keepdim=True)
    return scale * torch.where(alive, square, 1.0).sqrt()


def cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    r"""Cosine cost between every row of ``x`` and every row of ``y``.

    .. math:: C_{ij} = 1 - \frac{\langle x_i, y_j \rangle}{\lVert x_i \rVert \, \lVert y_j \rVert} \in [0, 2]

    A zero row (a dead ReLU channel) has cosine 0 to everything, so cost 1, and gradient exactly 0. A row without any
    entry above 1e-30 (1e-290 in float64) counts as zero.

    Args:
        x: features ``(B, n, d)``; ``B`` is any number of leading dimensions, also none.
        y: features ``(B, m, d)``.

    Returns:
        Cost ``(B, n, m)``, float64 for float64 features and float32 otherwise; half-precision features are multiplied
        in float32, also under autocast (a bfloat16 cost costs several percent of plan accuracy at eps 0.05). On a GPU
        ``torch.set_float32_matmul_precision`` below "highest" makes this product, and so ``out.plan``, as coarse.

    Raises:
        TypeError: ``x`` or ``y`` is no floating-point tensor, or one is float64 and the other is not.
        ValueError: the shapes do not fit each other.

    Example:
        >>> import torch, otloss
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> otloss.cosine_cost(x, x).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    check_features(x, y)
    dtype = working_dtype(x=x, y=y)
    with no_autocast(x):
        cosine = unit_rows(x.to(dtype)) @ unit_rows(y.to(dtype)).transpose(-1, -2)
        # Rounding can leave [0, 2] by an ulp. The shift is a constant, so that identical rows keep their gradient.
        cost = 1 - cosine
        return cost + (cost.clamp(0, 2) - cost).detach()
