"""The derivatives of the operators: `Sinkhorn` of ``solve``, and `Gradient` of ``gradient``.

They are the operators' kernels for autograd. So the compiler and functorch's transforms meet operators alone.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from otloss import operators
from otloss.backends import get_backend
from otloss.backends.protocol import Given, Problem, Start, is_relaxed
from otloss.checks import no_autocast
from otloss.compat import (
    LevelFunction,
    below_autograd,
    call_at_next_level,
    has_values,
    is_transformed,
    is_watched,
    kernel_for_autograd,
    records_nothing,
)
from otloss.gradients import Incoming, State, derive
from otloss.operators import GRADIENT, LIBRARY, OUTPUTS, SOLVE, Asked, Options, together

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
_FORWARD_MODE = (
    "otloss has no derivatives in forward mode, which torch.func.jvp, jacfwd and hessian take; take the reverse mode: "
    "torch.func.vjp or jacrev, and jacrev(jacrev(f)) for a Hessian"
)


class Sinkhorn(LevelFunction):
    """``operators.solve`` with its gradients. Arguments and results are the same, all flat: autograd sees no tuples."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        problem, given, options, start = together(arguments, SOLVE)
        ctx.transformed = is_transformed()
        if ctx.transformed:
            output = call_at_next_level(operators.solve, *arguments)
        else:
            output = _solve(problem, given, options, start)
        state = output[_STATE:]
        _, _, by_a, by_b, *_ = ctx.needs_input_grad
        # A mass without a gradient counts as uniform from here on. Where it has one, its total is needed, but for logs.
        of_a, of_b = given.a if by_a else "uniform", given.b if by_b else "uniform"
        a, b = problem.a if of_a == "masses" else None, problem.b if of_b == "masses" else None
        ctx.save_for_backward(problem.left, problem.right, a, b, problem.rho_a, problem.rho_b, *state)
        ctx.eps, ctx.kind = problem.eps, problem.kind
        ctx.given, ctx.options = Given(of_a, of_b, given.tolerance, given.tensor_eps), options
        ctx.mark_non_differentiable(*[output[place] for place in _CONSTANT[options.mode, by_a, by_b]])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        incoming = Incoming(*[grads[place] for place in _INCOMING])
        need, no_gradients = ctx.needs_input_grad, (None,) * len(ctx.needs_input_grad)
        if all(grad is None for grad in incoming):
            return no_gradients
        left, right, a, b, rho_a, rho_b, *saved = ctx.saved_tensors
        state = State(*saved)
        a, b = state.a if a is None else a, state.b if b is None else b
        problem = Problem(left, right, a, b, ctx.eps, rho_a, rho_b, ctx.kind)
        parts = problem, state, incoming, Asked(need[0] or need[1]), ctx.given, ctx.options
        transformed = ctx.transformed or torch.is_grad_enabled() or is_transformed()
        found = operators.gradient(*chain.from_iterable(parts)) if transformed else _gradient(*parts)
        by_left, by_right, by_a, by_b, by_rho = found
        by_rho_a, by_rho_b = by_rho.unbind(-1) if is_relaxed(problem) else (None, None)
        by = (by_left, by_right, by_a, by_b, None, by_rho_a, by_rho_b, None)  # as the fields of `Problem`
        wanted = [grad if needed else None for grad, needed in zip(by, need[: len(by)], strict=True)]
        return (*wanted, *no_gradients[len(by) :])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_FORWARD_MODE)


class Gradient(LevelFunction):
    """``operators.gradient`` with its derivative: that of the reference's formula for it, at the same solution.

    The formula takes the potentials as variables beside the inputs. Their own derivatives by the inputs are those of
    `Sinkhorn`, whose outputs they are. It is made of PyTorch operations and stores several tensors ``(B, n, m)``.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in arguments])
        ctx.others = [None if isinstance(x, Tensor) else x for x in arguments]
        if is_transformed():
            return call_at_next_level(operators.gradient, *arguments)
        with below_autograd():
            return operators.gradient(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        options = together(ctx.others, GRADIENT)[-1]
        if options.mode == "none":
            raise RuntimeError("gradient='none' takes the plan as a constant and has no second derivative")
        if options.mode == "unroll" and not get_backend(options.backend).TWICE_DIFFERENTIABLE:
            raise RuntimeError(
                f"the {options.backend!r} backend has no second derivative in mode 'unroll'; compute this part with "
                "otloss.use_backend('reference') or backend='reference', or take gradient='implicit'"
            )
        both = zip(ctx.saved_tensors, ctx.others, strict=True)
        arguments = tuple([other if x is None else x for x, other in both])
        n_iter, longest = together(arguments, GRADIENT)[1].n_iter, options.max_iter
        if has_values(n_iter) and n_iter.numel():
            longest = int(n_iter.max())
        places = [place for place, needed in enumerate(ctx.needs_input_grad) if needed]

        def formula(*variables: Tensor) -> tuple[Tensor, ...]:
            by_place = dict(zip(places, variables, strict=True))
            return _formula(longest, *(by_place.get(place, argument) for place, argument in enumerate(arguments)))

        pull_back = torch.func.vjp(formula, *[arguments[place] for place in places])[1]
        by: list[Tensor | None] = [None] * len(arguments)
        for place, grad in zip(places, pull_back(grads), strict=True):
            by[place] = grad
        return tuple(by)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_FORWARD_MODE)


def _formula(longest: int, *arguments: Any) -> tuple[Tensor, ...]:
    """What ``operators.gradient`` returns, by the reference's formula. ``longest`` is a bound on the iterations."""
    (left, right, *rest), state, incoming, asked, given, options = together(arguments, GRADIENT)
    dtype = state.f.dtype  # which may be wider than that of the points
    x, y = left.to(dtype), None if right is None else right.to(dtype)
    with no_autocast(left):
        found, _ = derive(
            Problem(x, y, *rest), given, state, incoming, asked.need_cost, longest, options.mode, "reference"
        )
    return (found.left.to(left.dtype), found.right.to(left.dtype), found.a, found.b, found.rho)


LIBRARY.impl("solve", kernel_for_autograd(operators.solve, Sinkhorn), "Autograd")
LIBRARY.impl("gradient", kernel_for_autograd(operators.gradient, Gradient), "Autograd")


def solve(problem: Problem, given: Given, options: Options, start: Start) -> tuple[Tensor, ...]:
    """``operators.solve``, by a shorter way where nothing is transformed."""
    if is_transformed():
        return operators.solve(*problem, *given, *options, *start)
    if records_nothing():
        return _solve(problem, given, options, start)
    return Sinkhorn.apply(*problem, *given, *options, *start)


def _solve(problem: Problem, given: Given, options: Options, start: Start) -> tuple[Tensor, ...]:
    """What ``operators.solve`` returns, where nothing is transformed and nothing is recorded."""
    with below_autograd():
        if problem.left.is_meta or is_watched(*problem, *start):  # on the device meta an operator has its fake kernel
            return operators.solve(*problem, *given, *options, *start)
        return operators.run_solve(problem, given, options, start)


def _gradient(problem: Problem, state: State, incoming: Incoming, *others: Any) -> tuple[Tensor, ...]:
    """Likewise of ``operators.gradient``, but that a gradient that there is not may be `NOTHING`."""
    with below_autograd():
        if problem.left.is_meta or is_watched(*problem, *incoming):
            flat = chain.from_iterable((problem, state, incoming, *others))
            return operators.gradient(*flat)
        return operators.run_gradient(problem, state, incoming, *others)
