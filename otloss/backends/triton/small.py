r"""Small problems (n, m up to 64): one program per problem, the kernel in registers, all iterations in one launch.

Solve. The kernel k_ij = exp((f_i + g_j - C_ij)/eps) of absorbed potentials stays in registers. An iteration scales it,

    phi_i = 1 / sum_j k_ij b_j psi_j,        psi_j = 1 / sum_i a_i phi_i k_ij,

and takes no exponential. The row sums also give the error of the state before, sum_i a_i |phi_i (k b psi)_i - 1|. The
first iteration, and one after every ``SCALED``, is done in the log-domain. There the scalings are absorbed into f and
g, and k is made anew. The same happens when a scaling leaves [1/SAFE, SAFE]; that iteration starts from the state
before. f and g wait in memory, because registers hold one tile and a few vectors.

Adjoint. The row-normalised kernel stays in registers. A step of conjugate gradients (``adjoint.py`` has the equations)
takes one product with it and one with its transpose, and no exponential.

The minima of rows and columns are taken out of a dense cost wherever it is read (``tiles.py``); the same launch finds
them first. It also sees whether the problem is that of a set with itself (``mixed.py``).

Roofline, padded to N x M = 64 x 64 (49 tokens): an iteration is two operations per entry at 128 per clock and
multiprocessor, 64 clocks, and two reductions with a latency of about 200 clocks. 50 iterations are 13k clocks, 8 us at
1.7 GHz (H100) or 10 us at 1.4 GHz (A100), for as many problems as there are multiprocessors. Bytes: the cost once for
each iteration in the log-domain and twice more (a dense one three times), from the second-level cache. Launches: one.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from otloss.backends.triton.compat import jit
from otloss.backends.triton.mixed import apart, are_same, meet, mix_small
from otloss.backends.triton.tiles import (
    base2,
    column_step,
    is_live,
    kernel_tile,
    known,
    reached,
    row_step,
    slope,
    stored_tile,
    vector,
)

# Iterations between two in the log-domain. A ``while`` loop of them would end early, but the compilers of Triton 3.3
# and 3.4 fail on one that carries both scalings.
SCALED = tl.constexpr(64)


@triton.jit
def dual(
    cost, min_i, min_j, mass_a, mass_b, b, g_out, g, soft_a, soft_b, n, m, eps, inv, N: tl.constexpr, J: tl.constexpr
):
    """The dual at g, which stands in ``g_out``, and at the f of its rows, up to a constant; softs as in ``begin``."""
    f = row_step(cost, min_i, min_j, tl.arange(0, N), g_out, b, n, m, inv, N, J)
    if soft_a is not None:  # a (rho (1 - e) - eps e), e = exp(-f/rho), is a (1 + soft) rho (1 - e) - a eps
        f, g = (1.0 + soft_a) * slope(f / (1.0 + soft_a), soft_a, eps), slope(g, soft_b, eps)
    return tl.sum(tl.where(mass_a > 0.0, mass_a * f, 0.0), 0) + tl.sum(tl.where(mass_b > 0.0, mass_b * g, 0.0), 0)


@triton.jit
def begin(
    start, cost, min_i, min_j, mass_a, mass_b, b, g_out, soft_a, soft_b, n, m, eps, inv, N: tl.constexpr,
    M: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Puts the start in place of ``g_out``, unless its dual is smaller by eps: see ``better_start``.

    With penalties the softs are eps/rho, else None.
    """
    DTYPE: tl.constexpr = mass_b.dtype
    j = tl.arange(0, M)
    cold = vector(g_out, j, m, DTYPE)
    given = vector(start, j, m, DTYPE)
    if min_i is not None:
        given -= vector(min_j, j, m, DTYPE)
    given = tl.where(mass_b > 0.0, given, 0.0)
    if soft_a is None:
        given -= tl.sum(mass_b * given, 0)
    before = dual(cost, min_i, min_j, mass_a, mass_b, b, g_out, cold, soft_a, soft_b, n, m, eps, inv, N, J)
    tl.debug_barrier()
    tl.store(g_out + j, given, mask=j < m)
    tl.debug_barrier()
    after = dual(cost, min_i, min_j, mass_a, mass_b, b, g_out, given, soft_a, soft_b, n, m, eps, inv, N, J)
    tl.debug_barrier()
    if (after >= before - tl.full([], eps, DTYPE)) == 0:  # so for NaN
        tl.store(g_out + j, cold, mask=j < m)
    tl.debug_barrier()


