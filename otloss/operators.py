"""The backends' functions as two PyTorch operators, opaque to the compiler, with fake kernels.

``solve`` takes a problem with its masses as they were given. ``gradient`` takes the same, what the solve has left, and
the gradients by its outputs. Their arguments are the fields of a few named tuples, one after another: the schemas are
made from these, and the first line of a body puts them together again. A new field is thus added in one place.
``run_solve`` and ``run_gradient`` do the work. Their derivatives stand in ``autograd.py``.

Checks of values stand here, inside the operator's body, where they also run under ``torch.compile`` and ``vmap``. On a
GPU they would stop the queue, so there they run only when the environment sets ``OTLOSS_CHECK_VALUES=1``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from otloss.backends import get_backend
from otloss.backends.massless import live
from otloss.backends.protocol import NOTHING, Given, Gradients, Problem, Shift, Solution, Start, is_relaxed
from otloss.checks import no_autocast, warn
from otloss.compat import OperatorLibrary
from otloss.gradients import Incoming, State, derive


class ConvergenceWarning(UserWarning):
    """A problem did not reach ``tol`` within ``max_iter``, or its gradient's linear system was left inaccurate."""


class Options(NamedTuple):
    """How a problem is solved and differentiated."""

    max_iter: int
    tol: float
    accelerate: bool
    keep: bool
    """An implicit gradient may follow, for which the cost of features may be kept."""
    mode: str
    backend: str


class Asked(NamedTuple):
    """What a gradient is asked for."""

    need_cost: bool
    """The gradients by left and right, too."""


#: The arguments of the two operators, and what ``solve`` returns.
SOLVE = (Problem, Given, Options, Start)
GRADIENT = (Problem, State, Incoming, Asked, Given, Options)
OUTPUTS = ("transport_cost", "value", "error", *State._fields)

_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "SymInt", bool: "bool", str: "str"}


def parameters(kinds: tuple[Any, ...]) -> dict[str, Any]:
    """Name and type of every argument of an operator that takes the fields of these named tuples."""
    fields = ((kind.__name__.lower(), *field) for kind in kinds for field in get_type_hints(kind).items())
    return {f"{kind}_{name}": type_of for kind, name, type_of in fields}


def _schema(name: str, kinds: tuple[Any, ...], outputs: int) -> str:
    arguments = ", ".join(f"{_TYPES[type_of]} {argument}" for argument, type_of in parameters(kinds).items())
    return f"{name}({arguments}) -> ({', '.join(['Tensor'] * outputs)})"


