"""The C++ kernels in csrc/, called by address.

They take float32 or float64 tensors on the CPU. The cost of features stays in scratch, unless it is asked for in
``kept``. Everything is summed in an order that a problem's shape fixes: results do not depend on the batch or on the
number of threads.
"""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from otloss.backends import masses, processors
from otloss.backends.protocol import (
    COLD,
    NOTHING,
    Given,
    Gradients,
    Problem,
    Shift,
    Solution,
    Start,
    Upstream,
    is_relaxed,
)

TWICE_DIFFERENTIABLE = False
RELAXES = True
KEEPS_COST = True
KINDS: tuple[str, ...] = ("cosine", "sqeuclidean", "dot")  # in the order of csrc/problem.hpp
READS_HALF = False
MOST_POINTS = 1 << 30  # rounded up to vectors, in 32 bits
PROCESSORS = processors.available()  # no call takes more threads

# Read once, so that torch.compile sees plain strings.
_C: ModuleType | None
try:
    _C = importlib.import_module("otloss._C")
    _LEVEL: str = _C.level()
    _PROBLEM: str | None = _C.problem() or None
except ImportError as error:
    _C, _LEVEL = None, ""
    _PROBLEM = (
        f"the extension otloss._C is not built ({error}); "
        "run `pip install .` with a C++17 compiler (GCC 12, Clang 12 or newer) and, if build isolation is off, pybind11"
    )


def status() -> str | None:
    """``None`` when the kernels can be used, else why not."""
    return _PROBLEM


def level() -> str:
    """The instruction level in use: ``"v4"`` (AVX-512), ``"v3"`` (AVX2) or ``"baseline"``; ``""`` when unusable."""
    return _LEVEL


def _check_size(problem: Problem) -> None:
    (_, n, last), right = problem.left.shape, problem.right
    m, d = (last, 0) if right is None else (right.shape[1], last)
    if max(n, m, d) >= MOST_POINTS:
        raise ValueError(f"the cpu backend takes less than 2^30 points and features, got {(n, m, d)}")


def _is_one(x: Tensor) -> bool:
    """Whether all problems of a batch share a cost or features, which kernels then read from one place."""
    return x.stride(0) == 0 and x.shape[0] > 1 and x[0].is_contiguous()


class _KernelCall:
    """A problem's inputs made contiguous and kept alive, with the shapes read off once; ``run`` calls a kernel."""

    def __init__(self, problem: Problem, kept: Tensor | None = None, shift: Shift | None = None) -> None:
        reason = status()
        if _C is None or reason is not None:
            raise RuntimeError(f"the cpu backend cannot be used: {reason}")
        left, right, a, b, eps = problem.left, problem.right, problem.a, problem.b, problem.eps
        if left.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"the cpu backend takes float32 or float64, not {left.dtype}")
        _check_size(problem)
        one_left, one_right = _is_one(left), right is not None and _is_one(right)
        self.left, self.a, self.b = left if one_left else left.contiguous(), a.contiguous(), b.contiguous()
        self.right = right if right is None or one_right else right.contiguous()
        self.count, self.n, last = left.shape
        self.m, d = (last, 0) if right is None else (right.shape[1], last)
        self.rho_a, self.rho_b = (None if rho is None else rho.contiguous() for rho in (problem.rho_a, problem.rho_b))
        self.relaxed = is_relaxed(problem)
        self.suffix = "float32" if left.dtype == torch.float32 else "float64"
        self.inputs = _C.Inputs(
            self.left.data_ptr(),
            _address(self.right),
            self.a.data_ptr(),
            self.b.data_ptr(),
            self.count,
            self.n,
            self.m,
            d,
            eps,
            _address(kept),
            *((0, 0) if shift is None else (shift.rows.data_ptr(), shift.columns.data_ptr())),
            0 if right is None else KINDS.index(problem.kind),
            _address(self.rho_a),
            _address(self.rho_b),
            one_left,
            one_right,
        )

    def empty(self, *shape: int) -> Tensor:
        return self.left.new_empty((self.count, *shape))

    def gradients(self, need_cost: bool) -> Gradients:
        """Room for the gradients that are asked for."""
        like, left, right = partial(torch.empty_like, memory_format=torch.contiguous_format), self.left, self.right
        return Gradients(
            like(left) if need_cost else NOTHING,
            like(right) if need_cost and right is not None else NOTHING,
            like(self.a),
            like(self.b),
            self.empty(2) if self.relaxed else NOTHING,
        )

    def run(self, kernel: str, *arguments: object) -> None:
        try:
            getattr(_C, f"{kernel}_{self.suffix}")(self.inputs, *arguments, min(torch.get_num_threads(), PROCESSORS))
        except MemoryError as error:
            of = "" if self.right is None else f" with {self.right.shape[2]} features each"
            points = f"{self.n} x {self.m} points{of} in {self.suffix}"
            raise MemoryError(f"the cpu backend has no memory for a problem of {points}: {error}") from None


def _kernel(name: str, like: Tensor) -> Any:
    return getattr(_C, f"{name}_float64" if like.dtype == torch.float64 else f"{name}_float32")


_FORMS = {"uniform": 0, "masses": 1, "logs": 2}  # as in csrc/problem.hpp
_INVALID, _ALL_LIVE = 0, 2


def _side(given: Tensor, form: str, share: Tensor) -> Any:
    return _C.Side(given.data_ptr(), _FORMS[form], share.shape[1], share.data_ptr())  # type: ignore[union-attr]


