r"""Penalties on the marginals: how they become constraints, the solver of small problems, the constant of large ones.

For the problem of ``otloss/backends/relaxed.py`` let :math:`s = \varepsilon / \rho`, which is 0 for a constraint, and

.. math:: F = (1 + s_a) f, \quad \tilde a = a\, e^{-f/\rho_a}, \quad G = (1 + s_b) g, \quad
          \tilde b = b\, e^{-g/\rho_b}, \qquad
          T_{ij} = a_i b_j e^{(f_i + g_j - C_{ij})/\varepsilon}
          = \tilde a_i \tilde b_j e^{(F_i + G_j - C_{ij})/\varepsilon}.

The plan has the form of a problem with constraints, whose masses are the marginals that the potentials ask for. Outputs
and gradients are computed in this form, by what serves constraints (``penalties.py``). The mass of a point that is too
far to be reached vanishes in it. Such a point is treated as one without mass, and nothing is divided by its share of
the plan.

An iteration takes the half-steps of constraints divided by 1 + s. Then it adds the constant t to f and takes it from g
that makes the totals of both asked marginals equal. In the medium and large regimes f and g wait without it while the
column's half-step is taken: ``rows.py`` and ``stream.py`` have those branches.

Small problems. The kernel stays in registers in the form above, made of the potentials of the last iteration in the
log-domain. With scalings phi and psi, which start at 1, an iteration is

.. math:: \phi_i = \Big(\sum_j k_{ij} \tilde b_j \psi_j\Big)^{-1/(1 + s_a)}, \qquad
          \psi_j = \Big(\sum_i \tilde a_i \phi_i k_{ij}\Big)^{-1/(1 + s_b)},

and the constant multiplies phi and divides psi. It takes four exponentials and a logarithm per row and column, none per
entry. Where a scaling leaves 2^-26 .. 2^26 (2^-132 .. 2^132 in float64), or a point's asked mass vanishes, the
iteration is done in the log-domain. Roofline: as ``small.py``; these and the two totals add about as much again to the
latency of an iteration.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from otloss.backends.triton.compat import jit
from otloss.backends.triton.mixed import are_same, meet, mix_columns, mix_small
from otloss.backends.triton.small import SCALED, begin
from otloss.backends.triton.tiles import (
    add_splits,
    base2,
    column_step,
    is_live,
    kernel_tile,
    known,
    log2_all_asked,
    log2_asked,
    log2_total,
    row_step,
    slope,
    stored_tile,
    vector,
)


@triton.jit
def asked_mass(mass, f, i, n, rate, DTYPE: tl.constexpr):
    """a exp(-f/rho), rate = log2(e)/rho; 0 where that is no mass."""
    asked = tl.exp2(log2_asked(mass, f, i, n, rate, DTYPE))
    return tl.where(is_live(asked), asked, 0.0)


@triton.jit
def marginal_value(mass, asked, f, ratio, soft, eps):
    r"""A point's part of <T1, f> + rho KL(T1 | a), whose marginal T1 is ``ratio`` times the one asked for; in float64.

    That is rho (a (1 - e^(-f/rho)) + asked KL(ratio | 1)), where no terms of size rho cancel; of a constraint <T1, f>.
    """
    soft = soft.to(tl.float64)
    rho = tl.full([], eps, tl.float64) / tl.where(soft > 0.0, soft, 1.0)
    lost, ratio, asked = slope(f, soft, eps), ratio.to(tl.float64), asked.to(tl.float64)
    excess = ratio * tl.log2(tl.where(ratio > 0.0, ratio, 1.0)) * 0.6931471805599453 - (ratio - 1.0)
    part = tl.where(soft > 0.0, mass.to(tl.float64) * lost + rho * asked * excess, asked * ratio * lost)
    return tl.where(is_live(mass), part, 0.0)


@jit(do_not_specialize=["n", "max_iter", "width"])
def relax_small(
    cost, soft, a, b, start, one, other, f_out, g_out, cost_out, value_out, n_iter_out, error_out, n, m, width,
    eps: tl.float64, tol: tl.float64, max_iter, N: tl.constexpr, M: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """All iterations and all outputs of one problem; grid: problems.

    ``soft`` (count, 2) is eps/rho of both sides. If the problem may be that of a set with itself, ``one`` and ``other``
    are what ``are_same`` compares, else None.
    """
    DTYPE: tl.constexpr = a.dtype.element_ty
    LIMIT: tl.constexpr = 132.0 if tl.float64 == DTYPE else 26.0
    p = tl.program_id(0).to(tl.int64)
    cost += p * n * m
    a += p * n
    b += p * m
    f_out += p * n
    g_out += p * m
    i = tl.arange(0, N)
    j = tl.arange(0, M)
    inv = base2(eps, DTYPE)
    bound = tl.full([], tol, DTYPE)
    soft_a, soft_b = tl.load(soft + 2 * p), tl.load(soft + 2 * p + 1)
    stiff_a, stiff_b = 1.0 + soft_a, 1.0 + soft_b
    rate_a, rate_b = soft_a * inv, soft_b * inv

    given_a, given_b = vector(a, i, n, DTYPE), vector(b, j, m, DTYPE)
    live_a, live_b = is_live(given_a), is_live(given_b)
    given_a, given_b = tl.where(live_a, given_a, 0.0), tl.where(live_b, given_b, 0.0)
    tl.store(f_out + i, tl.zeros([N], DTYPE), mask=i < n)
    tl.store(g_out + j, tl.zeros([M], DTYPE), mask=j < m)
    tl.debug_barrier()
    if start is not None:
        begin(start + p * m, cost, None, None, given_a, given_b, b, g_out, soft_a, soft_b, n, m, eps, inv, N, M, J)
    n_iter = 0
    go = n_iter < max_iter
    if one is not None:
        one += p * n * width
        if other is not None:
            other += p * n * width
        same = (soft_a == soft_b) & are_same(one, other, a, b, 0, n, n, width, 16, 128)
        if same:
            n_iter, go = mix_small(cost, None, None, a, b, f_out, g_out, live_b, soft_b, n, inv, bound, max_iter, N, J)
    while go:  # an iteration in the log-domain, from the potentials in memory
        f = known(row_step(cost, None, None, i, g_out, b, n, m, inv, N, J), live_a) / stiff_a
        tl.store(f_out + i, f, mask=i < n)
        tl.debug_barrier()
        g = known(column_step(cost, None, None, j, f_out, a, n, m, 0, n, inv, M, J), live_b) / stiff_b
        tl.debug_barrier()  # every warp has read the old g
        tl.store(g_out + j, g, mask=j < m)
        tl.debug_barrier()
        of_a = log2_asked(a, f_out, i, n, rate_a, DTYPE)
        of_b = log2_asked(b, g_out, j, m, rate_b, DTYPE)
        all_a, all_b = log2_total(of_a), log2_total(of_b)
        shift = (all_a - all_b) / (rate_a + rate_b)
        missed = tl.abs(tl.exp2(all_b) - tl.exp2(all_b + shift * rate_b))  # what the shift changes of the columns
        f, g = f + shift, g - shift
        tl.debug_barrier()
        tl.store(f_out + i, f, mask=i < n)
        tl.store(g_out + j, g, mask=j < m)
        tl.debug_barrier()
        mass_a = asked_mass(a, f_out, i, n, rate_a, DTYPE)
        mass_b = asked_mass(b, g_out, j, m, rate_b, DTYPE)
        near_a, near_b = tl.min(tl.where(live_a, mass_a, 1.0), 0), tl.min(tl.where(live_b, mass_b, 1.0), 0)
        near = (near_a > 0.0) & (near_b > 0.0)
        k = kernel_tile(stored_tile(cost, None, None, i, j, n, m, DTYPE), f * stiff_a, g * stiff_b, inv)
        row, column = tl.zeros([N], DTYPE), tl.zeros([M], DTYPE)  # log2 of the scalings
        n_iter += 1
        safe = True
        for _ in range(SCALED):  # iterations that scale k, which stays
            if safe:
                s = tl.sum(k * (mass_b * tl.exp2(column))[None, :], 1)
                rows = mass_a * tl.exp2(row) * s
                error = tl.sum(tl.abs(rows - mass_a * tl.exp2(-soft_a * row)), 0) + missed - bound * tl.sum(rows, 0)
                go = (error >= 0.0) & (n_iter < max_iter)  # NaN stops
                log_s = tl.where(mass_a > 0.0, tl.log2(s), 0.0)
                next_row = -log_s / stiff_a
                t = tl.sum(k * (mass_a * tl.exp2(next_row))[:, None], 0)
                log_t = tl.where(mass_b > 0.0, tl.log2(t), 0.0)
                next_column = -log_t / stiff_b
                total_a = tl.log2(tl.sum(mass_a * tl.exp2(-soft_a * next_row), 0))
                total_b = tl.log2(tl.sum(mass_b * tl.exp2(-soft_b * next_column), 0))
                lift = (total_a - total_b) / (soft_a + soft_b)
                next_row, next_column = next_row + lift, next_column - lift
                spread = tl.maximum(
                    tl.max(tl.maximum(tl.abs(log_s), tl.abs(next_row)), 0),
                    tl.max(tl.maximum(tl.abs(log_t), tl.abs(next_column)), 0),
                )
                safe = go & near & (spread <= LIMIT)
                row = tl.where(safe, next_row, row)
                column = tl.where(safe, next_column, column)
                missed = tl.where(safe, tl.abs(tl.exp2(total_b) - tl.exp2(total_b + lift * soft_b)), missed)
                n_iter += safe.to(tl.int32)
        f = vector(f_out, i, n, DTYPE) + row / inv
        g = vector(g_out, j, m, DTYPE) + column / inv
        tl.debug_barrier()
        tl.store(f_out + i, f, mask=i < n)
        tl.store(g_out + j, g, mask=j < m)
        tl.debug_barrier()

    if one is not None:  # noqa: SIM102 (known when compiling)
        if same:
            meet(f_out, g_out, None, None, n, N)
    f, g = vector(f_out, i, n, DTYPE), vector(g_out, j, m, DTYPE)
    if tl.min(tl.where(i < n, given_a, 1.0), 0) == 0.0:  # without mass: from the final potentials of the others
        f = known(tl.where(live_a, f, row_step(cost, None, None, i, g_out, b, n, m, inv, N, J) / stiff_a), live_a)
        tl.debug_barrier()
        tl.store(f_out + i, f, mask=i < n)
        tl.debug_barrier()
    if tl.min(tl.where(j < m, given_b, 1.0), 0) == 0.0:
        back = column_step(cost, None, None, j, f_out, a, n, m, 0, n, inv, M, J) / stiff_b
        g = known(tl.where(live_b, g, back), live_b)
        tl.debug_barrier()
        tl.store(g_out + j, g, mask=j < m)
        tl.debug_barrier()
    asked = asked_mass(a, f_out, i, n, rate_a, DTYPE)
    ratio, by_cost = tl.zeros([N], DTYPE), tl.zeros([N], DTYPE)
    off, of_columns = tl.zeros([J], DTYPE), tl.zeros([J], tl.float64)
    for start in range(0, m, J):
        c = start + tl.arange(0, J)
        tile = stored_tile(cost, None, None, i, c, n, m, DTYPE)
        gc = vector(g_out, c, m, DTYPE)
        wanted = asked_mass(b, g_out, c, m, rate_b, DTYPE)
        k = kernel_tile(tile, f * stiff_a, gc * stiff_b, inv)
        share = k * wanted[None, :]
        ratio += tl.sum(share, 1)
        by_cost += tl.sum(tl.where(share == 0.0, 0.0, share * tile), 1)  # not 0 * inf
        of_column = tl.sum(k * asked[:, None], 0)
        off += tl.abs(wanted * of_column - wanted)
        of_columns += marginal_value(vector(b, c, m, DTYPE), wanted, gc, of_column, soft_b, eps)
    rows = asked * ratio
    total = tl.sum(rows, 0)
    free = total - tl.sum(given_a, 0) * tl.sum(given_b, 0)
    value = tl.sum(marginal_value(given_a, asked, f, ratio, soft_a, eps), 0) + tl.sum(of_columns, 0)
    value -= tl.full([], eps, tl.float64) * free.to(tl.float64)
    error = tl.sum(tl.abs(rows - asked), 0) + tl.sum(off, 0)
    tl.store(cost_out + p, tl.sum(known(asked * by_cost, asked > 0.0), 0))
    tl.store(value_out + p, value.to(DTYPE))
    tl.store(error_out + p, error / tl.where(is_live(total), total, 1.0))
    tl.store(n_iter_out + p, n_iter.to(tl.int64))


@jit(do_not_specialize=["count", "n", "m", "max_iter", "splits"])
def balance(
    part, f, g, a, b, soft, running, missed, mix, n_iter, count, n, m, eps: tl.float64, tol: tl.float64, max_iter,
    splits, I: tl.constexpr,
):  # fmt: skip
    """Ends an iteration: g from the parts of its half-step, then the constant between f and g. Grid: problems.

    ``missed`` (count) is what the constant changes of the marginals of the columns. ``mix`` says which problems take
    mixed steps in place of that (``mixed.py``); None if none may.
    """
    DTYPE: tl.constexpr = a.dtype.element_ty
    p = tl.program_id(0).to(tl.int64)
    if tl.load(running + p) == 0:
        return
    inv = base2(eps, DTYPE)
    soft_a, soft_b = tl.load(soft + 2 * p), tl.load(soft + 2 * p + 1)
    rate_a, rate_b = soft_a * inv, soft_b * inv
    f += p * n
    g += p * m
    if mix is not None:  # noqa: SIM102 (known when compiling)
        if tl.load(mix + p) >= 0.0:
            done = tl.load(n_iter + p)
            mix_columns(
                part, f, g, b + p * m, None, None, soft_b, mix, running, done, p, count, m, inv, tol, max_iter, splits,
                I,
            )  # fmt: skip
            return
    for start in range(0, m, I):
        j = start + tl.arange(0, I)
        tl.store(g + j, add_splits(part, p, j, m, count, splits, inv) / (1.0 + soft_b), mask=j < m)
    tl.debug_barrier()
    all_a = log2_all_asked(a + p * n, f, 0, n, rate_a, I)
    all_b = log2_all_asked(b + p * m, g, 0, m, rate_b, I)
    shift = (all_a - all_b) / (rate_a + rate_b)
    tl.debug_barrier()  # every warp has read what others will write
    for start in range(0, n, I):
        i = start + tl.arange(0, I)
        tl.store(f + i, vector(f, i, n, DTYPE) + shift, mask=i < n)
    for start in range(0, m, I):
        j = start + tl.arange(0, I)
        tl.store(g + j, vector(g, j, m, DTYPE) - shift, mask=j < m)
    tl.store(missed + p, tl.abs(tl.exp2(all_b) - tl.exp2(all_b + shift * rate_b)))