@jit(do_not_specialize=["n", "max_iter", "width"])
def solve_small(
    cost, min_i, min_j, a, b, start, one, other, f_out, g_out, cost_out, value_out, n_iter_out, error_out, n, m, width,
    eps: tl.float64, tol: tl.float64, max_iter, N: tl.constexpr, M: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """All iterations and all outputs of one problem, the minima taken out of its cost too; grid: problems.

    If it may be that of a set with itself, ``one`` and ``other`` are what ``are_same`` compares, else None.
    """
    DTYPE: tl.constexpr = a.dtype.element_ty
    SAFE: tl.constexpr = 1e40 if tl.float64 == DTYPE else 1e8
    p = tl.program_id(0).to(tl.int64)
    cost += p * n * m
    i = tl.arange(0, N)
    j = tl.arange(0, M)
    inv = base2(eps, DTYPE)
    bound = tl.full([], tol, DTYPE)
    a += p * n
    b += p * m
    mass_a = vector(a, i, n, DTYPE)
    mass_b = vector(b, j, m, DTYPE)
    mass_a = tl.where(is_live(mass_a), mass_a, 0.0)
    mass_b = tl.where(is_live(mass_b), mass_b, 0.0)

    # Absorbed potentials stay in memory, where the log-domain steps read them.
    f_out += p * n
    g_out += p * m
    tl.store(f_out + i, tl.zeros([N], DTYPE), mask=i < n)
    if min_i is None:
        tl.store(g_out + j, tl.zeros([M], DTYPE), mask=j < m)
    else:
        min_i += p * n
        min_j += p * m
        whole = stored_tile(cost, None, None, i, j, n, m, DTYPE)
        least = reached(tl.min(tl.where((mass_b > 0.0)[None, :], whole, float("inf")), 1))
        tl.store(min_i + i, least, mask=i < n)
        least_j = reached(tl.min(tl.where((mass_a > 0.0)[:, None], whole - least[:, None], float("inf")), 0))
        tl.store(min_j + j, least_j, mask=j < m)
        tl.store(g_out + j, -least_j, mask=j < m)  # potentials 0 of the cost as given
    tl.debug_barrier()
    if start is not None:
        begin(start + p * m, cost, min_i, min_j, mass_a, mass_b, b, g_out, None, None, n, m, eps, inv, N, M, J)
    phi, psi = tl.full([N], 1.0, DTYPE), tl.full([M], 1.0, DTYPE)
    n_iter = 0
    go = n_iter < max_iter
    if one is not None:
        one += p * n * width
        if other is not None:
            other += p * n * width
        same = are_same(one, other, a, b, 0, n, n, width, 16, 128)
        if same:
            n_iter, go = mix_small(
                cost, min_i, min_j, a, b, f_out, g_out, mass_b > 0.0, None, n, inv, bound, max_iter, N, J
            )
    while go:  # an iteration in the log-domain: the first, and from the state before a scaling that was not safe
        g = vector(g_out, j, m, DTYPE) + tl.log2(psi) / inv
        tl.debug_barrier()  # several warps may hold an entry: all have read it before one stores
        tl.store(g_out + j, g, mask=j < m)
        tl.debug_barrier()
        f = known(row_step(cost, min_i, min_j, i, g_out, b, n, m, inv, N, J), mass_a > 0.0)
        tl.store(f_out + i, f, mask=i < n)
        tl.debug_barrier()
        g = known(column_step(cost, min_i, min_j, j, f_out, a, n, m, 0, n, inv, M, J), mass_b > 0.0)
        tl.store(g_out + j, g, mask=j < m)
        tl.debug_barrier()
        k = kernel_tile(stored_tile(cost, min_i, min_j, i, j, n, m, DTYPE), f, g, inv)
        phi, psi = tl.full([N], 1.0, DTYPE), tl.full([M], 1.0, DTYPE)
        n_iter += 1
        safe = True
        for _ in range(SCALED):  # iterations that scale k, which stays
            if safe:
                s = tl.sum(k * (mass_b * psi)[None, :], 1)
                error = tl.sum(mass_a * tl.abs(phi * s - 1.0), 0)
                next_phi = tl.where(mass_a > 0.0, 1.0 / s, 1.0)
                t = tl.sum(k * (mass_a * next_phi)[:, None], 0)
                spread = tl.maximum(
                    tl.max(tl.where(mass_a > 0.0, tl.maximum(next_phi, s), 1.0), 0),
                    tl.max(tl.where(mass_b > 0.0, tl.maximum(1.0 / t, t), 1.0), 0),
                )
                go = (error >= bound) & (n_iter < max_iter)  # NaN stops
                safe = go & (spread <= SAFE)
                phi = tl.where(safe, next_phi, phi)
                psi = tl.where(safe, tl.where(mass_b > 0.0, 1.0 / t, 1.0), psi)
                n_iter += safe.to(tl.int32)

    f = vector(f_out, i, n, DTYPE) + tl.log2(phi) / inv
    g = vector(g_out, j, m, DTYPE) + tl.log2(psi) / inv
    tl.debug_barrier()
    tl.store(f_out + i, f, mask=i < n)
    tl.store(g_out + j, g, mask=j < m)
    tl.debug_barrier()
    if one is not None:
        if same:
            meet(f_out, g_out, min_i, min_j, n, N)
        f, g = vector(f_out, i, n, DTYPE), vector(g_out, j, m, DTYPE)
    if tl.min(tl.where(i < n, mass_a, 1.0), 0) == 0.0:  # without mass: from the final potentials of the others
        f = tl.where(mass_a > 0.0, f, reached(row_step(cost, min_i, min_j, i, g_out, b, n, m, inv, N, J)))
        tl.store(f_out + i, f, mask=i < n)
        tl.debug_barrier()
    if tl.min(tl.where(j < m, mass_b, 1.0), 0) == 0.0:
        g = tl.where(mass_b > 0.0, g, reached(column_step(cost, min_i, min_j, j, f_out, a, n, m, 0, n, inv, M, J)))
    shift = (tl.sum(mass_b * g, 0) - tl.sum(mass_a * f, 0)) * 0.5
    if one is not None:  # so that f = g to the bit, where nothing was taken out of the cost
        shift = tl.where(same, tl.sum(mass_b * apart(min_i, min_j, j, n, DTYPE), 0) * -0.5, shift)
    f, g = f + shift, g - shift
    tl.debug_barrier()
    tl.store(f_out + i, f, mask=i < n)
    tl.store(g_out + j, g, mask=j < m)
    tl.debug_barrier()
    row, by_cost = tl.zeros([N], DTYPE), tl.zeros([N], DTYPE)
    missed, by_g, taken = tl.zeros([J], DTYPE), tl.zeros([J], DTYPE), tl.zeros([J], DTYPE)
    for start in range(0, m, J):
        c = start + tl.arange(0, J)
        tile = stored_tile(cost, min_i, min_j, i, c, n, m, DTYPE)
        gc = vector(g_out, c, m, DTYPE)
        mass = vector(b, c, m, DTYPE)
        live = is_live(mass)
        mass = tl.where(live, mass, 0.0)
        k = kernel_tile(tile, f, gc, inv)
        share = k * mass[None, :]
        row += tl.sum(share, 1)
        by_cost += tl.sum(tl.where(share == 0.0, 0.0, share * tile), 1)  # not 0 * inf
        column = mass * tl.sum(k * mass_a[:, None], 0)
        missed += tl.abs(column - mass)
        by_g += known(column * gc, live)
        if min_i is not None:
            taken += known(column * vector(min_j, c, m, DTYPE), live)
    row *= mass_a
    total = tl.sum(known(row * f, mass_a > 0.0), 0) + tl.sum(by_g, 0)
    value = total - tl.full([], eps, DTYPE) * (tl.sum(row, 0) - 1.0)
    sharp = tl.sum(known(mass_a * by_cost, mass_a > 0.0), 0)
    if min_i is not None:
        both = tl.sum(known(row * vector(min_i, i, n, DTYPE), mass_a > 0.0), 0) + tl.sum(taken, 0)
        sharp += both
        value += both
    tl.store(cost_out + p, sharp)
    tl.store(value_out + p, value)
    tl.store(error_out + p, tl.sum(tl.abs(row - mass_a), 0) + tl.sum(missed, 0))
    tl.store(n_iter_out + p, n_iter.to(tl.int64))


@triton.jit
def without(x, root, size):
    """``x`` less its component along ``root``, whose squared length is ``size``."""
    return x - tl.sum(x * root, 0) / size * root


@jit(do_not_specialize=["n"])
def adjoint_small(
    cost, min_i, min_j, a, b, f, g, w, p_grad, q_grad, u_out, v_out, p_out, q_out, h_out, residual_out, soft,
    constant_out, n, m, eps: tl.float64, N: tl.constexpr, M: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Multipliers U, V and the weights p/rho, q/sigma of one problem; grid: problems.

    With penalties, of which ``soft`` (count, 2) is eps/rho, masses and potentials are those of ``relaxed.py``; a
    constant (count) is to be added to V and taken from U.
    """
    DTYPE: tl.constexpr = a.dtype.element_ty
    TARGET: tl.constexpr = 1e-24 if tl.float64 == DTYPE else 2.5e-13  # of squares
    NOISE: tl.constexpr = 1.8e-15 if tl.float64 == DTYPE else 9.6e-7  # eight roundings
    prob = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N)
    j = tl.arange(0, M)
    real_i, real_j = i < n, j < m
    step_eps = tl.full([], eps, DTYPE)
    mass_a = vector(a + prob * n, i, n, DTYPE)
    mass_b = vector(b + prob * m, j, m, DTYPE)
    live_a, live_b = is_live(mass_a), is_live(mass_b)
    mass_a, mass_b = tl.where(live_a, mass_a, 0.0), tl.where(live_b, mass_b, 0.0)
    pf = vector(f + prob * n, i, n, DTYPE)
    pg = vector(g + prob * m, j, m, DTYPE)
    weight = tl.load(w + prob)

    # Sums that hold C - f - g, a few columns at a time: registers have room for the one tile that stays.
    cost += prob * n * m
    if min_i is not None:
        min_i += prob * n
        min_j += prob * m
    v_out += prob * m
    h_out += prob * m
    inv = base2(eps, DTYPE)
    rho, by_cost = tl.zeros([N], DTYPE), tl.zeros([N], DTYPE)
    for start in range(0, m, J):
        c = start + tl.arange(0, J)
        tile = stored_tile(cost, min_i, min_j, i, c, n, m, DTYPE)
        gc = vector(g + prob * m, c, m, DTYPE)
        mass = vector(b + prob * m, c, m, DTYPE)
        mass = tl.where(is_live(mass), mass, 0.0)
        k = tl.where(real_i[:, None], kernel_tile(tile, pf, gc, inv), 0.0)
        rho += tl.sum(k * mass[None, :], 1)
        tl.store(v_out + c, tl.sum(k * mass_a[:, None], 0), mask=c < m)
        reduced = tl.where(k == 0.0, 0.0, tile - pf[:, None] - gc[None, :])  # not 0 * inf
        by_cost += tl.sum((k * mass[None, :]) * reduced, 1)  # in this order: k of a pair without mass is huge
        tl.store(h_out + c, tl.sum((k * mass_a[:, None]) * reduced, 0), mask=c < m)
    tl.debug_barrier()
    rho = tl.where(real_i, rho, 1.0)
    sigma = tl.where(real_j, vector(v_out, j, m, DTYPE), 1.0)
    h = weight * vector(h_out, j, m, DTYPE)
    tl.debug_barrier()
    by_rho, by_sigma = known(1.0 / rho, live_a), known(1.0 / sigma, live_b)
    grad_p = vector(p_grad + prob * n, i, n, DTYPE)
    grad_q = vector(q_grad + prob * m, j, m, DTYPE)
    tl.store(p_out + prob * n + i, grad_p * by_rho, mask=real_i)
    tl.store(q_out + prob * m + j, grad_q * by_sigma, mask=real_j)
    of_g = grad_q * tl.where(live_b, 1.0, by_sigma)
    by_p = step_eps * grad_p * tl.where(live_a, 1.0, by_rho)
    scale = tl.where(live_b, mass_b, tl.where(real_j, 1.0, 0.0))
    root = tl.where(live_b, tl.sqrt(sigma * scale), 0.0)
    rows = mass_a * rho
    k = kernel_tile(stored_tile(cost, min_i, min_j, i, j, n, m, DTYPE), pf, pg, inv)
    k = tl.where(real_i[:, None] & real_j[None, :], k, 0.0)
    y = known((weight * by_cost - step_eps * tl.sum(k * of_g[None, :], 1)) * by_rho, live_a)
    if soft is not None:
        soft_a, soft_b = tl.load(soft + 2 * prob), tl.load(soft + 2 * prob + 1)
        stiff_a, stiff_b = 1.0 + soft_a, 1.0 + soft_b
        of_plan = weight * tl.sum(known(mass_a * by_cost, live_a), 0)
        of_potentials = step_eps * (tl.sum(grad_q, 0) - stiff_a * tl.sum(grad_p, 0))
        gap = soft_a + soft_b + soft_a * soft_b  # stiff_a stiff_b - 1
        constant = (soft_a * of_plan + of_potentials) / (gap * tl.sum(rows, 0))
        y = y / stiff_a
    h = known((h - tl.sum(k * (mass_a * y + by_p)[:, None], 0)) * scale, live_b)
    if soft is not None:
        h = h / stiff_b
    stretch = tl.where(root > 0.0, root, 1.0)
    # M S^-1/2, or M in a column without mass. Pairs of two points without mass are not needed, nor need they be finite.
    k = tl.where(live_a[:, None] | live_b[None, :], k * by_rho[:, None] * (scale / stretch)[None, :], 0.0)
    size = tl.sum(root * root, 0)
    res = without(tl.where(root > 0.0, h / stretch, 0.0), root, size)
    if soft is not None:  # once more: what rounding leaves along root is never reduced, and z would grow along it
        res = without(res, root, size)
    unit = tl.max(tl.abs(res), 0)  # of which there may be no square
    unit = tl.where(unit > 0.0, unit, 1.0)
    res = res / unit
    start = tl.sum(res * res, 0)
    y_units = tl.where(live_a, y / unit, 0.0)
    terms = tl.sum(rows * y_units * y_units, 0)
    pull = rows if soft is None else rows / (stiff_a * stiff_b)
    solved = start <= NOISE * NOISE * terms  # h is the rounding of terms that cancel
    norm, least = start, start
    z = tl.zeros([M], DTYPE)
    # What the loop does not need, and the best z so far, stay in memory.
    u_out += prob * n
    tl.store(u_out + i, y, mask=real_i)
    tl.store(v_out + j, z, mask=real_j)
    tl.store(h_out + j, h, mask=real_j)
    tl.debug_barrier()
    direction = res
    step = 0
    last = 0
    cap = tl.minimum(10 * (n + m), 2000)
    go = (start > 0.0) & (start == start) & (solved == 0)
    while go:
        product = tl.sum(k * direction[None, :], 1)
        work = direction - tl.where(root > 0.0, tl.sum(k * (pull * product)[:, None], 0), 0.0)
        work = without(work, root, size)
        curvature = tl.sum(direction * work, 0)
        length = tl.where(curvature > 0.0, norm / curvature, 0.0)
        z += length * direction
        res -= length * work
        following = tl.sum(res * res, 0)
        direction = res + following / norm * direction
        norm = following
        better = norm < least
        if better:
            tl.store(v_out + j, z, mask=real_j)
        least = tl.where(better, norm, least)
        last = tl.where(better, step, last)
        step += 1
        go = (curvature > 0.0) & (norm > TARGET * start) & (step < cap) & (step - last < 60)

    tl.debug_barrier()
    z = vector(v_out, j, m, DTYPE) * unit
    if soft is not None:  # else it is a matter of the gauge
        z = without(z, root, size)
    tl.debug_barrier()
    product = tl.sum(k * z[None, :], 1)
    stretch = tl.where(root > 0.0, root, 1.0)
    work = vector(h_out, j, m, DTYPE) / stretch + tl.sum(k * (pull * product)[:, None], 0)
    left_over = without(tl.where(root > 0.0, (work - z) / unit, 0.0), root, size)
    columns = tl.sum(k * rows[:, None], 0)  # S of a column without mass
    v = tl.where(root > 0.0, z / stretch, tl.where(columns > 0.0, work / tl.where(columns > 0.0, columns, 1.0), 0.0))
    residual = tl.where(solved, 0.0, tl.sqrt(tl.sum(left_over * left_over, 0) / tl.where(start > 0.0, start, 1.0)))
    if soft is not None:  # what the constant does, but for itself
        v -= tl.where(root > 0.0, 0.0, constant * gap / (stiff_a * stiff_b))
        product = (product - soft_a * constant) / stiff_a
        tl.store(constant_out + prob, constant)
    tl.store(u_out + i, known(vector(u_out, i, n, DTYPE) - product, live_a), mask=real_i)
    tl.store(v_out + j, known(v, live_b), mask=real_j)
    tl.store(residual_out + prob, residual)
