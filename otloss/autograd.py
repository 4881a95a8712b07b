"""The operators under autograd: `Sinkhorn`, whose outputs carry the gradients that a mode gives them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from otloss import operators
from otloss.backends import get_backend
from otloss.backends.protocol import Gradients, Problem
from otloss.checks import no_autocast
from otloss.gradients import Incoming, State, derive
from otloss.operators import GRADIENT, OUTPUTS, SOLVE, parameters, together

# The outputs that each mode differentiates.
_DIFFERENTIABLE = {
    "implicit": {"transport_cost", "value", "f", "g", "a", "b"},
    "unroll": {"transport_cost", "value", "a", "b"},
    "none": {"transport_cost"},
}


class Sinkhorn(torch.autograd.Function):
    """``operators.solve`` with its gradients. Arguments and results are the same, all flat: autograd sees no tuples."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return operators.solve(*arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        problem, given, ctx.options = together(inputs, SOLVE)
        state = State(*output[-len(State._fields) :])
        needed = dict(zip(Problem._fields, ctx.needs_input_grad, strict=False))
        # A mass without a gradient counts as uniform from here on. Where it has one, its total is needed, but for logs.
        ctx.given = given._replace(
            a=given.a if needed["a"] else "uniform", b=given.b if needed["b"] else "uniform"
        )
        a = problem.a if ctx.given.a == "masses" else state.a
        b = problem.b if ctx.given.b == "masses" else state.b
        ctx.constants = problem._replace(left=None, right=None, a=None, b=None, rho_a=None, rho_b=None)
        ctx.save_for_backward(problem.left, problem.right, a, b, problem.rho_a, problem.rho_b, *state)
        constant = {side for side in ("a", "b") if getattr(ctx.given, side) == "uniform"}
        names = _DIFFERENTIABLE[ctx.options.mode] - constant
        ctx.mark_non_differentiable(*(out for name, out in zip(OUTPUTS, output, strict=True) if name not in names))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        by = dict(zip(OUTPUTS, grads, strict=True))
        incoming = Incoming(*(by[name] for name in Incoming._fields))
        need, no_gradients = ctx.needs_input_grad, (None,) * len(ctx.needs_input_grad)
        if all(grad is None for grad in incoming):
            return no_gradients
        left, right, a, b, rho_a, rho_b, *state = ctx.saved_tensors
        problem = ctx.constants._replace(left=left, right=right, a=a, b=b, rho_a=rho_a, rho_b=rho_b)
        options, need_cost = ctx.options, need[0] or need[1]
        if not torch.is_grad_enabled():
            found = operators.gradient(*problem, *state, *incoming, need_cost, *ctx.given, *options)
        elif options.mode != "none" and get_backend(options.backend).TWICE_DIFFERENTIABLE:
            with no_autocast(left):
                longest, mode, backend = options.max_iter, options.mode, options.backend
                found, _ = derive(problem, ctx.given, State(*state), incoming, need_cost, longest, mode, backend)
        else:
            found = OnceDifferentiable.apply(*problem, *state, *incoming, need_cost, *ctx.given, *options)
        by_name = dict(zip(Gradients._fields, found, strict=True))
        fields = zip(Problem._fields, need, strict=False)
        wanted = [by_name.get(name) if needed else None for name, needed in fields]
        return (*wanted, *no_gradients[len(wanted) :])


# Function.apply asks for the signature at every call, and inspect finds this attribute first. PyTorch's compiler counts
# the parameters.
Sinkhorn.forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in parameters(SOLVE)]
)


class OnceDifferentiable(torch.autograd.Function):
    """``operators.gradient``; differentiating it again raises an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return operators.gradient(*arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = together(inputs, GRADIENT)[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if ctx.options.mode == "none":
            raise RuntimeError("gradient='none' takes the plan as a constant and has no second derivative")
        raise RuntimeError(
            f"the {ctx.options.backend!r} backend has no second derivative; compute this part with "
            "otloss.use_backend('reference') or backend='reference', which has"
        )
