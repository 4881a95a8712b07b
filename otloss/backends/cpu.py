"""The C++ kernels in csrc/, called by address.

Float32 or float64 tensors on the CPU, one leading batch dimension. ``left`` is the cost ``(B, n, m)`` when ``right``
is ``None``, else ``left, right`` are features ``(B, n, d)``, ``(B, m, d)`` whose cost stays
in scratch, unless it is asked for in ``kept``. Everything is summed in an order that a problem's shape fixes: results
do not depend on the batch or on the number of threads.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

TWICE_DIFFERENTIABLE = False
KEEPS_COST = True
READS_HALF = False
MOST_POINTS = 1 << 30  # rounded up to vectors, in 32 bits

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


class _Problem:
    """The inputs made contiguous and kept alive, with the shapes read off once."""

    def __init__(
        self, left: Tensor, right: Tensor | None, a: Tensor, b: Tensor, eps: float, kept: Tensor | None = None
    ) -> None:
        reason = status()
        if _C is None or reason is not None:
            raise RuntimeError(f"the cpu backend cannot be used: {reason}")
        if left.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"the cpu backend takes float32 or float64, not {left.dtype}")
        self.left, self.a, self.b = left.contiguous(), a.contiguous(), b.contiguous()
        self.right = None if right is None else right.contiguous()
        self.count, self.n, last = left.shape
        self.m, d = (last, 0) if right is None else (right.shape[1], last)
        if max(self.n, self.m, d) >= MOST_POINTS:
            raise ValueError(f"the cpu backend takes less than 2^30 points and features, got {(self.n, self.m, d)}")
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
        )

    def empty(self, *shape: int) -> Tensor:
        return self.left.new_empty((self.count, *shape))

    def gradients(self, need_cost: bool) -> tuple[Tensor, Tensor]:
        nothing = self.left.new_empty(0)
        if not need_cost:
            return nothing, self.left.new_empty(0)
        return torch.empty_like(self.left), nothing if self.right is None else torch.empty_like(self.right)

    def call(self, kernel: str, *arguments: object) -> None:
        getattr(_C, f"{kernel}_{self.suffix}")(self.inputs, *arguments, torch.get_num_threads())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def solve(
    left: Tensor,
    right: Tensor | None,
    a: Tensor,
    b: Tensor,
    eps: float,
    max_iter: int,
    tol: float,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``f, g, transport_cost, value, n_iter, error``, after ``max_iter`` iterations or at an L1 error below ``tol``.

    The cost of features is written to ``kept (B, n, m)``.
    """
    problem = _Problem(left, right, a, b, eps, kept)
    f, g, cost, value, error = (problem.empty(*shape) for shape in ((problem.n,), (problem.m,), (), (), ()))
    n_iter = torch.empty(problem.count, dtype=torch.int64)
    out = (f, g, cost, value, n_iter, error)
    problem.call("solve", max_iter, tol, *(tensor.data_ptr() for tensor in out))
    return out


def implicit_gradient(
    left: Tensor,
    right: Tensor | None,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    grad_cost: Tensor | None,
    grad_value: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    eps: float,
    adjoint: bool,
    need_cost: bool,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``grad_left, grad_right, grad_a, grad_b, residual`` of the converged problem (csrc/adjoint.hpp).

    ``grad_f`` and ``grad_g`` have equal totals. Without ``adjoint`` the plan is a constant. The gradients of the masses
    are not projected. ``grad_right`` is empty for a dense cost, both are without ``need_cost``. ``kept`` is
    what ``solve`` wrote there.
    """
    kept = None if kept is None else kept.contiguous()
    problem = _Problem(left, right, a, b, eps, kept)
    upstream = _contiguous(f, g, grad_cost, grad_value, grad_f, grad_g)
    grad_left, grad_right = problem.gradients(need_cost)
    out = (grad_left, grad_right, problem.empty(problem.n), problem.empty(problem.m), problem.empty())
    problem.call("implicit", *map(_address, upstream), adjoint, *map(_address, out))
    return out


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
    max_iter: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``grad_left, grad_right, grad_a, grad_b`` through the ``n_iter`` iterations that were run (csrc/unroll.hpp).

    ``max_iter``, the contract's bound on ``n_iter``, is not needed: each problem runs its own number.
    """
    problem = _Problem(left, right, a, b, eps)
    upstream = _contiguous(n_iter, grad_cost, grad_value)
    grad_left, grad_right = problem.gradients(need_cost)
    out = (grad_left, grad_right, problem.empty(problem.n), problem.empty(problem.m))
    problem.call("unrolled", *map(_address, upstream), *map(_address, out))
    return out
