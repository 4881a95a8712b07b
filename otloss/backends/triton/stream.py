r"""Streaming passes: the large problems, and what every size needs once per call.

``half_step`` is one half-iteration in the log-domain, without the damping of a penalty: whoever takes it over divides
(``commit_rows`` here, ``balance`` in ``relaxed.py``). ``sums`` are weighted row sums of k. Both go through the cost
tile by tile, stored or made anew from features. ``minima`` reads a dense cost once for the minima of its rows, and once
for those of its columns. The columns are the rows of the exchanged view. With few rows the
columns are split over programs too. Whoever reads the parts adds them in a fixed order, without atomics, so that
results are the same in every run.

Roofline, features, per entry of the cost: 2 d operations of the product (three TF32 products: 6 d on the tensor
cores), one exponential, about 8 others. An iteration is two passes, so for n = m = 4096, d = 64: 2 x 1.7e7 entries
x 384 = 1.3e10 tensor operations (26 us at 495 TFLOP/s of H100, 82 us at 156 of A100), 3.4e7 exponentials (10 us at
3.6e12/s; 12 us on A100), 2.7e8 others (8 us; 28 us). Stored: two reads of 67 MB (40 us at 3.35 TB/s, 86 us at 1.55).
Four launches per iteration, three without a split and without mixed steps.

There are two exponentials per entry and iteration, one for each side. A row's scaling is known only when its last
column has been seen, and by then the row's first exponentials are gone. To take only one, a multiprocessor would have
to hold whole rows (``rows.py``; 16 rows of 4096 float32 are 256 kB, more than there is), or the kernel would have to
lie in memory. That costs more than the second exponential: by the rates above the exponential takes 5 us of an
iteration on H100, reading the kernel 20 us.
"""

# mypy: ignore-errors
import triton.language as tl

from otloss.backends.triton.compat import jit
from otloss.backends.triton.tiles import (
    add_splits,
    asked_error,
    base2,
    cost_tile,
    is_live,
    kernel_tile,
    row_error,
    stream_step,
    vector,
)


@jit(do_not_specialize=["count", "splits"])
def minima(left, min_j, mass, out, count, n, m, si, sj, splits, I: tl.constexpr, J: tl.constexpr):
    """out[s, p, i] = min_j C_ij - min_j of a stored cost, over the columns with mass of split s; inf if there are none.

    Without ``min_j`` nothing is subtracted. Grid: problems x blocks of I rows x splits. One read of the cost.
    """
    DTYPE: tl.constexpr = mass.dtype.element_ty
    p = tl.program_id(0).to(tl.int64)
    left += p * n * m
    mass += p * m
    i = tl.program_id(1).to(tl.int64) * I + tl.arange(0, I)
    split = tl.program_id(2)
    width = tl.cdiv(tl.cdiv(m, J), splits) * J
    end = tl.minimum(split * width + width, m)
    least = tl.full([I], float("inf"), DTYPE)
    for start in range(split * width, end, J):
        j = start + tl.arange(0, J).to(tl.int64)
        cost = cost_tile(left, None, None, None, i, j, n, m, 0, si, sj, "stored", I, J, 16, DTYPE)
        if min_j is not None:
            cost -= vector(min_j + p * m, j, m, DTYPE)[None, :]
        live = is_live(vector(mass, j, end, DTYPE))
        least = tl.minimum(least, tl.min(tl.where(live[None, :], cost, float("inf")), 1))
    tl.store(out + (split.to(tl.int64) * count + p) * n + i, least, mask=i < n)