def together(arguments: Sequence[Any], kinds: tuple[Any, ...]) -> list[Any]:
    """Named tuples of these kinds, put together again from the fields of one after another."""
    parts, start = [], 0
    for kind in kinds:
        stop = start + len(kind._fields)
        parts.append(kind(*arguments[start:stop]))
        start = stop
    return parts


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Outputs in the layout that the fake kernels promise to a compiler, whatever layout the inputs had."""
    return tuple(tensor.contiguous() for tensor in tensors)


def _checks_on(x: Tensor) -> bool:
    return x.device.type == "cpu" or os.environ.get("OTLOSS_CHECK_VALUES") == "1"


def _finite(x: Tensor) -> bool:
    # aminmax gives NaN twice if any entry is.
    return not x.numel() or all(math.isfinite(float(end)) for end in x.aminmax())


def _usable(problem: Problem) -> bool:
    """Whether a cost holds neither NaN nor -inf, or features nothing that is not finite."""
    left, right = problem.left, problem.right
    if right is None:
        return not left.numel() or float(left.amin()) > -math.inf  # the least is NaN if any entry is
    return _finite(left) and _finite(right)


def _eps(problem: Problem, given: Given) -> str:
    """The eps of the call, for messages."""
    return "an eps given as a tensor" if given.tensor_eps else f"eps={problem.eps:g}"


def _explain_nonfinite(problem: Problem, given: Given) -> str:
    left, right = problem.left, problem.right
    named = (("cost", left),) if right is None else (("x", left), ("y", right))
    for name, value in named:
        bad = ~torch.isfinite(value) if right is not None else (value == -math.inf) | value.isnan()
        if bad.any():
            kind = "NaN" if value.isnan().any() else "inf" if right is not None else "-inf"
            forbid = "inf forbids a pair; " if right is None else ""
            leave_out = "to leave a point out, give it no mass and entries such as 0"
            return f"{name} must be finite, got {kind}; {forbid}{leave_out}"
    for name, form, share in (("a", given.a, problem.a), ("b", given.b, problem.b)):
        if form == "masses" and (share == 0).all(-1).any():  # divided by a total that has overflowed
            return f"{name} must be masses whose total is finite in {share.dtype}; rescale them"
    if right is None and (stranded := _stranded(problem)):
        return stranded
    return f"the cost is too large for {left.dtype} at {_eps(problem, given)}, results are not finite; rescale both"


def _stranded(problem: Problem) -> str | None:
    """What is wrong with the first point whose mass no allowed pair can take; None if there is no such point."""
    barred, live_a, live_b = problem.left == math.inf, live(problem.a), live(problem.b)
    rows = live_a & (barred | ~live_b.unsqueeze(-2)).all(-1)
    columns = live_b & (barred | ~live_a.unsqueeze(-1)).all(-2)
    for line, other, found in (("row", "columns", rows), ("column", "rows", columns)):
        if found.any():
            first, point = found.nonzero()[0].tolist()
            return (
                f"cost must be finite for one pair with mass in every row and column with mass, but {line} {point} of "
                f"problem {first} is forbidden (inf) to all {other} with mass; give it no mass, or allow a pair"
            )
    return None


def room_to_keep(problem: Problem, keep: bool, backend: str) -> Tensor:
    """The buffer in which solve saves the cost of features for the gradient, which then need not compute it again.

    It is empty where it would take more than half the memory of the features.
    """
    left, right, a = problem.left, problem.right, problem.a
    if not keep or right is None or not get_backend(backend).KEEPS_COST:
        return a.new_empty(0)
    (count, n, d), m = left.shape, right.shape[1]
    return a.new_empty(count, n, m) if 2 * n * m <= (n + m) * d else a.new_empty(0)


def converged(problem: Problem, solution: Solution, tol: float) -> Tensor:
    """Of each problem, whether the error of its plan is below ``tol``, but for the rounding of its potentials.

    A potential is rounded by u of itself, u = 2^-24 (2^-53), and so are the sum f_i + g_j and its difference to C_ij.
    An entry of the plan is thus known to u (|f_i| + |g_j| + |f_i + g_j| + |C_ij - f_i - g_j|) / eps of itself, where
    costs and potentials are those after the shift, and each marginal to the mean of that under the plan. As
    C_ij - f_i - g_j = -eps log k_ij, of mean size at most eps (1 + log(n m)), both marginals are off by at most
    4 u (<a, |f|> + <b, |g|>) / eps + 2 u (1 + log(n m)).

    With penalties the marginals a exp(-f / rho_a) and b exp(-g / rho_b) stand for a and b, as shares of their total,
    and are themselves known to u |f| / rho_a and u |g| / rho_b.
    """
    f, g, error = solution.f, solution.g, solution.error
    sizes = torch.zeros_like(error)
    for mass, potential, rho in ((problem.a, f, problem.rho_a), (problem.b, g, problem.rho_b)):
        size = potential.abs()
        if is_relaxed(problem):
            asked = mass if rho is None else mass * torch.exp(-potential / rho.unsqueeze(-1))
            mass = asked / asked.sum(-1, keepdim=True)
            size = size if rho is None else size * (1 + problem.eps / rho.unsqueeze(-1))
        sizes = sizes + (mass * size).sum(-1)
    unit = torch.finfo(f.dtype).eps / 2
    points = sizes.new_full((), f.shape[-1] * g.shape[-1])  # a tensor, so that a compiled function serves every size
    return error < tol + unit * (4 * sizes / problem.eps + 2 * (1 + points.log()))


def run_solve(problem: Problem, given: Given, options: Options, start: Start) -> tuple[Tensor, ...]:
    """The solution of a problem, as `OUTPUTS` says. No output shares memory with another or with an input."""
    backend, checked = get_backend(options.backend), _checks_on(problem.left)
    with no_autocast(problem.left):
        problem, all_live = backend.normalise(problem, given, checked)
        if checked:
            _check_start(problem, start)
        kept = room_to_keep(problem, options.keep, options.backend)
        room = kept if kept.numel() else None
        solution = backend.solve(problem, options.max_iter, options.tol, room, options.accelerate, start)
        if checked:
            _check(problem, given, solution, backend.worst_error(solution), all_live, options)
    shift = solution.shift or _no_shift(problem)
    potentials = solution.f, solution.g, solution.n_iter
    return (solution.transport_cost, solution.value, solution.error, *potentials, *shift, kept, problem.a, problem.b)


def _solve(*arguments: Any) -> tuple[Tensor, ...]:
    return _contiguous(*run_solve(*together(arguments, SOLVE)))


def _check(
    problem: Problem, given: Given, solution: Solution, worst: float, all_live: bool, options: Options
) -> None:
    """Raise unless the solution is finite; warn unless it has converged. ``worst`` is its largest error.

    The solution of a point with mass that is forbidden to all others with mass is not finite.
    """
    # An entry between two points without mass appears in no output, but it does in gradients.
    if math.isnan(worst) or not (all_live or _usable(problem)):
        raise ValueError(_explain_nonfinite(problem, given))
    if 0 < options.tol <= worst and not converged(problem, solution, options.tol).all():
        # The text holds no figures of this call, so that Python shows it once.
        warn(
            f"problems did not reach tol={options.tol:g} in max_iter={options.max_iter} iterations at "
            f"{_eps(problem, given)} (see converged and marginal_error); raise max_iter, tol or eps",
            ConvergenceWarning,
        )


def _check_start(problem: Problem, start: Start) -> None:
    """Raise unless the potentials to start from are finite where there is mass."""
    for name, x, mass in (("f", start.f, problem.a), ("g", start.g, problem.b)):
        if x is not None and not _finite(x) and not bool((x.isfinite() | (mass == 0)).all()):
            raise ValueError(f"{name} of init must be finite where there is mass, got NaN or inf")


def _no_shift(problem: Problem) -> Shift:
    """Zeros for a dense cost that nothing was taken out of, nothing for features."""
    a, b = problem.a, problem.b
    if problem.right is None:
        return Shift(a.new_zeros(a.shape), b.new_zeros(b.shape))
    return Shift(a.new_empty(0), b.new_empty(0))


def _fake_solve(*arguments: Any) -> tuple[Tensor, ...]:
    problem, _, options, _ = together(arguments, SOLVE)
    a, b = problem.a, problem.b
    scalar, kept = a.new_empty(a.shape[0]), room_to_keep(problem, options.keep, options.backend)
    n_iter, shift = torch.empty_like(scalar, dtype=torch.int64), _no_shift(problem)
    state = State(_like(a), _like(b), n_iter, *shift, kept, _like(a), _like(b))
    return scalar, torch.empty_like(scalar), torch.empty_like(scalar), *state


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def run_gradient(
    problem: Problem, state: State, incoming: Incoming, asked: Asked, given: Given, options: Options
) -> Gradients:
    """The gradients of a problem that was solved; `NOTHING` or empty ones by what has none."""
    longest = options.max_iter
    # While a CUDA graph is captured the host cannot read n_iter.
    if options.mode == "unroll" and not (problem.left.is_cuda and torch.cuda.is_current_stream_capturing()):
        longest = int(state.n_iter.max()) if state.n_iter.numel() else 0
    with no_autocast(problem.left):
        gradients, residual = derive(
            problem, given, state, incoming, asked.need_cost, longest, options.mode, options.backend
        )
    worst = float(residual.max()) if residual is not None and residual.numel() and _checks_on(residual) else 0.0
    if not worst <= 1e-2:  # so written, NaN warns too
        warn(
            f"the gradient's linear system was left with a relative residual above 1e-2 at {_eps(problem, given)}: "
            "the plan is close to a permutation of blocks; raise eps or use float64",
            ConvergenceWarning,
        )
    return gradients


def _gradient(*arguments: Any) -> tuple[Tensor, ...]:
    problem, *rest = together(arguments, GRADIENT)
    gradients = run_gradient(problem, *rest)
    return _contiguous(*(problem.a.new_empty(0) if grad is NOTHING else grad for grad in gradients))


def _fake_gradient(*arguments: Any) -> tuple[Tensor, ...]:
    problem, _, _, asked, given, _ = together(arguments, GRADIENT)
    left, right, a, b = problem.left, problem.right, problem.a, problem.b
    return (
        _like(left) if asked.need_cost else a.new_empty(0),
        _like(right) if asked.need_cost and right is not None else a.new_empty(0),
        a.new_empty(0) if given.a == "uniform" else _like(a),
        b.new_empty(0) if given.b == "uniform" else _like(b),
        a.new_empty(a.shape[0], 2) if is_relaxed(problem) else a.new_empty(0),
    )


def _fold_batch(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """The vmap rule of every operator here: problems are independent, so the mapped dimension joins the batch."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size = info.batch_size

        def fold(arg: Any, dim: int | None) -> Any:
            if not isinstance(arg, Tensor):
                return arg
            arg = arg.movedim(dim, 0) if dim is not None else arg.expand(size, *arg.shape)
            return arg.reshape(size * arg.shape[1], *arg.shape[2:])

        outputs = op(*(fold(arg, dim) for arg, dim in zip(args, in_dims, strict=True)))
        problems = next(
            arg.shape[0] if dim is None else arg.movedim(dim, 0).shape[1]
            for arg, dim in zip(args, in_dims, strict=True)
            if isinstance(arg, Tensor)
        )
        # An output that was not asked for is empty; it keeps that shape in every mapped call.
        unfolded = tuple(
            out.reshape(size, problems, *out.shape[1:]) if out.shape[0] == size * problems else out.new_empty(size, 0)
            for out in outputs
        )
        return unfolded, (0,) * len(unfolded)

    return rule


# torch.library.custom_op wraps an operator in layers that cost time at each call, and imports PyTorch's compiler at the
# first one.
LIBRARY = OperatorLibrary("otloss", "DEF")


def _operator(
    name: str, kinds: tuple[Any, ...], outputs: int, body: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., tuple[Tensor, ...]]:
    """Define an operator for every device."""
    LIBRARY.define(_schema(name, kinds, outputs), tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"otloss::{name}", fake, lib=LIBRARY)
    operator: Callable[..., tuple[Tensor, ...]] = getattr(torch.ops.otloss, name).default
    torch.library.register_vmap(f"otloss::{name}", _fold_batch(operator), lib=LIBRARY)
    return operator


solve = _operator("solve", SOLVE, len(OUTPUTS), _solve, _fake_solve)
gradient = _operator("gradient", GRADIENT, len(Gradients._fields), _gradient, _fake_gradient)
