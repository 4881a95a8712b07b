r"""Medium problems (n, m up to 1024): blocks of rows, one launch and one pass over the cost per iteration.

A program goes through its rows of the cost, a tile of I whole rows at a time. The half-step of a row needs only that
row. The exponentials that it takes serve the columns too: E_ij/s_i = b_j exp((f_i + g_j - C_ij)/eps) is in registers,
so the program at once adds its rows' share of

    t_j = sum_i a_i E_ij / s_i,        g_j <- g_j - eps log(t_j / b_j).

There is one exponential per entry and iteration. The next launch begins by adding the shares of all blocks. Every
program of a problem does this for itself, in the same order. So programs exchange nothing within a launch, and there is
no barrier between them and no atomic. What one launch writes for the next lies in two copies, used in turn. Each
program has its own state. All programs of a problem decide alike, because they read the same numbers. Where some t_j
underflows (small eps, far columns), the next launch takes that half-step in the log-domain instead of a pass over the
rows. Such a problem may take two launches in every iteration.

A step of conjugate gradients, T' T x, is the same single pass (``normal_rows``). It takes a second launch, because the
scalars of a step are sums over all columns: ``adjoint.descend`` takes them in one program per problem.

Penalties (``relaxed.py`` has the symbols) divide the half-step of a row by 1 + s_a, which scales its share by
exp(-f_i/rho_a), and that of a column by 1 + s_b. The constant t needs the totals of both asked marginals. Each block
leaves that of its rows with its share; each program knows all columns. So the next launch adds the constant to g. It is
kept beside f, which waits without it.

A mixed step (``mixed.py``) is taken where a launch has added the shares: each program then knows g, its half-step, and
the f that the launch before has left.

Adding the shares costs each program m reads per block from the second-level cache. ``config.row_blocks`` weighs this
against processors that would have nothing to do.

Roofline, n = m = 512, B = 64: 1.7e7 entries per iteration. Their 67 MB take 20 us of memory on H100 (43 us on A100),
less where a group of 32 problems stays in the second-level cache. One exponential each takes 5 us (7 us), about 12
other operations 7 us (21 us). With two programs on a multiprocessor these overlap in part: 50 iterations take between 1
and 1.6 ms on H100 if the cost comes from memory. From the ninth iteration on the host looks whether problems still run,
one burst of launches behind the device. The device sees up to 15 launches that have nothing to do, about 2 us each. In
a caller's graph nobody looks: it holds 2 max_iter + 1 launches.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from otloss.backends.triton.compat import jit
from otloss.backends.triton.mixed import apart, column_gap, column_mass, finite, goes_on, mixed
from otloss.backends.triton.tiles import (
    add_splits,
    asked_error,
    base2,
    column_step,
    is_live,
    kernel_tile,
    log2_all_asked,
    log2_asked,
    log2_mass,
    log2_total,
    row_error,
    stored_tile,
    vector,
)

# What a program of a problem is to do next: nothing; the first pass; add shares of t; add half-steps of its rows.
STOPPED, FIRST, LINEAR, LOG = (tl.constexpr(k) for k in range(4))
TOGETHER = tl.constexpr(4)  # shares read at a time


@triton.jit
def add_shares(share, blocks, count, m, j):
    """t_j from the shares of each block, ``share`` pointing at those of the first."""
    total = tl.zeros([j.shape[0]], share.dtype.element_ty)
    for start in range(0, blocks, TOGETHER):
        block = start + tl.arange(0, TOGETHER)
        at = share + block.to(tl.int64)[:, None] * count * m + j[None, :]
        total += tl.sum(tl.load(at, mask=(block < blocks)[:, None] & (j < m)[None, :], other=0.0), 0)
    return total


@triton.jit
def accumulate(own, j, part, m, more):
    """Add to the program's own share, which waits in memory for the next tile: registers hold one tile."""
    tl.debug_barrier()
    tl.store(own + j, part + tl.load(own + j, mask=(j < m) & more, other=0.0), mask=j < m)


