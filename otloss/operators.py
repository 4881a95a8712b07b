"""The backends' functions as PyTorch operators: opaque to autograd and the compiler, with fake kernels and vmap rules.

Checks of values stand here, inside the operator's body, where they also run under ``torch.compile`` and ``vmap``. On a
GPU they would stop the queue, so there they run only when the environment sets ``OTLOSS_CHECK_VALUES=1``.

The signatures are flat, since they are the operators' schemas, which exported programs name. The first lines of a body
build the objects that backends take.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from otloss.backends import get_backend
from otloss.backends.protocol import Gradients, Problem, Shift, Solution, Upstream
from otloss.checks import no_autocast, warn


class ConvergenceWarning(UserWarning):
    """A problem did not reach ``tol`` within ``max_iter``, or its gradient's linear system was left inaccurate."""


def _contiguous(*tensors: Tensor) -> Any:
    """Outputs in the layout that the fake kernels promise to a compiler, whatever layout the inputs had."""
    return tuple(tensor.contiguous() for tensor in tensors)


def _checks_on(x: Tensor) -> bool:
    return x.device.type == "cpu" or os.environ.get("OTLOSS_CHECK_VALUES") == "1"


def _finite(x: Tensor) -> bool:
    return not x.numel() or all(
        math.isfinite(float(end)) for end in x.aminmax()
    )  # aminmax gives NaN twice if any entry is


def _side_of(mass_name: str) -> str:
    """The marginal, "a" or "b", that an argument "a", "b", "log_a" or "log_b" gives."""
    return mass_name.removeprefix("log_")


def _check_marginals(a: Tensor, b: Tensor, log_totals: Tensor, mass_names: Sequence[str], mass_tol: float) -> bool:
    """Raise unless the masses that came by these names are valid; return whether every point has mass."""
    if not a.numel() or not b.numel():
        return True
    # Masses are normalised: what is not finite in them or their totals has become NaN, which fails every comparison.
    gap = (log_totals[:, 0] - log_totals[:, 1]).abs().max()
    least = float(a.min()), float(b.min())
    if least[0] >= 0 and least[1] >= 0 and float(gap) <= mass_tol:
        return min(least) > 0
    sides = {"a": (a, log_totals[:, 0]), "b": (b, log_totals[:, 1])}
    for name in mass_names:
        mass, total = sides[_side_of(name)]
        bad = ~(torch.isfinite(total) & torch.isfinite(mass).all(-1))
        if bad.any():
            kind = "finite masses" if name in sides else "logarithms of finite masses"
            first = int(bad.int().argmax())
            raise ValueError(f"{name} must be {kind} with a positive total in every problem, unlike problem {first}")
        if (mass < 0).any():
            raise ValueError(f"{name} must not hold negative mass")
    gap = (log_totals[:, 0] - log_totals[:, 1]).abs()
    worst = gap.argmax()
    totals = log_totals[worst].exp().tolist()
    raise ValueError(
        f"a and b must have the same total mass (relative tolerance {mass_tol:g}), "
        f"got {totals[0]:.7g} and {totals[1]:.7g} in problem {int(worst)}"
    )


def _explain_nonfinite(problem: Problem, mass_names: Sequence[str]) -> str:
    left, right, a, b, eps = problem
    named = (("cost", left),) if right is None else (("x", left), ("y", right))
    for name, value in named:
        if not torch.isfinite(value).all():
            kind = "NaN" if torch.isnan(value).any() else "inf"
            return f"{name} must be finite, got {kind}; to leave a point out, give it no mass and entries such as 0"
    sides = {"a": a, "b": b}
    for name in mass_names:
        if (sides[_side_of(name)] == 0).all(-1).any():  # divided by a total that has overflowed
            return f"{name} must be masses whose total is finite in {a.dtype}; rescale them"
    return f"the cost is too large for {left.dtype} at eps {eps:g}, results are not finite; rescale both"


def room_to_keep(problem: Problem, keep: bool, backend: str) -> Tensor:
    """The buffer in which solve saves the cost of features for the gradient, which then need not compute it again.

    It is empty where it would take more than half the memory of the features.
    """
    left, right, a, _, _ = problem
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
    """
    f, g, error = solution.f, solution.g, solution.error
    sizes = (problem.a * f.abs()).sum(-1) + (problem.b * g.abs()).sum(-1)
    unit = torch.finfo(f.dtype).eps / 2
    points = max(f.shape[-1] * g.shape[-1], 1)
    return error < tol + unit * (4 * sizes / problem.eps + 2 * (1 + math.log(points)))


def _or_none(kept: Tensor) -> Tensor | None:
    """None for an empty tensor, which stands for it in the operators' schemas."""
    return kept if kept.numel() else None


