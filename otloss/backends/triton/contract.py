r"""The gradient of the cost: stored, or contracted at once to that of the features where the cost is not stored.

.. math:: \partial C_{ij} = k_{ij} \big[ a_i \big(b_j ((U_i + V_j - w R_{ij})/\varepsilon + w + w_V) + Q_j\big)
          + P_i b_j \big], \qquad P = p / \rho, \quad Q = q / \sigma, \qquad \partial \hat x = -\partial C\, \hat y.

Of squared distances the gradient of a point also needs the sum of its row of the gradient, see ``features.py``.

Unrolled, with the potentials f^t, g^t of iteration t and the multipliers of the reverse sweep, D = w C + w_V (f + g):

.. math:: \partial C = T (w + w_V - D/\varepsilon) + \sum_t a_i \kappa^t_j\, e^{(f^t_i + g^t_j - C_{ij})/\varepsilon}
          + b_j \lambda^t_i\, e^{(f^t_i + g^{t-1}_j - C_{ij})/\varepsilon}.

``contract_dense`` reads a stored cost and stores its gradient, which ``product.py`` then contracts. Roofline: both
matrices once, 134 MB for 64 problems of n = m = 512 (40 us on H100, 86 us on A100), and one exponential per entry
(unrolled: two per iteration).

``contract_features`` makes the cost anew. It gives the gradient of y from the exchanged view. A program holds 64
features of its rows, and the cost is made again for each 64. Roofline: 2 d (1 + ceil(d / 64)) operations per entry and
view (three TF32 products each), and one exponential per 64 features (unrolled: two per iteration). For one problem of
n = m = 4096, d = 64 these are 2 x 1.7e7 x 768 = 2.6e10 tensor operations, 52 us on H100, 0.17 ms on A100.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from otloss.backends.triton.compat import jit
from otloss.backends.triton.tiles import base2, cost_tile, kernel_tile, vector


@triton.jit
def unrolled_tile(
    cost, i, j, f, g, a, b, u, v, n_iter, stride_i, stride_j, n, m, w, w_value, eps, inv, SWAPPED: tl.constexpr
):  # fmt: skip
    """dC of a tile by the reverse sweep; ``f, g, u, v`` point at iteration 0. SWAPPED: rows are stepped second."""
    DTYPE: tl.constexpr = cost.dtype
    fi = vector(f + n_iter * stride_i, i, n, DTYPE)
    gj = vector(g + n_iter * stride_j, j, m, DTYPE)
    k = kernel_tile(cost, fi, gj, inv)
    plan = a[:, None] * b[None, :] * k
    weighted = tl.where(plan != 0.0, w * cost + w_value * (fi[:, None] + gj[None, :]), 0.0)  # not 0 * inf
    grad = plan * (w + w_value - weighted / eps)
    for t in range(1, n_iter + 1):
        fi = vector(f + t * stride_i, i, n, DTYPE)
        gj = vector(g + t * stride_j, j, m, DTYPE)
        ui = vector(u + t * stride_i, i, n, DTYPE)
        vj = vector(v + t * stride_j, j, m, DTYPE)
        if SWAPPED:
            grad += kernel_tile(cost, fi, gj, inv) * (ui[:, None] * b[None, :])
            fi = vector(f + (t - 1) * stride_i, i, n, DTYPE)
            grad += kernel_tile(cost, fi, gj, inv) * (a[:, None] * vj[None, :])
        else:
            grad += kernel_tile(cost, fi, gj, inv) * (a[:, None] * vj[None, :])
            gj = vector(g + (t - 1) * stride_j, j, m, DTYPE)
            grad += kernel_tile(cost, fi, gj, inv) * (ui[:, None] * b[None, :])
    return grad


@triton.jit
def gradient_tile(
    left, right, min_i, min_j, i, j, f, g, a, b, u, v, q_i, q_j, w, w_value, n_iter, p, count, n, m, d, si, sj,
    eps, SWAPPED: tl.constexpr, KIND: tl.constexpr, I: tl.constexpr, J: tl.constexpr, K: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """dC of rows ``i`` and columns ``j`` of problem ``p``; 0 in the padding.

    ``n_iter`` is None unless the iterations are unrolled, ``u`` is None where the plan is a constant.
    """
    inv = base2(eps, DTYPE)
    eps = tl.full([], eps, DTYPE)
    cost = cost_tile(left, right, min_i, min_j, i, j, n, m, d, si, sj, KIND, I, J, K, DTYPE)
    at_i, at_j = p * n, p * m
    ai, bj = vector(a + at_i, i, n, DTYPE), vector(b + at_j, j, m, DTYPE)
    sharp, value = tl.load(w + p), tl.load(w_value + p)
    if n_iter is not None:
        grad = unrolled_tile(
            cost, i, j, f + at_i, g + at_j, ai, bj, u + at_i, v + at_j, tl.load(n_iter + p),
            tl.cast(count, tl.int64) * n, tl.cast(count, tl.int64) * m, n, m, sharp, value, eps, inv, SWAPPED,
        )  # fmt: skip
    else:
        fi, gj = vector(f + at_i, i, n, DTYPE), vector(g + at_j, j, m, DTYPE)
        k = kernel_tile(cost, fi, gj, inv)
        weight = bj[None, :] * (sharp + value)
        if u is not None:
            bracket = vector(u + at_i, i, n, DTYPE)[:, None] + vector(v + at_j, j, m, DTYPE)[None, :]
            bracket -= sharp * (cost - fi[:, None] - gj[None, :])
            bracket = tl.where((k > 0.0) & (ai > 0.0)[:, None] & (bj > 0.0)[None, :], bracket, 0.0)  # not 0 * inf
            weight += bj[None, :] * bracket / eps + vector(q_j + at_j, j, m, DTYPE)[None, :]
        weight *= ai[:, None]
        if u is not None:
            weight += vector(q_i + at_i, i, n, DTYPE)[:, None] * bj[None, :]
        grad = k * weight
    return tl.where((i < n)[:, None] & (j < m)[None, :], grad, 0.0)


@jit(do_not_specialize=["count", "n"])
def contract_dense(
    left, min_i, min_j, out, f, g, a, b, u, v, q_i, q_j, w, w_value, n_iter, count, n, m, eps: tl.float64,
    I: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """out = dC of a dense cost; grid: problems x blocks of I rows x blocks of J columns."""
    DTYPE: tl.constexpr = f.dtype.element_ty
    p = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1).to(tl.int64) * I + tl.arange(0, I)
    j = tl.program_id(2).to(tl.int64) * J + tl.arange(0, J)
    if min_i is not None:
        min_i += p * n
        min_j += p * m
    grad = gradient_tile(
        left + p * n * m, None, min_i, min_j, i, j, f, g, a, b, u, v, q_i, q_j, w, w_value, n_iter, p, count, n, m, 0,
        m, 1, eps, False, "stored", I, J, 16, DTYPE,
    )  # fmt: skip
    at = p * n * m + i[:, None] * m + j[None, :]
    tl.store(out + at, grad.to(out.dtype.element_ty), mask=(i < n)[:, None] & (j < m)[None, :])


@jit(do_not_specialize=["count"])
def contract_features(
    left, right, min_i, min_j, out, held, f, g, a, b, u, v, q_i, q_j, w, w_value, n_iter, count, n, m, d,
    eps: tl.float64, SWAPPED: tl.constexpr, KIND: tl.constexpr, I: tl.constexpr, J: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """out = -dC right, the gradient of what was made of the features, and held = dC 1 unless it is None.

    Grid: problems x blocks of I rows x blocks of D features.
    """
    DTYPE: tl.constexpr = f.dtype.element_ty
    p = tl.program_id(0).to(tl.int64)
    left += p * n * d
    right += p * m * d
    if min_i is not None:
        min_i += p * n
        min_j += p * m
    i = tl.program_id(1).to(tl.int64) * I + tl.arange(0, I)
    k = tl.program_id(2) * D + tl.arange(0, D)
    total = tl.zeros([I, D], DTYPE)
    if held is not None:
        weight = tl.zeros([I], DTYPE)
    for start in range(0, m, J):
        j = start + tl.arange(0, J).to(tl.int64)
        grad = gradient_tile(
            left, right, min_i, min_j, i, j, f, g, a, b, u, v, q_i, q_j, w, w_value, n_iter, p, count, n, m, d, 0, 0,
            eps, SWAPPED, KIND, I, J, K, DTYPE,
        )  # fmt: skip
        if held is not None:
            weight += tl.sum(grad, 1)
        at = j[:, None] * d + k[None, :]
        y = tl.load(right + at, mask=(j < m)[:, None] & (k < d)[None, :], other=0.0)
        total = tl.dot(grad, y, total, input_precision="tf32x3")
    at = p * n * d + i[:, None] * d + k[None, :]
    tl.store(out + at, -total, mask=(i < n)[:, None] & (k < d)[None, :])
    if held is not None:
        tl.store(held + p * n + i, weight, mask=(i < n) & (tl.program_id(2) == 0))
