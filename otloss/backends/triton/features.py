r"""What is made of features before their cost, and the way back to their gradient.

Cosine: unit rows.

.. math:: \hat x = x / |x|, \qquad \partial x = (\partial \hat x - \hat x \langle \hat x, \partial \hat x \rangle) / |x|

A row is divided by its largest entry first, so that no square overflows or vanishes. A row without any entry above
1e-30 (1e-290 in float64) is zero: it stays zero and gets gradient exactly 0.

Squared distances: points less the mean z of the problem's points, which the distances do not depend on. A common offset
would take digits from them.

.. math:: \hat x = x - z, \qquad
          \partial x_i = 2 \Big(\hat x_i \sum_j \partial C_{ij} - \sum_j \partial C_{ij}\, \hat y_j\Big)

For "dot" the features are taken as they are. Half-precision rows are read as they are and leave in the working dtype.
Bytes: each entry once in, once out.
"""

# mypy: ignore-errors
import triton.language as tl

from otloss.backends.triton.compat import jit
from otloss.backends.triton.tiles import is_live


@jit(do_not_specialize=["count"])
def unit_rows(x, unit, inverse, count, d, I: tl.constexpr, K: tl.constexpr):
    """unit = x/|x| and inverse = 1/|x| (0 for a zero row) of ``count`` rows; grid: blocks of I rows."""
    DTYPE: tl.constexpr = unit.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * I + tl.arange(0, I)
    top = tl.zeros([I], DTYPE)
    nothing = tl.zeros([I], DTYPE)
    for start in range(0, d, K):
        k = start + tl.arange(0, K)
        mask = (i < count)[:, None] & (k < d)[None, :]
        v = tl.load(x + i[:, None] * d + k[None, :], mask=mask, other=0.0).to(DTYPE)
        top = tl.maximum(top, tl.max(tl.abs(v), 1))
        nothing += tl.sum(v - v, 1)  # NaN if an entry is not finite, which the maximum may hide
    live = is_live(top)
    scale = tl.where(live, top, 1.0)
    square = tl.zeros([I], DTYPE)
    for start in range(0, d, K):
        k = start + tl.arange(0, K)
        mask = (i < count)[:, None] & (k < d)[None, :]
        v = tl.load(x + i[:, None] * d + k[None, :], mask=mask, other=0.0).to(DTYPE) / scale[:, None]
        square += tl.sum(v * v, 1)
    length = tl.sqrt(tl.where(live, square, 1.0))
    for start in range(0, d, K):
        k = start + tl.arange(0, K)
        mask = (i < count)[:, None] & (k < d)[None, :]
        v = tl.load(x + i[:, None] * d + k[None, :], mask=mask, other=0.0).to(DTYPE) / scale[:, None] / length[:, None]
        tl.store(unit + i[:, None] * d + k[None, :], tl.where(live[:, None], v, 0.0) + nothing[:, None], mask=mask)
    tl.store(inverse + i, tl.where(live, 1.0 / scale / length, 0.0) + nothing, mask=i < count)


@jit(do_not_specialize=["count"])
def unit_rows_back(unit, inverse, grad, out, count, d, I: tl.constexpr, K: tl.constexpr):
    """``out`` (the gradient of x) from ``grad`` (that of its unit rows); grid: blocks of I rows."""
    DTYPE: tl.constexpr = unit.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * I + tl.arange(0, I)
    along = tl.zeros([I], DTYPE)
    for start in range(0, d, K):
        k = start + tl.arange(0, K)
        mask = (i < count)[:, None] & (k < d)[None, :]
        at = i[:, None] * d + k[None, :]
        along += tl.sum(tl.load(unit + at, mask=mask, other=0.0) * tl.load(grad + at, mask=mask, other=0.0), 1)
    scale = tl.load(inverse + i, mask=i < count, other=0.0)
    for start in range(0, d, K):
        k = start + tl.arange(0, K)
        mask = (i < count)[:, None] & (k < d)[None, :]
        at = i[:, None] * d + k[None, :]
        tangent = tl.load(grad + at, mask=mask, other=0.0) - tl.load(unit + at, mask=mask, other=0.0) * along[:, None]
        tl.store(out + at, (tangent * scale[:, None]).to(out.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["n", "count"])
def centred_rows(x, centre, points, squares, n, count, d, I: tl.constexpr, K: tl.constexpr):
    """points = x less the ``centre`` (problems, d) of their problem, squares = |points|^2; grid: blocks of I rows.

    Of ``count`` rows, ``n`` after one another belong to a problem.
    """
    DTYPE: tl.constexpr = points.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * I + tl.arange(0, I)
    square = tl.zeros([I], DTYPE)
    for start in range(0, d, K):
        k = start + tl.arange(0, K)
        mask = (i < count)[:, None] & (k < d)[None, :]
        at = i[:, None] * d + k[None, :]
        v = tl.load(x + at, mask=mask, other=0.0).to(DTYPE)
        v -= tl.load(centre + (i // n)[:, None] * d + k[None, :], mask=mask, other=0.0)
        square += tl.sum(v * v, 1)
        tl.store(points + at, v, mask=mask)
    tl.store(squares + i, square, mask=i < count)


@jit(do_not_specialize=["count"])
def centred_rows_back(points, weight, grad, out, count, d, I: tl.constexpr, K: tl.constexpr):
    """out = 2 (weight points + grad), the gradient of x, with weight_i = sum_j dC_ij and grad_i = -sum_j dC_ij y_j."""
    DTYPE: tl.constexpr = points.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * I + tl.arange(0, I)
    scale = tl.load(weight + i, mask=i < count, other=0.0).to(DTYPE)
    for start in range(0, d, K):
        k = start + tl.arange(0, K)
        mask = (i < count)[:, None] & (k < d)[None, :]
        at = i[:, None] * d + k[None, :]
        v = tl.load(points + at, mask=mask, other=0.0) * scale[:, None] + tl.load(grad + at, mask=mask, other=0.0)
        tl.store(out + at, (2.0 * v).to(out.dtype.element_ty), mask=mask)
