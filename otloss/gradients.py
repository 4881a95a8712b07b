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
from otloss.backends.protocol import Gradients, Problem, Shift, Solution, Upstream
from otloss.checks import no_autocast

MODES = ("implicit", "unroll", "none")
_OUTPUTS = Solution._fields[:-1]  # the shift is a constant, as is what is kept
# The outputs that each mode differentiates, by their names in `Solution`.
_DIFFERENTIABLE = {
    "implicit": {"f", "g", "transport_cost", "value"},
    "unroll": {"transport_cost", "value"},
    "none": {"transport_cost"},
}


class Sinkhorn(torch.autograd.Function):
    """A `Problem` and options -> a `Solution` and what is kept for the gradient, all flat: autograd sees no tuples."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        left: Tensor,
        right: Tensor | None,
        a: Tensor,
        b: Tensor,
        eps: float,
        log_totals: Tensor,
        mass_names: str,
        mass_tol: float,
        max_iter: int,
        tol: float,
        accelerate: bool,
        keep: bool,
        mode: str,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        options = (mass_names, mass_tol, eps, max_iter, tol, accelerate, keep, backend)
        return operators.solve(left, right, a, b, log_totals, *options)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        left, right, a, b, ctx.eps, _, _, _, ctx.max_iter, _, _, _, ctx.mode, ctx.backend = inputs
        *outputs, row_shift, column_shift, kept = output
        f, g, _, _, n_iter, _ = outputs
        ctx.save_for_backward(left, right, a, b, f, g, n_iter, row_shift, column_shift, kept)
        names = _DIFFERENTIABLE[ctx.mode]
        constant = [out for name, out in zip(_OUTPUTS, outputs, strict=True) if name not in names]
        ctx.mark_non_differentiable(*constant, row_shift, column_shift, kept)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        by = dict(zip(_OUTPUTS, grads[: len(_OUTPUTS)], strict=True))
        upstream = Upstream(by["transport_cost"], by["value"], by["f"], by["g"])
        left, right, a, b, f, g, n_iter, row_shift, column_shift, kept = ctx.saved_tensors
        problem = Problem(left, right, a, b, ctx.eps)
        need_left, need_right, need_a, need_b = ctx.needs_input_grad[:4]
        need_cost = need_left or need_right
        if all(grad is None for grad in upstream):
            return (None, None, None, None, *_OPTIONS)
        if ctx.mode == "unroll":
            gradients = _unrolled(problem, n_iter, upstream, need_cost, ctx.max_iter, ctx.backend)
        else:
            slope = None
            if upstream.f is not None or upstream.g is not None:
                p, q, slope = _project(upstream.f, upstream.g, a, b, f, g)
                upstream = Upstream(upstream.cost, upstream.value, p, q)
            adjoint = ctx.mode == "implicit" and (upstream.cost is not None or upstream.f is not None)
            shift = Shift(row_shift, column_shift)
            gradients = _implicit(problem, f, g, shift, kept, upstream, adjoint, need_cost, ctx.mode, ctx.backend)
            if slope is not None:
                by_a, by_b = gradients.a - slope * f / 2, gradients.b + slope * g / 2
                gradients = Gradients(gradients.left, gradients.right, by_a, by_b)
        return (
            gradients.left if need_left else None,
            gradients.right if need_right else None,
            gradients.a if need_a else None,
            gradients.b if need_b else None,
            *_OPTIONS,
        )


# Function.apply asks for the signature at every call. inspect finds this attribute first, which saves its work.
_SIGNATURE = inspect.signature(Sinkhorn.forward)
Sinkhorn.forward.__signature__ = _SIGNATURE  # type: ignore[attr-defined]
# No gradient for what follows left, right, a and b.
_OPTIONS = (None,) * (len(_SIGNATURE.parameters) - len(Gradients._fields))


def _project(
    p: Tensor | None, q: Tensor | None, a: Tensor, b: Tensor, f: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the potentials in any gauge, and the slope along the constant that the gauge <a,f> = <b,g> fixes."""
    p = torch.zeros_like(f) if p is None else p
    q = torch.zeros_like(g) if q is None else q
    slope = p.sum(-1, keepdim=True) - q.sum(-1, keepdim=True)
    return p - slope * a / 2, q + slope * b / 2, slope


def _implicit(
    problem: Problem,
    f: Tensor,
    g: Tensor,
    shift: Shift,
    kept: Tensor,
    upstream: Upstream,
    adjoint: bool,
    need_cost: bool,
    mode: str,
    backend: str,
) -> Gradients:
    if mode != "none" and _twice(backend):
        with no_autocast(problem.left):
            # Without `kept`, which has no graph: the cost is computed again inside the graph.
            dense = shift if problem.right is None else None
            return get_backend(backend).implicit_gradient(problem, f, g, upstream, adjoint, need_cost, shift=dense)[0]
    left, right, a, b, eps = problem
    options = (*upstream, eps, adjoint, need_cost)
    return _run("implicit_gradient", backend, mode, left, right, a, b, f, g, *shift, kept, *options)


def _unrolled(
    problem: Problem, n_iter: Tensor, upstream: Upstream, need_cost: bool, max_iter: int, backend: str
) -> Gradients:
    if _twice(backend):
        with no_autocast(problem.left):
            return get_backend(backend).unrolled_gradient(problem, n_iter, upstream, need_cost, max_iter)
    left, right, a, b, eps = problem
    options = (upstream.cost, upstream.value, eps, need_cost, max_iter)
    return _run("unrolled_gradient", backend, "unroll", left, right, a, b, n_iter, *options)


def _twice(backend: str) -> bool:
    """Whether the gradient may be differentiated again, and is made of differentiable operations for that."""
    return torch.is_grad_enabled() and get_backend(backend).TWICE_DIFFERENTIABLE


def _run(name: str, backend: str, mode: str, *args: Any) -> Gradients:
    """An operator's gradient; if it may be differentiated again, as a function whose derivative raises."""
    if torch.is_grad_enabled():
        return Gradients(*OnceDifferentiable.apply(name, backend, mode, *args))
    return Gradients(*getattr(operators, name)(*args, backend))


class OnceDifferentiable(torch.autograd.Function):
    """An operator's gradient; differentiating it again raises an error."""

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
