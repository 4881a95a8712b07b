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
this through f and g, of which the plan is an explicit function. Marginals are normalised outside, where autograd
projects their gradients.

*unroll* differentiates the iterations that were run. *none* takes T as a constant: ∂C = w T.

Source: Luise et al. 2018 (arXiv 1805.11897) for the sharp cost; Cuturi et al. 2022 (2201.12324) for the system.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from otloss import operators
from otloss.backends import get_backend
from otloss.checks import no_autocast

MODES = ("implicit", "unroll", "none")
# Outputs of ``Sinkhorn`` by position: f, g, transport cost, value, iterations, error, kept.
_CONSTANT = {"implicit": (4, 5, 6), "unroll": (0, 1, 4, 5, 6), "none": (0, 1, 3, 4, 5, 6)}


class Sinkhorn(torch.autograd.Function):
    """(left, right, a, b) -> f, g, transport cost, value, iterations, error, kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        left: Tensor,
        right: Tensor | None,
        a: Tensor,
        b: Tensor,
        log_totals: Tensor,
        given: str,
        mass_tol: float,
        eps: float,
        max_iter: int,
        tol: float,
        keep: bool,
        mode: str,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        options = (given, mass_tol, eps, max_iter, tol, keep, backend)
        return operators.solve(left, right, a, b, log_totals, *options)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        left, right, a, b, _, _, _, eps, max_iter, _, _, mode, backend = inputs
        f, g, _, _, n_iter, _, kept = output
        ctx.save_for_backward(left, right, a, b, f, g, n_iter, kept)
        ctx.eps, ctx.max_iter, ctx.mode, ctx.backend = eps, max_iter, mode, backend
        ctx.mark_non_differentiable(*(output[i] for i in _CONSTANT[mode]))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        p, q, w, w_value = grads[:4]
        left, right, a, b, f, g, n_iter, kept = ctx.saved_tensors
        need_left, need_right, need_a, need_b = ctx.needs_input_grad[:4]
        need_cost = need_left or need_right
        if p is None and q is None and w is None and w_value is None:
            return (None,) * 13
        if ctx.mode == "unroll":
            run = (n_iter, w, w_value, ctx.eps, need_cost, ctx.max_iter)
            grad = _call("unrolled_gradient", ctx.backend, ctx.mode, left, right, a, b, *run)
        else:
            slope = None
            if p is not None or q is not None:
                p, q, slope = _project(p, q, a, b, f, g)
            adjoint = ctx.mode == "implicit" and (w is not None or p is not None)
            upstream = (w, w_value, p, q, ctx.eps, adjoint, need_cost)
            grad = _call("implicit_gradient", ctx.backend, ctx.mode, left, right, a, b, f, g, kept, *upstream)
            if slope is not None:
                grad = (*grad[:2], grad[2] - slope * f / 2, grad[3] + slope * g / 2)
        return (
            grad[0] if need_left else None,
            grad[1] if need_right else None,
            grad[2] if need_a else None,
            grad[3] if need_b else None,
            *(None,) * 9,
        )


# Function.apply looks the signature up at every call; this is where it looks first.
Sinkhorn.forward.__signature__ = inspect.signature(Sinkhorn.forward)  # type: ignore[attr-defined]


def _project(
    p: Tensor | None, q: Tensor | None, a: Tensor, b: Tensor, f: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the potentials in any gauge, and the slope along the constant that the gauge <a,f> = <b,g> fixes."""
    p = torch.zeros_like(f) if p is None else p
    q = torch.zeros_like(g) if q is None else q
    slope = p.sum(-1, keepdim=True) - q.sum(-1, keepdim=True)
    return p - slope * a / 2, q + slope * b / 2, slope


def _call(name: str, backend: str, mode: str, *args: Any) -> tuple[Tensor, ...]:
    """A backend's gradient; one that will be differentiated again must be made of differentiable operations."""
    if not torch.is_grad_enabled():
        return getattr(operators, name)(*args, backend)  # type: ignore[no-any-return]
    module = get_backend(backend)
    if mode == "none" or not module.TWICE_DIFFERENTIABLE:
        return OnceDifferentiable.apply(name, backend, mode, *args)  # type: ignore[no-any-return]
    with no_autocast(args[0]):
        if name == "implicit_gradient":  # what is differentiated again is made again
            args = (*args[:6], *args[7:])
        return getattr(module, name)(*args)[:4]  # type: ignore[no-any-return]


class OnceDifferentiable(torch.autograd.Function):
    """A gradient whose own derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, backend: str, mode: str, *args: Any) -> tuple[Tensor, ...]:
        return getattr(operators, name)(*args, backend)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, ctx.mode = inputs[1:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if ctx.mode == "none":
            raise RuntimeError("gradient='none' takes the plan as a constant and has no second derivative")
        raise RuntimeError(
            f"the {ctx.backend!r} backend has no second derivative; compute this part with "
            "otloss.use_backend('reference') or backend='reference', which has"
        )
