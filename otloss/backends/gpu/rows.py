r"""Medium problems (n, m up to 1024): blocks of whole rows in registers, one pass over the cost per iteration.

A program holds I rows of the cost. Their half-step needs nothing else, and the exponentials it takes are those of the
columns too: E_ij/s_i = b_j exp((f_i + g_j - C_ij)/eps), so the program at once writes its rows' share of

    t_j = sum_i a_i E_ij / s_i,        g_j <- g_j - eps log(t_j / b_j),

which ``finish_columns`` adds over the blocks in a fixed order. One exponential per entry and iteration; where t_j
underflows, its columns take their half-step in the log-domain instead. A step of conjugate gradients, T' T x, is
the same single pass (``normal_rows``). The order between the two launches is the stream's: no barrier across
programs.

Roofline, n = m = 512, d = 49, B = 64, features: 1.7e7 entries per iteration, each 6 d = 294 tensor operations
(10 us on H100, 32 us on A100), one exponential (5 us, 6 us), about 12 others (6 us, 21 us); shares of I = 16 rows:
2 x 8.4 MB in the second-level cache. 50 iterations: 0.6 ms on H100, 1.7 ms on A100. Dense: 67 MB read per iteration
(20 us, 43 us). Launches: two per iteration, replayed as a CUDA graph.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from otloss.backends.gpu.tiles import (
    base2,
    cost_tile,
    is_live,
    kernel_tile,
    log2_mass,
    row_error,
    stream_step,
    vector,
)


@triton.jit(do_not_specialize=["count", "max_iter"])
def step_rows(
    left, right, a, b, f, g, f_next, share, missed, running, n_iter, count, n, m, d, eps: tl.float64, max_iter,
    I: tl.constexpr, M: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The half-step of I rows, their share of the columns' sums and of the error; grid: problems x blocks of rows.

    ``missed`` (count, blocks) tells ``finish_columns`` what to do: inf is "this is the first iteration", -inf "the last
    is done".
    """
    DTYPE: tl.constexpr = a.dtype.element_ty
    p = tl.program_id(0).to(tl.int64)
    if tl.load(running + p) == 0:
        return
    if right is None:
        left += p * n * m
    else:
        left += p * n * d
        right += p * m * d
    block = tl.program_id(1)
    i = block * I + tl.arange(0, I)
    j = tl.arange(0, M)
    inv = base2(eps, DTYPE)
    cost = cost_tile(left, right, i, j, n, m, d, m, 1, I, M, K, DOT, DTYPE) * inv
    exponent = (vector(g + p * m, j, m, DTYPE) * inv + log2_mass(vector(b + p * m, j, m, DTYPE)))[None, :] - cost
    top = tl.max(exponent, 1)
    e = tl.exp2(exponent - top[:, None])
    s = tl.sum(e, 1)
    new = -(top + tl.log2(s)) / inv
    mass = vector(a + p * n, i, n, DTYPE)
    mass = tl.where(is_live(mass), mass, 0.0)
    tl.store(f_next + p * n + i, new, mask=i < n)
    at = (block.to(tl.int64) * count + p) * m
    tl.store(share + at + j, tl.sum(e * (mass / s)[:, None], 0), mask=j < m)
    error = tl.sum(row_error(mass, (vector(f + p * n, i, n, DTYPE) - new) * inv), 0)
    done = tl.load(n_iter + p)
    error = tl.where(done == 0, float("inf"), tl.where(done >= max_iter, -float("inf"), error))
    tl.store(missed + p * tl.num_programs(1) + block, error)


@triton.jit(do_not_specialize=["count", "blocks"])
def finish_columns(
    left, right, a, b, f, g, f_next, share, missed, running, n_iter, count, blocks, n, m, d,
    eps: tl.float64, tol: tl.float64, J: tl.constexpr, I: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The half-step of J columns from the shares of the row blocks; grid: problems x blocks of max(n, m).

    Each program decides alike from ``missed``; what it changes of ``running`` and ``n_iter`` no other program needs.
    """
    DTYPE: tl.constexpr = a.dtype.element_ty
    TINY: tl.constexpr = 1e-200 if tl.float64 == DTYPE else 1e-25
    p = tl.program_id(0).to(tl.int64)
    if tl.load(running + p) == 0:
        return
    error = tl.zeros([], DTYPE)
    for block in range(blocks):
        error += tl.load(missed + p * blocks + block)
    if error >= tol:  # NaN stops
        j = tl.program_id(1) * J + tl.arange(0, J)
        tl.store(f + p * n + j, vector(f_next + p * n, j, n, DTYPE), mask=j < n)
        mass = vector(b + p * m, j, m, DTYPE)
        live = is_live(mass)
        t = tl.zeros([J], DTYPE)
        for block in range(blocks):
            t += vector(share + (tl.cast(block, tl.int64) * count + p) * m, j, m, DTYPE)
        inv = base2(eps, DTYPE)
        new = vector(g + p * m, j, m, DTYPE)
        if tl.min(tl.where(live, t, 1.0), 0) < TINY:
            if right is None:
                left += p * n * m
                new = stream_step(
                    left, None, j, f_next + p * n, a + p * n, m, n, d, 1, m, 0, n, inv, J, I, K, DOT
                )  # fmt: skip
            else:
                new = stream_step(
                    right + p * m * d, left + p * n * d, j, f_next + p * n, a + p * n, m, n, d, 1, m, 0, n, inv,
                    J, I, K, DOT,
                )  # fmt: skip
        else:
            ratio = tl.log2(tl.where(live, t, 1.0)) - tl.where(live, log2_mass(mass), 0.0)
            new -= tl.where(live, ratio, 0.0) / inv
        tl.store(g + p * m + j, new, mask=j < m)
        if tl.program_id(1) == 0:
            tl.store(n_iter + p, tl.load(n_iter + p) + 1)
    elif tl.program_id(1) == 0:
        tl.store(running + p, 0)


@triton.jit(do_not_specialize=["count"])
def normal_rows(
    left, right, f, g, alpha, scale, share, running, count, n, m, d, eps: tl.float64,
    I: tl.constexpr, M: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The share of I rows of sum_i k_ij scale_i (sum_j' k_ij' alpha_j'); grid: problems x blocks of rows."""
    DTYPE: tl.constexpr = f.dtype.element_ty
    p = tl.program_id(0).to(tl.int64)
    if tl.load(running + p) == 0:
        return
    if right is None:
        left += p * n * m
    else:
        left += p * n * d
        right += p * m * d
    block = tl.program_id(1)
    i = block * I + tl.arange(0, I)
    j = tl.arange(0, M)
    cost = cost_tile(left, right, i, j, n, m, d, m, 1, I, M, K, DOT, DTYPE)
    fi, gj = vector(f + p * n, i, n, DTYPE), vector(g + p * m, j, m, DTYPE)
    k = kernel_tile(cost, fi, gj, base2(eps, DTYPE))
    product = tl.sum(k * vector(alpha + p * m, j, m, DTYPE)[None, :], 1) * vector(scale + p * n, i, n, DTYPE)
    at = (block.to(tl.int64) * count + p) * m
    tl.store(share + at + j, tl.sum(k * product[:, None], 0), mask=j < m)
