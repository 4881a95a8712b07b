r"""Small problems (n, m up to 128): one program per problem, the cost in registers, every iteration in one launch.

Solve. With the cost C in registers, an iteration is one half-step of the rows, whose exponentials
E_ij/s_i = b_j exp((f_i + g_j - C_ij)/eps) give the columns as well,

    t_j = sum_i a_i E_ij / s_i,        g_j <- g_j - eps log(t_j / b_j),

so there is one exponential per entry and iteration, rows are exact at every eps (their maximum is taken out), and
nothing is ever absorbed or rebuilt. Where some t_j underflows (small eps, early iterations) the columns take their
half-step in the log-domain, from the same registers. The next row half-step shows the error of the state before it;
each program stops by itself.

Adjoint. The row-normalised kernel is kept in registers and conjugate gradients (``adjoint.py`` has the equations) take
one product with it and one with its transpose per step, no exponential.

Roofline, padded to N x M = 64 x 64 (49 tokens): per iteration 4096 exponentials at 16 per clock and SM, 256 clocks, and
about 10 operations per entry at 128 per clock, 320 clocks; 50 iterations are 29k clocks, 17 us at 1.7 GHz (H100), 21 us at
1.4 GHz (A100), for as many problems as fit the SMs at once (two to four per SM). At 128 x 128 four times that. Bytes: the
inputs once. Launches: one, and one per side to normalise features.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from otloss.backends.gpu.tiles import (
    base2,
    column_step,
    cost_tile,
    is_live,
    kernel_tile,
    log2_mass,
    row_error,
    row_step,
    vector,
)


@triton.jit
def solve_small(
    left, right, a, b, f_out, g_out, cost_out, value_out, n_iter_out, error_out, n, m, d,
    eps: tl.float64, tol: tl.float64, max_iter, N: tl.constexpr, M: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """All iterations and all outputs of one problem; grid: problems."""
    DTYPE: tl.constexpr = a.dtype.element_ty
    TINY: tl.constexpr = 1e-200 if DTYPE == tl.float64 else 1e-25
    p = tl.program_id(0).to(tl.int64)
    if right is None:
        left += p * n * m
    else:
        left += p * n * d
        right += p * m * d
    i = tl.arange(0, N)
    j = tl.arange(0, M)
    inv = base2(eps, DTYPE)
    cost = cost_tile(left, right, i, j, n, m, d, m, 1, N, M, K, DOT, DTYPE)
    mass_a = vector(a + p * n, i, n, DTYPE)
    mass_b = vector(b + p * m, j, m, DTYPE)
    live_a, live_b = is_live(mass_a), is_live(mass_b)
    mass_a, mass_b = tl.where(live_a, mass_a, 0.0), tl.where(live_b, mass_b, 0.0)
    la, lb = log2_mass(mass_a), log2_mass(mass_b)

    f = tl.zeros([N], DTYPE)
    g = tl.zeros([M], DTYPE)
    f_next, e, s = row_step(cost, g, lb, inv)
    error = tl.sum(row_error(mass_a, f, f_next, inv), 0)
    go = max_iter > 0
    n_iter = 0
    while go:
        f = f_next
        t = tl.sum(e * (mass_a / s)[:, None], 0)
        if tl.min(tl.where(live_b, t, 1.0), 0) < TINY:
            g = column_step(cost, f, la, inv)
        else:
            g -= tl.where(live_b, tl.log2(tl.where(live_b, t, 1.0)) - tl.where(live_b, lb, 0.0), 0.0) / inv
        n_iter += 1
        f_next, e, s = row_step(cost, g, lb, inv)
        error = tl.sum(row_error(mass_a, f, f_next, inv), 0)
        go = (n_iter < max_iter) & (error >= tol)  # NaN stops

    f = tl.where(live_a, f, f_next)
    g = tl.where(live_b, g, column_step(cost, f, la, inv))
    shift = (tl.sum(mass_b * g, 0) - tl.sum(mass_a * f, 0)) * 0.5
    f, g = f + shift, g - shift
    k = kernel_tile(cost, f, g, inv) * mass_b[None, :]
    row = tl.sum(k, 1)
    sharp = tl.sum(mass_a * tl.sum(k * cost, 1), 0)
    potential = tl.sum(mass_a * (f * row + tl.sum(k * g[None, :], 1)), 0)
    value = potential - tl.full([], eps, DTYPE) * (tl.sum(mass_a * row, 0) - 1.0)
    tl.store(f_out + p * n + i, f, mask=i < n)
    tl.store(g_out + p * m + j, g, mask=j < m)
    tl.store(cost_out + p, sharp)
    tl.store(value_out + p, value)
    tl.store(error_out + p, error)
    tl.store(n_iter_out + p, n_iter.to(tl.int64))


@triton.jit
def without(x, root, size):
    """``x`` less its component along ``root``, whose squared length is ``size``."""
    return x - tl.sum(x * root, 0) / size * root


@triton.jit
def adjoint_small(
    left, right, a, b, f, g, w, p_grad, q_grad, u_out, v_out, p_out, q_out, residual_out, n, m, d, eps: tl.float64,
    N: tl.constexpr, M: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Multipliers U, V and the weights p/rho, q/sigma of one problem; grid: problems."""
    DTYPE: tl.constexpr = a.dtype.element_ty
    TARGET: tl.constexpr = 1e-24 if DTYPE == tl.float64 else 2.5e-13  # of squares
    NOISE: tl.constexpr = 1.8e-15 if DTYPE == tl.float64 else 9.6e-7  # eight roundings
    prob = tl.program_id(0).to(tl.int64)
    if right is None:
        left += prob * n * m
    else:
        left += prob * n * d
        right += prob * m * d
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
    grad_p = vector(p_grad + prob * n, i, n, DTYPE)
    grad_q = vector(q_grad + prob * m, j, m, DTYPE)
    weight = tl.load(w + prob)

    cost = cost_tile(left, right, i, j, n, m, d, m, 1, N, M, K, DOT, DTYPE)
    k = tl.where(real_i[:, None] & real_j[None, :], kernel_tile(cost, pf, pg, base2(eps, DTYPE)), 0.0)
    reduced = cost - pf[:, None] - pg[None, :]
    rho = tl.where(real_i, tl.sum(k * mass_b[None, :], 1), 1.0)
    sigma = tl.where(real_j, tl.sum(k * mass_a[:, None], 0), 1.0)
    y = (weight * tl.sum(k * mass_b[None, :] * reduced, 1) - step_eps * tl.sum(k * grad_q[None, :], 1)) / rho
    scale = tl.where(live_b, mass_b, tl.where(real_j, 1.0, 0.0))
    pull = mass_a[:, None] * (weight * reduced - y[:, None]) - (step_eps * grad_p)[:, None]
    h = scale * tl.sum(k * pull, 0)
    k = k * (1.0 / rho)[:, None] * scale[None, :]
    rows = mass_a * rho
    columns = sigma * scale

    root = tl.where(live_b, tl.sqrt(columns), 0.0)
    unroot = tl.where(root > 0.0, 1.0 / tl.where(root > 0.0, root, 1.0), 0.0)
    size = tl.sum(root * root, 0)
    res = without(h * unroot, root, size)
    start = tl.sum(res * res, 0)
    solved = start <= NOISE * NOISE * tl.sum(rows * y * y, 0)  # h is the rounding of terms that cancel
    norm, least = start, start
    z = tl.zeros([M], DTYPE)
    best = tl.zeros([M], DTYPE)
    direction = res
    step = 0
    last = 0
    cap = tl.minimum(10 * (n + m), 2000)
    go = (start > 0.0) & (start == start) & (solved == 0)
    while go:
        product = tl.sum(k * (unroot * direction)[None, :], 1)
        work = direction - unroot * tl.sum(k * (rows * product)[:, None], 0)
        work = without(work, root, size)
        curvature = tl.sum(direction * work, 0)
        length = tl.where(curvature > 0.0, norm / curvature, 0.0)
        z += length * direction
        res -= length * work
        following = tl.sum(res * res, 0)
        direction = res + following / norm * direction
        norm = following
        better = norm < least
        best = tl.where(better, z, best)
        least = tl.where(better, norm, least)
        last = tl.where(better, step, last)
        step += 1
        go = (curvature > 0.0) & (norm > TARGET * start) & (step < cap) & (step - last < 60)

    v = unroot * best
    product = tl.sum(k * v[None, :], 1)
    work = tl.sum(k * (rows * product)[:, None], 0)
    left_over = without((h + work - columns * v) * unroot, root, size)
    v = tl.where(live_b, v, tl.where(columns > 0.0, (h + work) / tl.where(columns > 0.0, columns, 1.0), 0.0))
    residual = tl.where(solved, 0.0, tl.sqrt(tl.sum(left_over * left_over, 0) / tl.where(start > 0.0, start, 1.0)))
    tl.store(u_out + prob * n + i, y - product, mask=real_i)
    tl.store(v_out + prob * m + j, v, mask=real_j)
    tl.store(p_out + prob * n + i, grad_p / rho, mask=real_i)
    tl.store(q_out + prob * m + j, grad_q / sigma, mask=real_j)
    tl.store(residual_out + prob, residual)
