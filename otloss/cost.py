"""Cost builders: the cosine cost and the squared distance between two sets of points."""

from __future__ import annotations

import torch
from torch import Tensor

from otloss.checks import check_features, no_autocast, wide, working_dtype

__all__ = ["COSTS", "cosine_cost", "sqeuclidean_cost"]


def unit_rows(x: Tensor) -> Tensor:
    """The rows of ``x``, scaled to length 1. A zero row stays zero, and its gradient is exactly 0."""
    return torch.where(live_rows(x), x, 0.0) / row_norms(x)


def negligible(dtype: torch.dtype) -> float:
    """The bound for zero: a number that is not above it counts as zero.

    The reciprocal of such a number is near the end of the dtype's range, and the number is too small to change a
    result. The kernels use the same bound.
    """
    return 1e-290 if dtype == torch.float64 else 1e-30


def live_rows(x: Tensor) -> Tensor:
    """A mask ``(B, n, 1)`` of the rows that are not zero."""
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    return ~(largest <= negligible(x.dtype))  # not `>`: a row with NaN must count as live


def row_norms(x: Tensor) -> Tensor:
    """Lengths ``(B, n, 1)`` of the rows. The length given for a zero row is 1.

    Each row is first divided by its largest entry, so that squares neither overflow nor underflow. The result does not
    depend on that scale, so the derivative treats it as a constant.
    """
    alive = live_rows(x)
    scale = torch.where(alive, x.detach().abs().amax(dim=-1, keepdim=True), 1.0)
    square = (x / scale).square().sum(dim=-1, keepdim=True)
    return scale * torch.where(alive, square, 1.0).sqrt()


def cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    r"""Cosine cost between every row of ``x`` and every row of ``y``.

    .. math:: C_{ij} = 1 - \frac{\langle x_i, y_j \rangle}{\lVert x_i \rVert \, \lVert y_j \rVert} \in [0, 2]

    A zero row (a dead ReLU channel) has cosine 0 to every row, so its costs are 1. Its gradient is exactly 0. A row
    counts as zero if no entry is larger than 1e-30 (1e-290 in float64) in absolute value.

    Args:
        x: features ``(B, n, d)``. ``B`` stands for any number of leading dimensions, also none.
        y: features ``(B, m, d)``.

    Returns:
        Cost ``(B, n, m)``, float64 for float64 features and float32 otherwise. Half-precision features are multiplied
        in float32, also under autocast, because a bfloat16 cost loses several percent of the plan's accuracy at eps
        0.05. On a GPU, a ``torch.set_float32_matmul_precision`` below "highest" makes this product that coarse too, and
        with it ``out.plan``.

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
        # Rounding can move a cost out of [0, 2] by an ulp. The shift that moves it back is a constant of the gradient,
        # so identical rows keep theirs.
        cost = 1 - cosine
        return cost + (cost.clamp(0, 2) - cost).detach()


def centred(x: Tensor, y: Tensor, mask_x: Tensor | None = None, mask_y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Both sets of points, moved to their common mean. Points that a mask leaves out are 0, and do not count.

    No distance depends on the centre, so the derivative treats it as a constant.
    """
    means = []
    for points, mask in ((x.detach(), mask_x), (y.detach(), mask_y)):
        total = points.sum(-2, keepdim=True)
        means.append(total / (points.shape[-2] if mask is None else mask.sum(-1)[..., None, None]))
    centre = 0.5 * (means[0] + means[1])
    return x - centre, y - centre


def sqeuclidean_cost(x: Tensor, y: Tensor) -> Tensor:
    r"""Squared Euclidean distance between every row of ``x`` and every row of ``y``.

    .. math:: C_{ij} = \lVert x_i - y_j \rVert^2

    There is no factor 1/2. geomloss halves this cost, and so does flash-sinkhorn with ``half_cost=True``: for their
    plan take ``eps = 2 * blur**2``; their value is half of the one here.

    The distance is computed from points that are moved to their common mean, in float64, as
    :math:`|x_i|^2 + |y_j|^2 - 2 \langle x_i, y_j \rangle`, and rounded once. So neither the cancellation in that sum
    nor a large common offset of the points loses digits that float32 holds. Equal points have a cost of 0, up to
    rounding in float64, and gradient 0. The cost is never negative and can be differentiated twice. That of a set with
    itself is symmetric, bit for bit.

    Args:
        x: points ``(B, n, d)``. ``B`` stands for any number of leading dimensions, also none.
        y: points ``(B, m, d)``.

    Returns:
        Cost ``(B, n, m)`` in the square of the points' unit, float64 for float64 points and float32 otherwise, also
        under autocast. On MPS, which has no float64, all of it is float32.

    Raises:
        TypeError: ``x`` or ``y`` is no floating-point tensor, or one is float64 and the other is not.
        ValueError: the shapes do not fit each other.

    Example:
        >>> import torch, otloss
        >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> otloss.sqeuclidean_cost(x, x).tolist()
        [[0.0, 25.0], [25.0, 0.0]]
    """
    check_features(x, y)
    dtype = working_dtype(x=x, y=y)
    with no_autocast(x):
        points, others = centred(wide(x), wide(y))
        squares = points.square().sum(-1).unsqueeze(-1) + others.square().sum(-1).unsqueeze(-2)
        cost = (squares - 2 * (points @ others.transpose(-1, -2))).to(dtype)
        exact = cost.clamp(min=0).detach()
        if points.shape[-2] == others.shape[-2]:  # a product rounds its entries (i, j) and (j, i) apart
            same = (points == others).all(-1).all(-1)[..., None, None]
            exact = torch.where(same, 0.5 * (exact + exact.transpose(-1, -2)), exact)
        return cost + (exact - cost).detach()


def dot_cost(x: Tensor, y: Tensor) -> Tensor:
    """-<x_i, y_j> of every row of ``x`` and every row of ``y``, summed in float64 and rounded once."""
    with no_autocast(x):
        return -(wide(x) @ wide(y).transpose(-1, -2)).to(working_dtype(x=x, y=y))


#: The kinds of cost between features, by the name that :func:`otloss.feature_sinkhorn` takes.
COSTS = {"cosine": cosine_cost, "sqeuclidean": sqeuclidean_cost, "dot": dot_cost}

#: For each kind, the kind of cost that the features of `in_units` have.
KINDS_IN_UNITS = {"cosine": "sqeuclidean", "sqeuclidean": "sqeuclidean", "dot": "dot"}


def in_units(kind: str, x: Tensor, y: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    r"""Features whose cost, of the kind in `KINDS_IN_UNITS`, is the cost of x and y divided by eps ``(B,)``.

    Distances and products of :math:`x / \sqrt{\varepsilon}` are those of x over :math:`\varepsilon`. Of unit rows,
    :math:`1 - \cos = \lVert u - v \rVert^2 / 2`, so the cosine cost is the squared distance of
    :math:`u / \sqrt{2 \varepsilon}`. A zero row has cost 1 to every row, as if it were a unit row orthogonal to all:
    two more entries, one for each side, hold the 1 of such rows.
    """
    if kind == "cosine":
        eps, dead_x, dead_y = 2 * eps, (~live_rows(x)).to(x.dtype), (~live_rows(y)).to(y.dtype)
        x = torch.cat((unit_rows(x), dead_x, torch.zeros_like(dead_x)), -1)
        y = torch.cat((unit_rows(y), torch.zeros_like(dead_y), dead_y), -1)
    root = eps.sqrt()[:, None, None]
    return x / root, y / root