@jit(do_not_specialize=["least", "count", "splits"], do_not_specialize_on_alignment=["g", "out"])
def half_step(
    left, right, min_i, min_j, g, b, out, gate, least, count, n, m, d, si, sj, eps: tl.float64, splits,
    KIND: tl.constexpr, I: tl.constexpr, J: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out[s, p, i] = -eps log sum_j b_j exp((g_j - C_ij)/eps) over split s of the columns, where gate[p] >= least.

    Grid: problems x blocks of I rows x splits.
    """
    p = tl.program_id(0).to(tl.int64)
    if gate is not None:  # noqa: SIM102 (known when compiling)
        if tl.load(gate + p) < least:
            return
    left += p * n * (m if right is None else d)
    if right is not None:
        right += p * m * d
    if min_i is not None:
        min_i += p * n
        min_j += p * m
    i = tl.program_id(1).to(tl.int64) * I + tl.arange(0, I)
    split = tl.program_id(2)
    width = tl.cdiv(tl.cdiv(m, J), splits) * J
    begin = split * width
    inv = base2(eps, g.dtype.element_ty)
    f = stream_step(
        left, right, min_i, min_j, i, g + p * m, b + p * m, n, m, d, si, sj, begin, tl.minimum(begin + width, m), inv,
        KIND, I, J, K,
    )  # fmt: skip
    tl.store(out + (split.to(tl.int64) * count + p) * n + i, f, mask=i < n)


@jit(do_not_specialize=["count", "n", "max_iter", "splits"])
def commit_rows(
    part, f, a, running, n_iter, soft, columns, mix, count, n, eps: tl.float64, tol: tl.float64, max_iter, splits,
    I: tl.constexpr,
):  # fmt: skip
    """Takes the rows' half-step over, unless it shows that the state before it is good enough; grid: problems.

    With penalties ``soft`` (count, 2) is eps/rho of both sides, and ``columns`` (count) the error of the columns.
    ``mix`` says which problems take mixed steps (``mixed.py``), whose error the columns tell; None if none may.
    """
    DTYPE: tl.constexpr = a.dtype.element_ty
    p = tl.program_id(0).to(tl.int64)
    if tl.load(running + p) == 0:
        return
    done = tl.load(n_iter + p)
    inv = base2(eps, DTYPE)
    missed = tl.zeros([I], DTYPE)
    for start in range(0, n, I):
        i = start + tl.arange(0, I)
        f_next = add_splits(part, p, i, n, count, splits, inv)
        if soft is None:
            missed += row_error(vector(a + p * n, i, n, DTYPE), (vector(f + p * n, i, n, DTYPE) - f_next) * inv)
        else:
            before, soft_a = vector(f + p * n, i, n, DTYPE), tl.load(soft + 2 * p)
            missed += asked_error(a + p * n, before, f_next, i, n, soft_a, inv, tol)
    error = tl.sum(missed, 0)
    if soft is not None:
        error += tl.load(columns + p)
    takes = (done == 0) | (error >= (tol if soft is None else 0.0))  # NaN stops
    if mix is not None:
        takes = takes | (tl.load(mix + p) >= 0.0)
    tl.debug_barrier()  # every warp has read what the first will write
    if takes & (done < max_iter):
        for start in range(0, n, I):
            i = start + tl.arange(0, I)
            f_next = add_splits(part, p, i, n, count, splits, inv)
            if soft is not None:
                f_next /= 1.0 + tl.load(soft + 2 * p)
            tl.store(f + p * n + i, f_next, mask=i < n)
        tl.store(n_iter + p, done + 1)
    else:
        tl.store(running + p, 0)


@jit(do_not_specialize=["count", "n", "splits"])
def commit(part, f, gate, count, n, eps: tl.float64, splits, I: tl.constexpr):
    """f from the parts of each split; grid: problems x blocks of I rows."""
    p = tl.program_id(0).to(tl.int64)
    if gate is not None:  # noqa: SIM102 (known when compiling)
        if tl.load(gate + p) == 0:
            return
    i = tl.program_id(1) * I + tl.arange(0, I)
    total = add_splits(part, p, i, n, count, splits, base2(eps, f.dtype.element_ty))
    tl.store(f + p * n + i, total, mask=i < n)


@jit(do_not_specialize=["alpha_parts", "count", "splits"])
def sums(
    left, right, min_i, min_j, f, g, alpha, alpha_scale, alpha_parts, beta, gamma, out, gate, count,
    n, m, d, si, sj, eps: tl.float64, splits, REDUCED: tl.constexpr, KIND: tl.constexpr,
    I: tl.constexpr, J: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """sum_j k_ij alpha_j, sum_j k_ij C_ij beta_j (C - f - g if REDUCED) and sum_j k_ij gamma_j, of each split.

    ``alpha`` may come in ``alpha_parts`` parts, to be added and multiplied by ``alpha_scale``; ``beta`` and ``gamma``
    may be None. ``out`` is (splits, channels, count, n). Grid: problems x blocks of I rows x splits.
    """
    DTYPE: tl.constexpr = f.dtype.element_ty
    p = tl.program_id(0).to(tl.int64)
    if gate is not None:  # noqa: SIM102 (known when compiling)
        if tl.load(gate + p) == 0:
            return
    left += p * n * (m if right is None else d)
    if right is not None:
        right += p * m * d
    if min_i is not None:
        min_i += p * n
        min_j += p * m
    i = tl.program_id(1).to(tl.int64) * I + tl.arange(0, I)
    split = tl.program_id(2)
    width = tl.cdiv(tl.cdiv(m, J), splits) * J
    end = tl.minimum(split * width + width, m)
    inv = base2(eps, DTYPE)
    fi = vector(f + p * n, i, n, DTYPE)
    by_alpha = tl.zeros([I], DTYPE)
    by_beta = tl.zeros([I], DTYPE)
    by_gamma = tl.zeros([I], DTYPE)
    for start in range(split * width, end, J):
        j = start + tl.arange(0, J).to(tl.int64)
        cost = cost_tile(left, right, min_i, min_j, i, j, n, m, d, si, sj, KIND, I, J, K, DTYPE)
        gj = vector(g + p * m, j, m, DTYPE)
        k = kernel_tile(cost, fi, gj, inv)
        weight = vector(alpha + p * m, j, end, DTYPE)
        for s in range(1, alpha_parts):
            weight += vector(alpha + (s * count + p) * m, j, end, DTYPE)
        if alpha_scale is not None:
            weight *= vector(alpha_scale + p * m, j, end, DTYPE)
        by_alpha += tl.sum(k * weight[None, :], 1)
        if beta is not None:
            if REDUCED:
                cost = cost - fi[:, None] - gj[None, :]
            if right is None:
                cost = tl.where(k == 0.0, 0.0, cost)  # not 0 * inf
            by_beta += tl.sum(k * vector(beta + p * m, j, end, DTYPE)[None, :] * cost, 1)
        if gamma is not None:
            by_gamma += tl.sum(k * vector(gamma + p * m, j, end, DTYPE)[None, :], 1)
    CHANNELS: tl.constexpr = 1 + (beta is not None) + (gamma is not None)
    out += split.to(tl.int64) * CHANNELS * count * n + p * n
    tl.store(out + i, by_alpha, mask=i < n)
    if beta is not None:
        tl.store(out + tl.cast(count, tl.int64) * n + i, by_beta, mask=i < n)
    if gamma is not None:
        tl.store(out + (CHANNELS - 1) * tl.cast(count, tl.int64) * n + i, by_gamma, mask=i < n)


@jit(do_not_specialize=["step"], do_not_specialize_on_alignment=["f", "g", "multiplier", "out"])
def unroll_step(
    left, right, min_i, min_j, f, g, a, multiplier, out, grad, n_iter, step, n, m, d, si, sj, eps: tl.float64,
    KIND: tl.constexpr, I: tl.constexpr, J: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One half-iteration in reverse: with t_i = sum_j k_ij multiplier_j, out_i -= a_i t_i and grad_i -= eps t_i.

    Only where n_iter[p] >= step. Grid: problems x blocks of I rows.
    """
    DTYPE: tl.constexpr = f.dtype.element_ty
    p = tl.program_id(0).to(tl.int64)
    if tl.load(n_iter + p) < step:
        return
    left += p * n * (m if right is None else d)
    if right is not None:
        right += p * m * d
    if min_i is not None:
        min_i += p * n
        min_j += p * m
    i = tl.program_id(1).to(tl.int64) * I + tl.arange(0, I)
    fi = vector(f + p * n, i, n, DTYPE)
    inv = base2(eps, DTYPE)
    total = tl.zeros([I], DTYPE)
    for start in range(0, m, J):
        j = start + tl.arange(0, J).to(tl.int64)
        cost = cost_tile(left, right, min_i, min_j, i, j, n, m, d, si, sj, KIND, I, J, K, DTYPE)
        k = kernel_tile(cost, fi, vector(g + p * m, j, m, DTYPE), inv)
        total += tl.sum(k * vector(multiplier + p * m, j, m, DTYPE)[None, :], 1)
    mass = vector(a + p * n, i, n, DTYPE)
    change = tl.where(is_live(mass), mass * total, 0.0)  # not 0 * inf
    tl.store(out + p * n + i, vector(out + p * n, i, n, DTYPE) - change, mask=i < n)
    tl.store(grad + p * n + i, vector(grad + p * n, i, n, DTYPE) - tl.full([], eps, DTYPE) * total, mask=i < n)