def normalise(problem: Problem, given: Given, check: bool) -> tuple[Problem, bool]:
    """The problem with masses of total 1, and whether every point has mass (csrc/masses.hpp).

    Raises:
        ValueError: masses are invalid, if ``check``.
    """
    if is_relaxed(problem):
        return masses.normalise(problem, given, check)
    _check_size(problem)
    of_a, of_b = problem.a.contiguous(), problem.b.contiguous()
    a, b = torch.empty_like(of_a), torch.empty_like(of_b)
    sides = _side(of_a, given.a, a), _side(of_b, given.b, b)
    found = _kernel("normalise", a)(*sides, a.shape[0], given.tolerance)
    if found == _INVALID:
        return masses.normalise(problem, given, check)  # which says what is wrong
    return problem.with_masses(a, b), found == _ALL_LIVE


def by_given(problem: Problem, given: Given, a: Tensor, b: Tensor, by_a: Tensor, by_b: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by the masses as they were given, from those by a and b of total 1 (csrc/masses.hpp)."""
    if is_relaxed(problem):
        return masses.by_given(problem, given, a, b, by_a, by_b)
    return _by_given(problem.a, given.a, a, by_a), _by_given(problem.b, given.b, b, by_b)


def _by_given(mass: Tensor, form: str, share: Tensor, grad: Tensor) -> Tensor:
    if form == "uniform":
        return NOTHING
    mass, share, grad = mass.contiguous(), share.contiguous(), grad.contiguous()
    out = torch.empty_like(grad)
    _kernel("by_given", share)(_side(mass, form, share), share.shape[0], grad.data_ptr(), out.data_ptr())
    return out


def worst_error(solution: Solution) -> float:
    """The largest error of a solution; NaN where a potential or a transport cost is not finite."""
    f, g, cost, error = solution.f, solution.g, solution.transport_cost, solution.error
    addresses = f.data_ptr(), f.shape[1], g.data_ptr(), g.shape[1], cost.data_ptr(), error.data_ptr()
    return _kernel("worst_error", f)(*addresses, f.shape[0])  # type: ignore[no-any-return]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _contiguous(upstream: Upstream) -> Upstream:
    return Upstream(*[None if tensor is None else tensor.contiguous() for tensor in upstream])


def _upstream_addresses(upstream: Upstream) -> object:
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in upstream]
    return _C.UpstreamAddresses(*addresses)  # type: ignore[union-attr]


def _gradient_addresses(gradients: Gradients, residual: Tensor | None) -> object:
    addresses = [grad.data_ptr() for grad in gradients]
    return _C.GradientAddresses(*addresses[:4], _address(residual), addresses[4])  # type: ignore[union-attr]


def solve(
    problem: Problem,
    max_iter: int,
    tol: float,
    kept: Tensor | None = None,
    accelerate: bool = False,
    start: Start = COLD,
) -> Solution:
    """The solution after ``max_iter`` sweeps or at an L1 error below ``tol`` (csrc/solve.hpp, csrc/quasi_newton.hpp).

    Problems with penalties have kernels of their own (csrc/relaxed.hpp, csrc/relaxed_newton.hpp), and nothing is taken
    out of their costs. The cost of features is written to ``kept (B, n, m)``.
    """
    of_rows, of_columns = problem.a.contiguous(), problem.b.contiguous()
    shifts = problem.right is None and not is_relaxed(problem)
    shift = None if not shifts else Shift(torch.empty_like(of_rows), torch.empty_like(of_columns))
    call = _KernelCall(problem, kept, shift)
    f, g, cost = torch.empty_like(of_rows), torch.empty_like(of_columns), call.empty()
    value, error, n_iter = torch.empty_like(cost), torch.empty_like(cost), torch.empty_like(cost, dtype=torch.int64)
    addresses = f.data_ptr(), g.data_ptr(), cost.data_ptr(), value.data_ptr(), n_iter.data_ptr(), error.data_ptr()
    first = None if start.g is None else start.g.contiguous()
    call.run("solve", _address(first), accelerate, max_iter, tol, *addresses)
    return Solution(f, g, cost, value, n_iter, error, shift)


def implicit_gradient(
    problem: Problem,
    f: Tensor,
    g: Tensor,
    upstream: Upstream,
    adjoint: bool,
    need_cost: bool,
    kept: Tensor | None = None,
    shift: Shift | None = None,
) -> tuple[Gradients, Tensor]:
    """Gradients of the converged problem and the residual of its adjoint system (csrc/adjoint.hpp).

    ``kept`` is what ``solve`` wrote there, ``shift`` that of its solution.
    """
    kept = None if kept is None else kept.contiguous()
    shift = None if shift is None or is_relaxed(problem) else Shift(shift.rows.contiguous(), shift.columns.contiguous())
    call = _KernelCall(problem, kept, shift)
    f, g, upstream = f.contiguous(), g.contiguous(), _contiguous(upstream)
    gradients, residual = call.gradients(need_cost), call.empty()
    addresses = _upstream_addresses(upstream), adjoint, _gradient_addresses(gradients, residual)
    call.run("implicit", f.data_ptr(), g.data_ptr(), *addresses)
    return gradients, residual


def unrolled_gradient(
    problem: Problem, n_iter: Tensor, upstream: Upstream, need_cost: bool, max_iter: int
) -> Gradients:
    """Gradients through the ``n_iter`` iterations that were run (csrc/unroll.hpp).

    ``max_iter`` is not needed: each problem runs its own number.
    """
    call = _KernelCall(problem)
    n_iter, upstream = n_iter.contiguous(), _contiguous(upstream)
    gradients = call.gradients(need_cost)
    call.run("unrolled", n_iter.data_ptr(), _upstream_addresses(upstream), _gradient_addresses(gradients, None))
    return gradients
