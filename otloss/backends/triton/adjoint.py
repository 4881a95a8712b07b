r"""Conjugate gradients for the adjoint of problems that do not fit one program.

With R = C - f - g, k = exp(-R/eps), rho = k b, sigma = k' a, c_j = b_j (1 where b_j = 0), A = a rho, S = c sigma
and an upstream w (transport cost), p (f), q (g), which where there is no mass stand for p/rho and q/sigma:

.. math:: y = (w\, (k \circ R) b - \varepsilon\, k q) / \rho, \qquad
          h = c \circ \big(w\, (k \circ R)^\top a - k^\top (a \circ y + \varepsilon p)\big), \qquad
          (S - M^\top A M) V = h, \quad M = k D_c / \rho,

solved as (I - L'L) z = S^-1/2 h, L = A^1/2 M S^-1/2, in the complement of the null vector S^1/2; then U = y - M V
and, in a column without mass, V_j = (h + M' A M V)_j / S_j. Nothing is divided by a mass. The product k' (a/rho) k
(c v) is one pass of ``rows.normal_rows`` or two of ``stream.sums``; ``descend`` is the rest of a step, by one
program per problem: five reads and four writes of m numbers, microseconds.

With penalties a, b, f, g stand for the masses with a tilde and the capital potentials of ``relaxed.py``. Let
s = eps/rho and m = 1 + s. Then y is divided by m_a, h by m_b, L'L by m_a m_b, and U = y - M V / m_a. The system is
definite, but nearly singular where rho is large: S^1/2 is still an eigenvector, with eigenvalue 1 - 1/(m_a m_b). So the
rest is solved in its complement, as above. The part along it adds a constant c to V and takes c / m_a from U:

.. math:: c = \frac{s_a w \langle T, R \rangle + \varepsilon (\sum q - m_a \sum p)}{(s_a + s_b + s_a s_b) \sum T}.

No terms cancel in it. It grows with rho, while the gradient of the cost takes U + V alone. So the kernels and
``gradient.multipliers`` give U + c, V - c and c.
"""

# mypy: ignore-errors
import triton.language as tl

from otloss.backends.triton.compat import jit
from otloss.backends.triton.tiles import vector


@jit(do_not_specialize=["parts", "count", "m", "cap"])
def descend(
    share, parts, scale, root, work, z, res, direction, best, alpha, state, running, count, m, cap, J: tl.constexpr
):
    """One step, given the parts of k' (a/rho) k alpha with alpha = scale direction; grid: problems.

    ``scale`` is c / sqrt(S) (0 without mass) and ``state`` (count, 5) holds |res|^2, its least value, its first, the
    step and the step of the least. J is not below the number of threads: an entry that two threads held could be
    stored by one before the other has read it.
    """
    DTYPE: tl.constexpr = z.dtype.element_ty
    TARGET: tl.constexpr = 1e-24 if tl.float64 == DTYPE else 2.5e-13  # of squares
    p = tl.program_id(0).to(tl.int64)
    if tl.load(running + p) == 0:
        return
    work += p * m
    z += p * m
    res += p * m
    direction += p * m
    best += p * m
    alpha += p * m
    root += p * m
    scale += p * m
    along = tl.zeros([J], DTYPE)
    size = tl.zeros([J], DTYPE)
    curved = tl.zeros([J], DTYPE)
    tilt = tl.zeros([J], DTYPE)
    for start in range(0, m, J):
        j = start + tl.arange(0, J)
        total = tl.zeros([J], DTYPE)
        for s in range(parts):
            total += vector(share + (tl.cast(s, tl.int64) * count + p) * m, j, m, DTYPE)
        ahead = vector(direction, j, m, DTYPE)
        product = ahead - vector(scale, j, m, DTYPE) * total
        tl.store(work + j, product, mask=j < m)
        null = vector(root, j, m, DTYPE)
        along += product * null
        size += null * null
        curved += product * ahead
        tilt += null * ahead
    drift = tl.sum(along, 0) / tl.sum(size, 0)  # rounding leaves the complement of the null vector
    curvature = tl.sum(curved, 0) - drift * tl.sum(tilt, 0)
    norm = tl.load(state + p * 5)
    least = tl.load(state + p * 5 + 1)
    step = tl.load(state + p * 5 + 3)
    last = tl.load(state + p * 5 + 4)
    length = tl.where(curvature > 0.0, norm / curvature, 0.0)
    tl.debug_barrier()
    square = tl.zeros([J], DTYPE)
    for start in range(0, m, J):
        j = start + tl.arange(0, J)
        product = vector(work, j, m, DTYPE) - drift * vector(root, j, m, DTYPE)
        left = vector(res, j, m, DTYPE) - length * product
        square += left * left
        tl.store(res + j, left, mask=j < m)
        tl.store(z + j, vector(z, j, m, DTYPE) + length * vector(direction, j, m, DTYPE), mask=j < m)
    following = tl.sum(square, 0)
    better = following < least
    turn = following / norm
    tl.debug_barrier()
    for start in range(0, m, J):
        j = start + tl.arange(0, J)
        ahead = vector(res, j, m, DTYPE) + turn * vector(direction, j, m, DTYPE)
        tl.store(direction + j, ahead, mask=j < m)
        tl.store(alpha + j, vector(scale, j, m, DTYPE) * ahead, mask=j < m)
        tl.store(best + j, tl.where(better, vector(z, j, m, DTYPE), vector(best, j, m, DTYPE)), mask=j < m)
    last = tl.where(better, step, last)
    tl.store(state + p * 5, following)
    tl.store(state + p * 5 + 1, tl.where(better, following, least))
    tl.store(state + p * 5 + 3, step + 1.0)
    tl.store(state + p * 5 + 4, last)
    first = tl.load(state + p * 5 + 2)
    go = (curvature > 0.0) & (following > TARGET * first) & (step + 1.0 < cap) & (step + 1.0 - last < 60.0)
    if go == 0:
        tl.store(running + p, 0)
