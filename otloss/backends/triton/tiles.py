r"""What every kernel is made of: a tile of the cost, the scaled kernel on it, and a half-step in the log-domain.

A *view* of a problem is (left, right, min_i, min_j, n, m, d, si, sj) and the kind of its cost. For a stored cost,
C_ij = left[i si + j sj], ``right`` is None and KIND "stored". For features, ``left`` and ``right`` are what
``features.py`` has made of them:

=============  ==================================================  ===================================================
"cosine"       C_ij = 1 - <left_i, right_j>                        of unit rows
"sqeuclidean"  C_ij = max(min_i + min_j - 2 <left_i, right_j>, 0)  of centred points, with the squares of their lengths
"dot"          C_ij = -<left_i, right_j>                           of the features as they are
=============  ==================================================  ===================================================

Seen from the columns it is the same view with left and right, min_i and min_j, n and m, si and sj exchanged, so that
each kernel is written for rows alone.

Of a stored cost, ``min_i`` and ``min_j`` are the minima of rows and columns, which are taken out of it wherever it is
read; None where nothing is. That takes eight float32 operations per entry, and no memory but the two vectors.

A cost of +inf forbids a pair: its kernel is 0, and where the cost is a factor beside the kernel it counts as 0. The
half-step of a point that is forbidden to every point with mass is +inf. If the point has no mass itself, it gets 0 in
the end. What stands there before does not matter: half-steps read no potential of a point without mass.

Exponents are kept in base 2: with inv = log2(e)/eps, exp((f_i + g_j - C_ij)/eps) = 2^((f_i + g_j - C_ij) inv), one
``ex2`` instruction. A mass that does not exceed 1e-30 (1e-290 in float64) is no mass; padding has mass 0 too.

Annotations here are read by Triton, so this file and its siblings do not postpone their evaluation.
"""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def base2(eps, DTYPE: tl.constexpr):
    """log2(e)/eps, computed in float64."""
    return tl.full([], 1.4426950408889634 / eps, DTYPE)


@triton.jit
def is_live(mass):
    """Where there is mass."""
    DEAD: tl.constexpr = 1e-290 if mass.dtype == tl.float64 else 1e-30
    return mass > DEAD


@triton.jit
def known(x, live):
    """``x``, but 0 where a point without mass has lost it: its potential is of the size of its costs, however large."""
    return tl.where(live | (tl.abs(x) < float("inf")), x, 0.0)


@triton.jit
def log2_mass(mass):
    """log2 of a mass, -inf where there is none."""
    live = is_live(mass)
    return tl.where(live, tl.log2(tl.where(live, mass, 1.0)), -float("inf"))


@triton.jit
def vector(pointer, i, n, DTYPE: tl.constexpr):
    """Entries ``i`` of a vector of length ``n``, 0 beyond it."""
    return tl.load(pointer + i, mask=i < n, other=0.0).to(DTYPE)


@triton.jit
def shifted(cost, by_row, by_column):
    """A tile of cost less a constant of each row and column, rounded once: see ``shifted`` of the reference."""
    rows, columns = by_row[:, None], by_column[None, :]
    left = cost - rows
    back = left - cost
    return tl.where(cost == float("inf"), cost, (left - columns) + ((cost - (left - back)) - (rows + back)))


@triton.jit
def reached(x):
    """A minimum over pairs with mass, or a half-step; 0 where all of these pairs are forbidden."""
    return tl.where(x == float("inf"), 0.0, x)


@triton.jit
def log2_total(exponents):
    """log2 of the sum of 2^exponents; -inf where all are."""
    peak = tl.max(exponents, 0)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    return peak + tl.log2(tl.sum(tl.exp2(exponents - peak), 0))