@torch.library.custom_op("otloss::solve", mutates_args=())
def solve(
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
    accelerate: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """f, g, transport cost, value, iterations, error, the shift of a dense cost (two tensors), and what is kept.

    The last three are empty where there is no such thing.
    ``log_totals (B, 2)`` are the logarithms of the masses' totals before normalising. ``given`` holds the names of the
    arguments by which masses came, separated by blanks, as "log_a b"; a marginal that is not named is uniform. ``keep``
    says that an implicit gradient may follow.
    """
    problem, mass_names = Problem(left, right, a, b, eps), given.split()
    checked = _checks_on(left)
    all_live = not checked or _check_marginals(a, b, log_totals, mass_names, mass_tol)
    kept = room_to_keep(problem, keep, backend)
    with no_autocast(left):
        solution = get_backend(backend).solve(problem, max_iter, tol, _or_none(kept), accelerate)
    if checked:
        # An entry between two points without mass appears in no output, but it does in gradients.
        hidden: tuple[Tensor, ...] = () if all_live else (left,) if right is None else (left, right)
        if not all(map(_finite, (solution.transport_cost, solution.f, solution.g, *hidden))):
            raise ValueError(_explain_nonfinite(problem, mass_names))
        error = solution.error
        if tol > 0 and error.numel() and float(error.max()) >= tol and not converged(problem, solution, tol).all():
            # The text holds no figures of this call, so that Python shows it once.
            warn(
                f"problems did not reach tol={tol:g} in max_iter={max_iter} iterations at eps={eps:g} "
                "(see converged and marginal_error); raise max_iter, tol or eps",
                ConvergenceWarning,
            )
    *outputs, shift = solution
    if shift is None:
        shift = Shift(a.new_zeros(a.shape), a.new_zeros(b.shape)) if right is None else _no_shift(a)
    return _contiguous(*outputs, *shift, kept)


def _no_shift(like: Tensor) -> Shift:
    return Shift(like.new_empty(0), like.new_empty(0))


@solve.register_fake
def _(left, right, a, b, log_totals, given, mass_tol, eps, max_iter, tol, accelerate, keep, backend):  # type: ignore[no-untyped-def]
    scalar = a.new_empty(a.shape[0])
    of_rows, of_columns = (torch.empty_like(mass, memory_format=torch.contiguous_format) for mass in (a, b))
    shift = Shift(torch.empty_like(of_rows), torch.empty_like(of_columns)) if right is None else _no_shift(a)
    return (
        of_rows,
        of_columns,
        scalar,
        torch.empty_like(scalar),
        torch.empty_like(scalar, dtype=torch.int64),
        torch.empty_like(scalar),
        *shift,
        room_to_keep(Problem(left, right, a, b, eps), keep, backend),
    )


@torch.library.custom_op("otloss::implicit_gradient", mutates_args=())
def implicit_gradient(
    left: Tensor,
    right: Tensor | None,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    row_shift: Tensor,
    column_shift: Tensor,
    kept: Tensor,
    grad_cost: Tensor | None,
    grad_value: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    eps: float,
    adjoint: bool,
    need_cost: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of left, right, a and b by the implicit function theorem."""
    problem, upstream = Problem(left, right, a, b, eps), Upstream(grad_cost, grad_value, grad_f, grad_g)
    with no_autocast(left):
        shift = Shift(row_shift, column_shift) if right is None else None
        gradients, residual = get_backend(backend).implicit_gradient(
            problem, f, g, upstream, adjoint, need_cost, _or_none(kept), shift
        )
    if _checks_on(left) and residual.numel() and not float(residual.max()) <= 1e-2:  # so written, NaN warns too
        warn(
            f"the gradient's linear system was left with a relative residual above 1e-2 at eps={eps:g}: "
            "the plan is close to a permutation of blocks; raise eps or use float64",
            ConvergenceWarning,
        )
    return _contiguous(*gradients)


def _fake_gradients(left: Tensor, right: Tensor | None, a: Tensor, b: Tensor, need_cost: bool) -> Gradients:
    empty = a.new_empty(0)
    like = torch.contiguous_format
    return Gradients(
        torch.empty_like(left, memory_format=like) if need_cost else empty,
        torch.empty_like(right, memory_format=like) if need_cost and right is not None else a.new_empty(0),
        torch.empty_like(a, memory_format=like),
        torch.empty_like(b, memory_format=like),
    )


@implicit_gradient.register_fake
def _(left, right, a, b, f, g, rows, columns, kept, gc, gv, gf, gg, eps, adjoint, need_cost, backend):  # type: ignore[no-untyped-def]
    return _fake_gradients(left, right, a, b, need_cost)


@torch.library.custom_op("otloss::unrolled_gradient", mutates_args=())
def unrolled_gradient(
    left: Tensor,
    right: Tensor | None,
    a: Tensor,
    b: Tensor,
    n_iter: Tensor,
    grad_cost: Tensor | None,
    grad_value: Tensor | None,
    eps: float,
    need_cost: bool,
    max_iter: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of left, right, a and b through the iterations that were run, of which none took over max_iter."""
    problem, upstream = Problem(left, right, a, b, eps), Upstream(grad_cost, grad_value)
    # While a CUDA graph is captured the host cannot read n_iter.
    capturing = n_iter.is_cuda and torch.cuda.is_current_stream_capturing()
    longest = max_iter if capturing else int(n_iter.max()) if n_iter.numel() else 0
    with no_autocast(left):
        gradients = get_backend(backend).unrolled_gradient(problem, n_iter, upstream, need_cost, longest)
    return _contiguous(*gradients)


@unrolled_gradient.register_fake
def _(left, right, a, b, n_iter, gc, gv, eps, need_cost, max_iter, backend):  # type: ignore[no-untyped-def]
    return _fake_gradients(left, right, a, b, need_cost)


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


for _op in (solve, implicit_gradient, unrolled_gradient):
    _op.register_vmap(_fold_batch(_op))
