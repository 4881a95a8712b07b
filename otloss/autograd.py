"""The operators under autograd: `Sinkhorn`, whose outputs carry the gradients that a mode gives them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from otloss import operators
from otloss.backends import get_backend
from otloss.backends.protocol import Given, Problem, is_relaxed
from otloss.checks import no_autocast
from otloss.compat import is_transformed, plain_apply, records_nothing
from otloss.gradients import Incoming, State, derive
from otloss.operators import GRADIENT, OUTPUTS, SOLVE, parameters, together

# The outputs that each mode differentiates.
_DIFFERENTIABLE = {
    "implicit": {"transport_cost", "value", "f", "g", "a", "b"},
    "unroll": {"transport_cost", "value", "a", "b"},
    "none": {"transport_cost"},
}
# The places of the other outputs, by the mode and by whether a and b have gradients.
_CONSTANT = {
    (mode, by_a, by_b): tuple(
        place
        for place, name in enumerate(OUTPUTS)
        if name not in names or (name == "a" and not by_a) or (name == "b" and not by_b)
    )
    for mode, names in _DIFFERENTIABLE.items()
    for by_a in (False, True)
    for by_b in (False, True)
}
_INCOMING = tuple(OUTPUTS.index(name) for name in Incoming._fields)
_STATE = len(OUTPUTS) - len(State._fields)


class Sinkhorn(torch.autograd.Function):
    """``operators.solve`` with its gradients. Arguments and results are the same, all flat: autograd sees no tuples."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return operators.solve(*arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        problem, given, options, _ = together(inputs, SOLVE)
        state = output[_STATE:]
        _, _, by_a, by_b, *_ = ctx.needs_input_grad
        # A mass without a gradient counts as uniform from here on. Where it has one, its total is needed, but for logs.
        of_a, of_b = given.a if by_a else "uniform", given.b if by_b else "uniform"
        a, b = problem.a if of_a == "masses" else state[-2], problem.b if of_b == "masses" else state[-1]
        ctx.save_for_backward(problem.left, problem.right, a, b, problem.rho_a, problem.rho_b, *state)
        ctx.eps, ctx.kind = problem.eps, problem.kind
        ctx.given, ctx.options = Given(of_a, of_b, given.tolerance, given.tensor_eps), options
        ctx.mark_non_differentiable(*[output[place] for place in _CONSTANT[options.mode, by_a, by_b]])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        incoming = Incoming(*[grads[place] for place in _INCOMING])
        need, no_gradients = ctx.needs_input_grad, (None,) * len(ctx.needs_input_grad)
        if all(grad is None for grad in incoming):
            return no_gradients
        left, right, a, b, rho_a, rho_b, *state = ctx.saved_tensors
        problem, options = Problem(left, right, a, b, ctx.eps, rho_a, rho_b, ctx.kind), ctx.options
        need_cost = need[0] or need[1]
        if not torch.is_grad_enabled():
            found = operators.gradient(*problem, *state, *incoming, need_cost, *ctx.given, *options)
        elif options.mode != "none" and get_backend(options.backend).TWICE_DIFFERENTIABLE:
            with no_autocast(left):
                longest, mode, backend = options.max_iter, options.mode, options.backend
                found, _ = derive(problem, ctx.given, State(*state), incoming, need_cost, longest, mode, backend)
        else:
            found = OnceDifferentiable.apply(*problem, *state, *incoming, need_cost, *ctx.given, *options)
        by_left, by_right, by_a, by_b, by_rho = found
        by_rho_a, by_rho_b = by_rho.unbind(-1) if is_relaxed(problem) else (None, None)
        by = (by_left, by_right, by_a, by_b, None, by_rho_a, by_rho_b, None)  # as the fields of `Problem`
        wanted = [grad if needed else None for grad, needed in zip(by, need[: len(by)], strict=True)]
        return (*wanted, *no_gradients[len(by) :])


# PyTorch's compiler counts the parameters.
Sinkhorn.forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in parameters(SOLVE)]
)


_plain_apply = plain_apply(Sinkhorn)


def solve(*arguments: Any) -> tuple[Tensor, ...]:
    """``Sinkhorn.apply``, by a shorter way where nothing is transformed."""
    if is_transformed():
        return Sinkhorn.apply(*arguments)  # type: ignore[no-any-return]
    return (operators.solve if records_nothing() else _plain_apply)(*arguments)  # type: ignore[no-any-return]


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