@triton.jit
def log2_asked(mass, f, i, n, rate, DTYPE: tl.constexpr):
    """log2 of the marginal a exp(-f/rho) that potentials ask for, rate = log2(e)/rho; -inf without mass."""
    of_mass = log2_mass(vector(mass, i, n, DTYPE))
    return tl.where(of_mass == -float("inf"), of_mass, of_mass - vector(f, i, n, DTYPE) * rate)


@triton.jit
def log2_all_asked(mass, f, begin, end, rate, I: tl.constexpr):
    """log2 of the sum of that marginal over the entries begin .. end - 1, which lie in memory."""
    DTYPE: tl.constexpr = mass.dtype.element_ty
    top = tl.full([I], -float("inf"), DTYPE)
    total = tl.zeros([I], DTYPE)
    for start in range(begin, end, I):
        exponent = log2_asked(mass, f, start + tl.arange(0, I), end, rate, DTYPE)
        peak = tl.maximum(top, exponent)
        finite = tl.where(peak == -float("inf"), 0.0, peak)  # no mass so far
        total = total * tl.exp2(top - finite) + tl.exp2(exponent - finite)
        top = peak
    return log2_total(top + tl.log2(total))


@triton.jit
def cost_tile(
    left, right, min_i, min_j, i, j, n, m, d, si, sj, KIND: tl.constexpr, I: tl.constexpr, J: tl.constexpr,
    K: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """C of rows ``i`` and columns ``j``, less the minima; padding is finite and must be masked by its mass.

    Offsets have the type of ``i`` and ``j``: 64 bits, twice the registers, only where a problem may have 2^31 entries.
    """
    if right is None:
        at = left + (i * si)[:, None] + (j * sj)[None, :]
        cost = tl.load(at, mask=(i < n)[:, None] & (j < m)[None, :], other=0.0).to(DTYPE)
        if min_i is None:
            return cost
        else:
            return shifted(cost, vector(min_i, i, n, DTYPE), vector(min_j, j, m, DTYPE))
    else:
        product = tl.zeros([I, J], DTYPE)
        for start in range(0, d, K):
            k = start + tl.arange(0, K)
            at = i[:, None] * d + k[None, :]
            x = tl.load(left + at, mask=(i < n)[:, None] & (k < d)[None, :], other=0.0)
            at = j[None, :] * d + k[:, None]
            y = tl.load(right + at, mask=(j < m)[None, :] & (k < d)[:, None], other=0.0)
            product = tl.dot(x, y, product, input_precision="tf32x3")
        if KIND == "sqeuclidean":  # rounding may take it below 0
            squares = vector(min_i, i, n, DTYPE)[:, None] + vector(min_j, j, m, DTYPE)[None, :]
            return tl.maximum(squares - 2.0 * product, 0.0, propagate_nan=tl.PropagateNan.ALL)
        elif KIND == "dot":
            return -product
        else:
            return 1.0 - product


@triton.jit
def kernel_tile(cost, f, g, inv):
    """k_ij = exp((f_i + g_j - C_ij)/eps), bounded so that a pair without mass cannot turn 0 * inf into NaN."""
    BOUND: tl.constexpr = 865.6170245333780 if cost.dtype == tl.float64 else 86.5617024533378  # 600 and 60, base 2
    exponent = (f[:, None] + g[None, :] - cost) * inv
    return tl.exp2(tl.minimum(exponent, BOUND, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def stream_step(
    left, right, min_i, min_j, i, g, b, n, m, d, si, sj, begin, end, inv, KIND: tl.constexpr,
    I: tl.constexpr, J: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The half-step of rows ``i`` over the columns begin .. end - 1, tile by tile with a running maximum."""
    DTYPE: tl.constexpr = g.dtype.element_ty
    top = tl.full([I], -float("inf"), DTYPE)
    total = tl.zeros([I], DTYPE)
    for start in range(begin, end, J):
        j = start + tl.arange(0, J).to(tl.int64)
        cost = cost_tile(left, right, min_i, min_j, i, j, n, m, d, si, sj, KIND, I, J, K, DTYPE)
        lb = tl.where(j < end, log2_mass(vector(b, j, m, DTYPE)), -float("inf"))
        gj = tl.where(lb > -float("inf"), vector(g, j, m, DTYPE), 0.0)
        exponent = (gj[None, :] - cost) * inv + lb[None, :]
        peak = tl.maximum(top, tl.max(exponent, 1))
        finite = tl.where(peak == -float("inf"), 0.0, peak)  # no mass so far
        total = total * tl.exp2(top - finite) + tl.sum(tl.exp2(exponent - finite[:, None]), 1)
        top = peak
    return -(top + tl.log2(total)) / inv


@triton.jit
def stored_tile(cost, min_i, min_j, i, j, n, m, DTYPE: tl.constexpr):
    """Rows ``i`` and columns ``j`` of a stored cost less the minima, 0 beyond it."""
    return cost_tile(cost, None, min_i, min_j, i, j, n, m, 0, m, 1, "stored", 1, 1, 1, DTYPE)


@triton.jit
def row_step(cost, min_i, min_j, i, g, b, n, m, inv, I: tl.constexpr, J: tl.constexpr):
    """The half-step of rows ``i`` of a stored cost."""
    return stream_step(cost, None, min_i, min_j, i, g, b, n, m, 0, m, 1, 0, m, inv, "stored", I, J, 16)


@triton.jit
def column_step(cost, min_i, min_j, j, f, a, n, m, begin, end, inv, J: tl.constexpr, I: tl.constexpr):
    """The half-step of columns ``j`` over the rows begin .. end - 1 of a stored cost."""
    return stream_step(cost, None, min_j, min_i, j, f, a, m, n, 0, 1, m, begin, end, inv, "stored", J, I, 16)


@triton.jit
def add_splits(part, p, i, n, count, splits, inv):
    """The potential of all columns from those of each split."""
    lowest = tl.load(part + p * n + i, mask=i < n, other=0.0)
    if splits > 1:
        for s in range(1, splits):
            lowest = tl.minimum(lowest, tl.load(part + (s * count + p) * n + i, mask=i < n, other=0.0))
        total = tl.zeros_like(lowest)
        for s in range(splits):
            # A split without mass is at +inf and adds nothing.
            total += tl.exp2((lowest - tl.load(part + (s * count + p) * n + i, mask=i < n, other=0.0)) * inv)
        lowest -= tl.log2(total) / inv
    return lowest


@triton.jit
def slope(f, soft, eps):
    """rho (1 - exp(-f/rho)), rho = eps/soft, in float64, where no terms of size rho cancel; f of a constraint."""
    soft, f = soft.to(tl.float64), f.to(tl.float64)
    rho = tl.full([], eps, tl.float64) / tl.where(soft > 0.0, soft, 1.0)
    return tl.where(soft > 0.0, rho * (1.0 - tl.exp2(f * (-1.4426950408889634 / rho))), f)


@triton.jit
def row_error(a, drift):
    """a_i |(T1)_i / a_i - 1|: the next half-step knows the row sums, T1 = a 2^drift, drift = (f - f_next) inv."""
    return tl.where(is_live(a), a * tl.abs(tl.exp2(drift) - 1.0), 0.0)


@triton.jit
def asked_error(a, f, f_next, i, n, soft, inv, tol):
    """|(T1)_i - a_i exp(-f_i/rho)| - tol (T1)_i with penalties; ``f_next`` is the half-step without its damping."""
    DTYPE: tl.constexpr = a.dtype.element_ty
    of_mass = log2_mass(vector(a, i, n, DTYPE))
    rows = tl.exp2(of_mass + (f - f_next) * inv)
    asked = tl.exp2(of_mass - f * (soft * inv))
    return tl.where(of_mass == -float("inf"), 0.0, tl.abs(rows - asked) - tl.full([], tol, DTYPE) * rows)