@jit(do_not_specialize=["count", "blocks", "tiles", "n", "max_iter"])
def iterate_rows(
    cost, min_i, min_j, a, b, f, g, share, missed, state, soft, level, constant, mix, count, blocks, tiles, n, m,
    eps: tl.float64, tol: tl.float64, max_iter, I: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """One iteration; grid: problems x ``blocks`` of ``tiles`` times I rows.

    ``g`` (count, blocks, m) is each program's own, of ``f`` (2, count, n) copy t % 2 is that after t iterations.
    ``share`` (2, blocks, count, m) and ``missed`` (2, count, blocks), each block's share of t and of the error: launch
    k writes copy k % 2. ``state`` (count, blocks, 3): what to do, launches made, iterations done.

    With penalties ``soft`` (count, 2) is eps/rho of both sides, ``level`` (2, count, blocks) each block's log2 of the
    total that its rows ask for, ``constant`` (count) is to be added to f, and ``missed`` holds the error less ``tol``
    of the plan's mass. Without, all three are None.

    ``mix`` (count, blocks) says which problems take mixed steps (``mixed.py``); None if none may.
    """
    DTYPE: tl.constexpr = a.dtype.element_ty
    TINY: tl.constexpr = 1e-200 if tl.float64 == DTYPE else 1e-25
    p = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    state += (p * blocks + block) * 3
    todo = tl.load(state)
    launches = tl.load(state + 1)
    done = tl.load(state + 2)
    if mix is not None:
        mix += p * blocks + block
        last_error = tl.load(mix)
    tl.debug_barrier()  # every warp has read what the first will write
    if todo == STOPPED:
        return
    ready, fresh = (launches + 1) % 2, launches % 2  # copies to read and to write
    every = tl.arange(0, 1024 // I)
    known = (every < blocks) & (done > 0)  # nothing is there before the first pass
    error = tl.sum(tl.load(missed + (ready * count + p) * blocks + every, mask=known, other=0.0), 0)
    settled = (todo == LINEAR) & (done > 0) & ((error >= (tol if soft is None else 0.0)) == 0)  # NaN stops
    if mix is not None:
        settled = settled & (last_error < 0.0)
    if settled:
        tl.store(state, STOPPED)
        return

    cost += p * n * m
    if min_i is not None:
        min_i += p * n
        min_j += p * m
    a += p * n
    b += p * m
    first = block * tiles * I
    last = tl.minimum(first + tiles * I, n)
    inv = base2(eps, DTYPE)
    j = tl.arange(0, M)
    mass = vector(b, j, m, DTYPE)
    live = is_live(mass)
    shares = share + tl.cast(ready, tl.int64) * blocks * count * m
    own = share + ((tl.cast(fresh, tl.int64) * blocks + block) * count + p) * m
    g += (p * blocks + block) * m
    gj = vector(g, j, m, DTYPE)
    underflow = False
    if todo == LINEAR:
        t = add_shares(shares + p * m, blocks, count, m, j)
        underflow = tl.min(tl.where(live, t, 1.0), 0) < TINY
        if soft is not None:  # a row may ask for more than fits; NaN is such a row times 0
            underflow = underflow | ((tl.sum(tl.where(live, t, 0.0), 0) <= 1.0 / TINY) == 0)
        gj -= tl.where(live, tl.log2(tl.where(live, t / mass, 1.0)), 0.0) / inv
    elif todo == LOG:
        gj = tl.where(live, add_splits(shares, p, j, m, count, blocks, inv), 0.0)
    if mix is not None:
        ended = done < 0  # it is not
        soft_j = None if soft is None else tl.load(soft + 2 * p + 1)
        stiff = 1.0 if soft is None else 1.0 + soft_j
        if (todo != FIRST) & (underflow == 0) & (last_error >= 0.0):
            before_it = vector(g, j, m, DTYPE)
            miss = tl.sum(column_gap(b, before_it, gj, j, m, soft_j, inv), 0)
            if soft is not None:
                miss = miss / tl.sum(column_mass(b, before_it, gj, j, m, inv), 0)
            miss = finite(miss)
            ended = (miss < tol) | (done + 1 >= max_iter)
            again = (ended == 0) & goes_on(miss, last_error, done + 1)
            facing = vector(f + ((done + 1) % 2 * count + p) * n, j, n, DTYPE) - apart(min_i, min_j, j, n, DTYPE)
            gj = tl.where(live & again, mixed(before_it, facing, gj / stiff), gj / stiff)
            tl.debug_barrier()  # every warp has read the old g
            tl.store(mix, tl.where(again, miss, -1.0))
    if soft is not None:
        soft_a, soft_b = tl.load(soft + 2 * p), tl.load(soft + 2 * p + 1)
        rate_a, rate_b = soft_a * inv, soft_b * inv
        level_before = level + (ready * count + p) * blocks
        level_after = level + (fresh * count + p) * blocks + block
        shift = tl.zeros([], DTYPE)
        column_error = tl.zeros([], DTYPE)
        plain = todo != FIRST
        if mix is not None:
            plain = plain & (last_error < 0.0)
        if plain:
            gj = gj / (1.0 + soft_b)
            of_rows = tl.load(level_before + every, mask=every < blocks, other=-float("inf"))
            all_b = log2_total(tl.where(live, log2_mass(mass) - gj * rate_b, -float("inf")))
            shift = (log2_total(of_rows) - all_b) / (rate_a + rate_b)
            column_error = tl.abs(tl.exp2(all_b) - tl.exp2(all_b + shift * rate_b))
            gj -= shift
    tl.store(state + 1, launches + 1)
    if underflow:
        f += ((done + 1) % 2 * count + p) * n
        for start in range(0, m, 64):
            c = start + tl.arange(0, 64)
            part = column_step(cost, min_i, min_j, c, f, a, n, m, first, last, inv, 64, 32)
            tl.store(own + c, part, mask=c < m)
        if soft is not None:
            tl.store(level_after, tl.load(level_before + block))
        tl.store(state, LOG)
    else:
        if todo != FIRST:
            done += 1
            tl.store(state + 2, done)
            tl.store(g + j, gj, mask=j < m)
            if soft is not None:
                tl.store(constant + p, shift, mask=block == 0)
            tl.debug_barrier()
        stops = done >= max_iter
        if mix is not None:
            stops = stops | ended
        if stops:
            tl.store(state, STOPPED)
        else:
            tl.store(state, LINEAR)
            old = f + (done % 2 * count + p) * n
            new = f + ((done + 1) % 2 * count + p) * n
            off = tl.zeros([], DTYPE)
            for start in range(first, last, I):
                i = start + tl.arange(0, I)
                scaled = stored_tile(cost, min_i, min_j, i, j, n, m, DTYPE) * inv
                column = vector(g, j, m, DTYPE) * inv + log2_mass(vector(b, j, m, DTYPE))
                exponent = column[None, :] - scaled
                top = tl.max(exponent, 1)
                top = tl.where(top == -float("inf"), 0.0, top)  # forbidden to every column with mass
                e = tl.exp2(exponent - top[:, None])
                s = tl.sum(e, 1)
                fi = -(top + tl.log2(s)) / inv
                if soft is None:
                    row = vector(a, i, n, DTYPE)
                    row = tl.where(is_live(row), row, 0.0)
                    tl.store(new + i, fi, mask=i < n)
                else:
                    tl.store(new + i, fi / (1.0 + soft_a), mask=i < n)
                    tl.debug_barrier()
                    row = tl.exp2(log2_asked(a, new, i, last, rate_a, DTYPE))
                share_of_e = tl.where(row == 0.0, 0.0, row / s)  # not 0 / 0
                accumulate(own, j, tl.sum(e * share_of_e[:, None], 0), m, start > first)
                if soft is None:
                    drift = (vector(old, i, n, DTYPE) - vector(new, i, n, DTYPE)) * inv
                    off += tl.sum(row_error(vector(a, i, n, DTYPE), drift), 0)
                else:
                    before, whole = vector(old, i, n, DTYPE) + shift, vector(new, i, n, DTYPE) * (1.0 + soft_a)
                    off += tl.sum(asked_error(a, before, whole, i, n, soft_a, inv, tol), 0)
            if soft is not None:
                off += tl.where(block == 0, column_error, 0.0)
                tl.debug_barrier()
                tl.store(level_after, log2_all_asked(a, new, first, last, rate_a, 64))
            fresh = (tl.load(state + 1) + 1) % 2  # read again: a register less in the loop
            tl.store(missed + (fresh * count + p) * blocks + block, off)


@jit(do_not_specialize=["count", "tiles", "n"])
def normal_rows(
    cost, min_i, min_j, f, g, alpha, scale, share, running, count, tiles, n, m, eps: tl.float64,
    I: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The share of a block of rows of sum_i k_ij scale_i (sum_j' k_ij' alpha_j'); grid: problems x blocks."""
    DTYPE: tl.constexpr = f.dtype.element_ty
    p = tl.program_id(0).to(tl.int64)
    if tl.load(running + p) == 0:
        return
    cost += p * n * m
    if min_i is not None:
        min_i += p * n
        min_j += p * m
    block = tl.program_id(1)
    first = block * tiles * I
    j = tl.arange(0, M)
    own = share + (block.to(tl.int64) * count + p) * m
    for start in range(first, tl.minimum(first + tiles * I, n), I):
        i = start + tl.arange(0, I)
        tile = stored_tile(cost, min_i, min_j, i, j, n, m, DTYPE)
        k = kernel_tile(tile, vector(f + p * n, i, n, DTYPE), vector(g + p * m, j, m, DTYPE), base2(eps, DTYPE))
        x = vector(alpha + p * m, j, m, DTYPE)
        product = tl.sum(k * x[None, :], 1) * vector(scale + p * n, i, n, DTYPE)
        accumulate(own, j, tl.sum(k * product[:, None], 0), m, start > first)
