r"""Batched products of two matrices: the cost of features, and the products in their gradients.

.. math:: C = 1 - \hat x \hat y^\top, \qquad C = \max(|\hat x|^2 \oplus |\hat y|^2 - 2 \hat x \hat y^\top, 0), \qquad
          C = -\hat x \hat y^\top, \qquad \partial \hat x = -\partial C\, \hat y, \qquad
          \partial \hat y = -\partial C^\top \hat x,

for "cosine", "sqeuclidean" and "dot" in this order; ``features.py`` makes x and y, and takes the way back.

float32 is multiplied as three products in TF32, which keeps its digits; PyTorch multiplies float64. A stored matrix has
at most ``config.STORED_BYTES``. A larger batch is solved in groups of problems. If one problem alone is larger, its
cost is not stored: every pass makes it anew (``stream.py``).

Roofline: 6 r c k tensor operations for a product of (r, k) and (k, c), or the bytes of the three matrices. For 64
problems of n = m = 512, d = 49 these are 5e9 operations (10 us on H100, 32 us on A100) and 80 MB, most of them the
cost's (24 us and 52 us if they all go to memory). For 256 problems of n = m = 49, d = 512, in tiles padded to 64, they
are 3.2e9 operations (7 us, 21 us) and 54 MB (16 us, 35 us).
"""

# mypy: ignore-errors
import triton.language as tl

from otloss.backends.triton.compat import jit


@jit()
def product(
    left, right, add_i, add_j, out, rows, cols, depth, left_row, left_k, right_k, right_col,
    SHIFT: tl.constexpr, I: tl.constexpr, J: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out = SHIFT - left right; with add_i, add_j it is max(add_i + add_j - 2 left right, 0).

    Grid: problems x blocks of I rows x blocks of J columns.
    The strides of an entry are given; those of a problem are rows x depth, depth x cols and rows x cols.
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    p = tl.program_id(0).to(tl.int64)
    first_row = tl.program_id(1).to(tl.int64) * I
    first_col = tl.program_id(2).to(tl.int64) * J
    i, j, k = tl.arange(0, I), tl.arange(0, J), tl.arange(0, K)
    # Offsets inside a tile take 32 bits; the pointers to its corner take 64.
    left += p * rows * depth + first_row * left_row
    right += p * depth * cols + first_col * right_col
    out += p * rows * cols + first_row * cols + first_col
    real_i, real_j = i < rows - first_row, j < cols - first_col
    at_left = i[:, None] * left_row + k[None, :] * left_k
    at_right = k[:, None] * right_k + j[None, :] * right_col
    total = tl.zeros([I, J], DTYPE)
    for start in range(0, depth, K):
        real_k = k < depth - start
        x = tl.load(left + at_left, mask=real_i[:, None] & real_k[None, :], other=0.0)
        y = tl.load(right + at_right, mask=real_k[:, None] & real_j[None, :], other=0.0)
        total = tl.dot(x, y, total, input_precision="tf32x3")
        left += K * left_k
        right += K * right_k
    if add_i is None:
        total = SHIFT - total
    else:
        squares = tl.load(add_i + p * rows + first_row + i, mask=real_i, other=0.0)[:, None]
        squares = squares + tl.load(add_j + p * cols + first_col + j, mask=real_j, other=0.0)[None, :]
        total = tl.maximum(squares - 2.0 * total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + i[:, None] * cols + j[None, :], total, mask=real_i[:, None] & real_j[None, :])
