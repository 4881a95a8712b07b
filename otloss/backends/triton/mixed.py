r"""A set with itself: mixed steps in place of plain iterations.

The problem of equal masses, and of equal features or a symmetric cost, has f = g at its solution. Let H be a half-step,
with the damping of the penalty if there is one (the same on both sides). From g it gives f = H(g) and g' = H(f), and

.. math:: g \leftarrow (g + 8 f + 8 g') / 17

is the step that the CPU and reference backends take too; ``csrc/quasi_newton.hpp`` derives it. Where the kernel
exp(-C/eps) is positive definite, as distances have it, a step leaves a 17th of the error at most, at every eps and with
every penalty.

The rows of the plan of f and g are exact. The error is the distance of its columns, T'1 = b exp((g - H(f))/eps) with H
without its damping, from the marginal that g asks for. Below ``tol`` the solve ends with f and g'. Then the columns are
exact, and the error of the rows is no larger. At last f and g are replaced by their mean: to first order the error is
the same, half on either side. Where after five sweeps one leaves more than half of the error of the one before, plain
iterations go on from f and g'.

Of a dense cost without its minima r and c, f - g = c - r at the solution (``apart``).

Small problems take these steps in the log-domain, before the iterations that scale a kernel (``mix_small``). Medium
ones take them where a launch begins (``rows.py``), large ones in place of a plain step of g (``commit_columns`` here,
``balance`` in ``relaxed.py``). Medium and large problems keep the error of the last sweep in ``mix``: it is infinite
before the first, and -1 in a problem that takes no mixed steps, or no more.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from otloss.backends.triton.compat import jit
from otloss.backends.triton.tiles import (
    add_splits,
    asked_error,
    base2,
    column_step,
    known,
    log2_mass,
    row_error,
    row_step,
    vector,
)

FEW = tl.constexpr(5)  # sweeps before the first look at what a step leaves


@triton.jit
def are_same(one, other, a, b, begin, end, n, width, I: tl.constexpr, J: tl.constexpr):
    """Whether rows begin .. end - 1 are those of a set with itself; reads no further than to the first difference.

    ``one`` and ``other`` (n, width) are features. Or ``one`` is a cost, whose rows are compared with its columns, and
    ``other`` is None.
    """
    differ = tl.full([], 0, tl.int32)
    start = begin
    while (start < end) & (differ == 0):
        i = (start + tl.arange(0, I)).to(tl.int64)
        mass, same = tl.load(a + i, mask=i < end, other=0.0), tl.load(b + i, mask=i < end, other=0.0)
        differ = tl.max((mass != same).to(tl.int32), 0)
        column = 0
        while (column < width) & (differ == 0):
            j = (column + tl.arange(0, J)).to(tl.int64)
            inside = (i < end)[:, None] & (j < width)[None, :]
            x = tl.load(one + i[:, None] * width + j[None, :], mask=inside, other=0.0)
            if other is None:
                y = tl.load(one + j[None, :] * width + i[:, None], mask=inside, other=0.0)
            else:
                y = tl.load(other + i[:, None] * width + j[None, :], mask=inside, other=0.0)
            differ = tl.max(tl.max((x != y).to(tl.int32), 1), 0)
            column += J
        start += I
    return differ == 0


@jit(do_not_specialize=["n", "width"])
def find_same(one, other, a, b, soft, same, n, width, I: tl.constexpr, J: tl.constexpr):
    """Turns the 1 in same[p] to 0 unless p is the problem of a set with itself; grid: problems x blocks of I rows.

    Every program that sees a difference writes the same 0. With penalties ``soft`` (count, 2) is eps/rho, else None.
    """
    p = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * I
    one += p * n * width
    if other is not None:
        other += p * n * width
    alike = are_same(one, other, a + p * n, b + p * n, begin, tl.minimum(begin + I, n), n, width, I, J)
    if soft is not None:
        alike = alike & (tl.load(soft + 2 * p) == tl.load(soft + 2 * p + 1))
    if alike == 0:
        tl.store(same + p, 0)


@triton.jit
def apart(min_i, min_j, j, n, DTYPE: tl.constexpr):
    """f - g at the solution."""
    if min_i is None:
        return tl.zeros([j.shape[0]], DTYPE)
    else:
        return vector(min_j, j, n, DTYPE) - vector(min_i, j, n, DTYPE)


@triton.jit
def mixed(g, f, back):
    """The next g; f is that of the cost as it was given, less what was taken from g."""
    return g + ((f - g) + (back - g)) * 0.47058823529411764  # 8/17


@triton.jit
def column_gap(b, g, back, j, n, soft, inv):
    """|(T'1)_j - what g asks for|; ``back`` is the half-step of g without its damping."""
    if soft is None:
        return row_error(vector(b, j, n, g.dtype), (g - back) * inv)
    else:
        return asked_error(b, g, back, j, n, soft, inv, 0.0)


@triton.jit
def column_mass(b, g, back, j, n, inv):
    """(T'1)_j."""
    of_mass = log2_mass(vector(b, j, n, g.dtype))
    return tl.where(of_mass == -float("inf"), 0.0, tl.exp2(of_mass + (g - back) * inv))


@triton.jit
def finite(error):
    """An error that is not known is infinite."""
    return tl.where(error == error, error, float("inf"))


@triton.jit
def goes_on(error, before, sweeps):
    """Whether another mixed step follows, of a problem that is not done."""
    return (sweeps < FEW) | (error < 0.5 * before)


@triton.jit
def mix_small(
    cost, min_i, min_j, a, b, f_out, g_out, live, soft, n, inv, bound, max_iter, N: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Mixed steps from ``g_out``. How many, and whether plain iterations have to go on from there."""
    DTYPE: tl.constexpr = a.dtype.element_ty
    i = tl.arange(0, N)
    sweeps = 0
    go = sweeps < max_iter
    mixing = go
    before = tl.full([], float("inf"), DTYPE)
    while mixing:
        f = known(row_step(cost, min_i, min_j, i, g_out, b, n, n, inv, N, J), live)
        if soft is not None:
            f = f / (1.0 + soft)
        tl.store(f_out + i, f, mask=i < n)
        tl.debug_barrier()
        back = known(column_step(cost, min_i, min_j, i, f_out, a, n, n, 0, n, inv, N, J), live)
        sweeps += 1
        g = vector(g_out, i, n, DTYPE)
        error = tl.sum(column_gap(b, g, back, i, n, soft, inv), 0)
        if soft is not None:
            error = error / tl.sum(column_mass(b, g, back, i, n, inv), 0)
            back = back / (1.0 + soft)
        error = finite(error)
        go = (error >= bound) & (sweeps < max_iter)
        mixing = go & goes_on(error, before, sweeps)
        before = error
        facing = vector(f_out, i, n, DTYPE) - apart(min_i, min_j, i, n, DTYPE)
        g = tl.where(mixing, mixed(g, facing, back), back)
        tl.debug_barrier()  # every warp has read the old g
        tl.store(g_out + i, g, mask=i < n)
        tl.debug_barrier()
    return sweeps, go


@triton.jit
def meet(f_out, g_out, min_i, min_j, n, N: tl.constexpr):
    """The mean of f and g for both, of the cost as it was given."""
    DTYPE: tl.constexpr = f_out.dtype.element_ty
    i = tl.arange(0, N)
    between = apart(min_i, min_j, i, n, DTYPE)
    half = (vector(f_out, i, n, DTYPE) - between + vector(g_out, i, n, DTYPE)) * 0.5
    tl.debug_barrier()
    tl.store(f_out + i, half + between, mask=i < n)
    tl.store(g_out + i, half, mask=i < n)
    tl.debug_barrier()


@triton.jit
def mix_columns(
    part, f, g, b, min_i, min_j, soft, mix, running, done, p, count, n, inv, tol, max_iter, splits, I: tl.constexpr,
):  # fmt: skip
    """The next g of a problem, from the parts of its half-step; ends it where that is due.

    Vectors are those of problem ``p``, ``soft`` is eps/rho or None, ``done`` counts the sweeps, this one too.
    """
    DTYPE: tl.constexpr = g.dtype.element_ty
    missed, mass = tl.zeros([I], DTYPE), tl.zeros([I], DTYPE)
    for start in range(0, n, I):
        j = start + tl.arange(0, I)
        back, old = add_splits(part, p, j, n, count, splits, inv), vector(g, j, n, DTYPE)
        missed += column_gap(b, old, back, j, n, soft, inv)
        if soft is not None:
            mass += column_mass(b, old, back, j, n, inv)
    error = tl.sum(missed, 0)
    if soft is not None:
        error = error / tl.sum(mass, 0)
    error = finite(error)
    go = (error >= tol) & (done < max_iter)
    mixing = go & goes_on(error, tl.load(mix + p), done)
    tl.debug_barrier()  # every warp has read what the first will write
    for start in range(0, n, I):
        j = start + tl.arange(0, I)
        back, old = add_splits(part, p, j, n, count, splits, inv), vector(g, j, n, DTYPE)
        if soft is not None:
            back = back / (1.0 + soft)
        facing = vector(f, j, n, DTYPE) - apart(min_i, min_j, j, n, DTYPE)
        tl.store(g + j, tl.where(mixing, mixed(old, facing, back), back), mask=j < n)
    tl.store(mix + p, tl.where(mixing, error, -1.0))
    tl.store(running + p, go.to(tl.int32))


@jit(do_not_specialize=["count", "n", "max_iter", "splits"])
def commit_columns(
    part, f, g, b, min_i, min_j, mix, running, n_iter, count, n, eps: tl.float64, tol: tl.float64, max_iter, splits,
    I: tl.constexpr,
):  # fmt: skip
    """Takes the columns' half-step over, or a mixed step in its place; grid: problems."""
    p = tl.program_id(0).to(tl.int64)
    if tl.load(running + p) == 0:
        return
    inv = base2(eps, g.dtype.element_ty)
    f += p * n
    g += p * n
    if min_i is not None:
        min_i += p * n
        min_j += p * n
    if tl.load(mix + p) >= 0.0:
        done = tl.load(n_iter + p)
        mix_columns(
            part, f, g, b + p * n, min_i, min_j, None, mix, running, done, p, count, n, inv, tol, max_iter, splits, I,
        )  # fmt: skip
    else:
        for start in range(0, n, I):
            j = start + tl.arange(0, I)
            tl.store(g + j, add_splits(part, p, j, n, count, splits, inv), mask=j < n)
