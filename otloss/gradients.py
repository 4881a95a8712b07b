r"""Where gradients are derived; every backend uses this.

With :math:`T_{ij} = a_i b_j k_{ij}`, :math:`k_{ij} = \exp((f_i + g_j - C_{ij})/\varepsilon)`, :math:`T1 = a`,
:math:`T^\top 1 = b`, let a loss have the gradients :math:`w` by :math:`\langle T, C\rangle`, :math:`w_V` by the value,
:math:`p` by f and :math:`q` by g. Let :math:`R = C - f \oplus g` (the *reduced* cost: in float32 the differences of
numbers of size C would drown the answer), :math:`P = T / T1` by rows and :math:`Q` by columns.

*implicit*: differentiating the two marginal equations at the solution gives multipliers U, V with

.. math::
    \begin{bmatrix} D_a & T \\ T^\top & D_b \end{bmatrix} \begin{bmatrix} U \\ V \end{bmatrix} =
    \begin{bmatrix} w (R \circ T) 1 - \varepsilon\, a \circ k q \\
    w (R \circ T)^\top 1 - \varepsilon\, b \circ k^\top p \end{bmatrix}

    \partial C = T \circ \big[(U \oplus V - w R)/\varepsilon + w + w_V\big] + p \circ P + Q \circ q, \qquad
    \partial a = U + (w + w_V) f, \quad \partial b = V + (w + w_V) g,

where D holds the realised marginals and U is evaluated as :math:`P(wR - V) - \varepsilon k q`, which never divides by
a mass and so is right where there is none. The value alone needs no system: its gradients are T, f, g. The constant
between f and g is fixed by <a, f> = <b, g>, and its derivative by a and b is added here. Functions of the plan reach
this through f, g, a and b, of which the plan is an explicit function. The backend takes the gradients by a and b back
to the masses as they were given.

*unroll* differentiates the iterations that were run. *none* takes T as a constant: ∂C = w T.

Source: Luise et al. 2018 (arXiv 1805.11897) for the sharp cost; Cuturi et al. 2022 (2201.12324) for the system.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from otloss.backends import get_backend
from otloss.backends.protocol import Given, Gradients, Problem, Shift, Upstream, is_relaxed

MODES = ("implicit", "unroll", "none")


class State(NamedTuple):
    """What a solve leaves for the gradient. Empty tensors stand for what there is not."""

    f: Tensor
    g: Tensor
    n_iter: Tensor
    row_shift: Tensor
    column_shift: Tensor
    kept: Tensor
    """The cost of features ``(B, n, m)``, if the backend has kept it."""
    a: Tensor
    """The masses of total 1."""
    b: Tensor


class Incoming(NamedTuple):
    """Gradients of the loss by the outputs: by those of a solve, see `Upstream`, and by the masses of total 1."""

    transport_cost: Tensor | None
    value: Tensor | None
    f: Tensor | None
    g: Tensor | None
    a: Tensor | None
    b: Tensor | None


def derive(
    problem: Problem,
    given: Given,
    state: State,
    incoming: Incoming,
    need_cost: bool,
    longest: int,
    mode: str,
    backend: str,
) -> tuple[Gradients, Tensor | None]:
    """The gradients by a problem's left and right and by its masses as given, and the adjoint's residual, if any.

    Everything is made of differentiable operations if the backend's functions are. ``longest`` is a bound on n_iter.
    """
    module = get_backend(backend)
    solved = problem.with_masses(state.a, state.b)
    upstream = Upstream(incoming.transport_cost, incoming.value, incoming.f, incoming.g)
    residual = None
    if mode == "unroll":
        by = module.unrolled_gradient(solved, state.n_iter, upstream, need_cost, longest)
    else:
        slope = None
        if not is_relaxed(problem) and (upstream.f is not None or upstream.g is not None):
            p, q, slope = _project(upstream.f, upstream.g, solved.a, solved.b, state.f, state.g)
            upstream = Upstream(upstream.cost, upstream.value, p, q)
        adjoint = mode == "implicit" and any(grad is not None for grad in (upstream.cost, upstream.f, upstream.g))
        kept = state.kept if state.kept.numel() else None
        shift = Shift(state.row_shift, state.column_shift) if problem.right is None else None
        by, residual = module.implicit_gradient(solved, state.f, state.g, upstream, adjoint, need_cost, kept, shift)
        if slope is not None:
            by = Gradients(by.left, by.right, by.a - slope * state.f / 2, by.b + slope * state.g / 2)
    by_a = by.a if incoming.a is None else by.a + incoming.a
    by_b = by.b if incoming.b is None else by.b + incoming.b
    by_a, by_b = module.by_given(problem, given, state.a, state.b, by_a, by_b)
    return Gradients(by.left, by.right, by_a, by_b, by.rho), residual


def _project(
    p: Tensor | None, q: Tensor | None, a: Tensor, b: Tensor, f: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the potentials in any gauge, and the slope along the constant that the gauge <a,f> = <b,g> fixes."""
    p = torch.zeros_like(f) if p is None else p
    q = torch.zeros_like(g) if q is None else q
    slope = p.sum(-1, keepdim=True) - q.sum(-1, keepdim=True)
    return p - slope * a / 2, q + slope * b / 2, slope
