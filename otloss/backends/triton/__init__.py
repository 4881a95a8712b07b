"""Triton kernels for NVIDIA GPUs, chosen for CUDA tensors.

The masses are float32 or float64, and everything is computed in their precision. Cost or features may also be float16
or bfloat16. A half-precision cost is read without a copy. Of half-precision features only the unit rows and the cost
are stored, in float32. The gradient by cost or features is rounded once per call. Where the plan is differentiated too,
autograd adds its part in the inputs' precision. Results are the same in every run: there are no atomics, and the orders
of summation are fixed.

The cost of features is stored while a call runs: at most 32 MiB of it at a time, and as much of its gradient
(``config.STORED_BYTES``). A larger batch is solved in groups of problems. The cost of one problem that is larger is not
stored; in float64 it is, one problem at a time.

Without a GPU, set ``TRITON_INTERPRET=1`` in the environment before the first import: then Triton's interpreter runs the
kernels on CPU tensors. It is slow, and meant for tests.

This file is the backend's door: the functions that every backend has. It imports the library ``triton``, and the
modules beside it, only when one of them is called.

=============  ======================================================================================================
``tiles``      what the kernels share: a tile of cost, the kernel on it, half-steps
``small``      n, m up to 64: one program per problem, every iteration in one launch
``rows``       n, m up to 1024: blocks of whole rows, one launch and one pass over the cost per iteration
``stream``     any size: tiles of a streaming pass, columns split where rows are few
``relaxed``    penalties: n, m up to 64, and what ends an iteration of large problems; ``rows`` has its own branches
``mixed``      the steps of a set with itself, in each regime, and which problems are such
``adjoint``    conjugate gradients between those passes
``product``    the cost of features, and the way back from its gradient
``contract``   gradients of the cost; contracted at once where the cost is not stored
``features``   unit rows, centred points, and the way back
``config``     which kernel for which size, and its tile
``compat``     what differs between versions of Triton
``launch``     a problem's views and how kernels are launched; ``solver`` and ``gradient`` order the launches
``penalties``  outputs and gradients under penalties, by those of a problem with constraints that has the same plan
=============  ======================================================================================================

Where new parts belong. Other iterations than the plain and the mixed ones, such as those of ``quasi_newton.py``, stand
beside ``_medium`` and ``_large`` in ``solver``: a sweep is ``DeviceProblem.half_step`` of both views, the rest vectors.
They decide on the device, as ``mixed`` does, because one look from the host costs as much as many iterations. Another
cost of features is another branch of ``cost_tile`` and another ``product``, with its way back in ``contract`` and
``features``.

Each module states its equations and its roofline: operations per unit at the sustained rates of one H100 (A100):
495 (156) TFLOP/s of dense TF32, 132 (108) multiprocessors at 1.7 (1.4) GHz with 128 (64) float32 instructions and 16
exponentials per clock, 3.35 (1.55) TB/s of memory. These are predictions: nothing here has run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from otloss.backends.masses import by_given as by_given
from otloss.backends.masses import normalise as normalise
from otloss.backends.masses import worst_error as worst_error
from otloss.backends.protocol import COLD, NOTHING, Gradients, Problem, Shift, Solution, Start, Upstream, is_relaxed

TWICE_DIFFERENTIABLE = False
RELAXES = True
KEEPS_COST = True
KINDS: tuple[str, ...] = ("cosine", "sqeuclidean", "dot")
READS_HALF = True

Result = TypeVar("Result", Solution, Gradients)

# Read once, as Triton itself does at its import.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INSTALLED = importlib.util.find_spec("triton") is not None
_HOW_TO_TEST = "to try its kernels on the CPU, set TRITON_INTERPRET=1 before the first import (slow: for tests)"


def _version(*names: str) -> str | None:
    """The version of a package, under the first of these names that is installed; None if it is not known."""
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _numbers(version: str | None) -> tuple[int, int] | None:
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(numbers[1]), int(numbers[2])) if numbers else None


def _too_old(version: str | None) -> str | None:
    """Why the kernels do not run under this version: see ``compat.py``."""
    if (_numbers(version) or (3, 3)) >= (3, 3):
        return None
    return f"its kernels need Triton 3.3, which PyTorch 2.7 brings, and this is {version}"


def _misfit(triton_version: str | None) -> str | None:
    """Why the interpreter of this version does not run here."""
    if (_numbers(triton_version) or (3, 8)) >= (3, 8) or (_numbers(_version("numpy")) or (0, 0)) < (2, 4):
        return None
    return (
        f'the interpreter of Triton {triton_version} fails with NumPy 2.4 or newer ("only 0-dimensional arrays can be '
        'converted"); install numpy<2.4'
    )


# Computed once: status() is called at every choice of a backend, and torch.compile traces it.
_TRITON = _version("triton", "pytorch-triton", "triton-windows")
_TOO_OLD = _too_old(_TRITON)
_MISFIT = _misfit(_TRITON)


def status() -> str | None:
    """``None`` when the kernels can be used, else why not."""
    if not _INSTALLED:
        return "the package triton is not installed; PyTorch's CUDA builds for Linux bring it"
    if _TOO_OLD is not None:
        return _TOO_OLD
    if _INTERPRETED:
        return _MISFIT
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return f"PyTorch sees no CUDA device; {_HOW_TO_TEST}"
    return None


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, which takes CPU tensors."""
    return _INTERPRETED


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _groups(problem: Problem, kept: Tensor | None) -> Iterator[tuple[slice, Problem, Tensor | None]]:
    """The problems, all at once or as many at a time as the bound on the stored cost of features allows."""
    reason = status()
    if reason is not None:
        raise RuntimeError(f"the triton backend cannot be used: {reason}")
    from otloss.backends.triton import config

    left, right, a, b = problem.left, problem.right, problem.a, problem.b
    count, n, m = a.shape[0], a.shape[1], b.shape[1]
    groups = 1 if right is None else config.groups(count, n, m, a.dtype == torch.float64)
    size = -(-count // max(groups, 1))
    for start in range(0, max(count, 1), max(size, 1)):
        part = slice(start, start + size)
        yield (
            part,
            problem._replace(
                left=left[part],
                right=None if right is None else right[part],
                a=a[part],
                b=b[part],
                rho_a=None if problem.rho_a is None else problem.rho_a[part],
                rho_b=None if problem.rho_b is None else problem.rho_b[part],
            ),
            None if kept is None else kept[part].contiguous(),
        )


def _part(upstream: Upstream, part: slice) -> Upstream:
    return Upstream(*(None if grad is None else grad[part] for grad in upstream))


def _joined(parts: list[Result]) -> Result:
    """One named tuple from those of each group. What one leaves out, all do."""
    if len(parts) == 1:
        return parts[0]
    of_fields: Any = zip(*parts, strict=True)
    fields = (each[0] if each[0] is None or each[0] is NOTHING else torch.cat(each) for each in of_fields)
    make: Callable[..., Result] = type(parts[0])
    return make(*fields)


def solve(
    problem: Problem,
    max_iter: int,
    tol: float,
    kept: Tensor | None = None,
    accelerate: bool = False,
    start: Start = COLD,
) -> Solution:
    """The solution after ``max_iter`` iterations or at an L1 error below ``tol``.

    The minima of rows and columns are taken out of a dense cost first, unless there are penalties; ``solver.solve``
    says what that and the rest cost. The cost of features is written to ``kept (B, n, m)``. Iterations are the plain
    ones; with ``accelerate`` the problem of a set with itself takes mixed steps (``mixed.py``).
    """
    with _on(problem.left):
        parts = []
        for part, group, room in _groups(problem, kept):
            from otloss.backends.triton import launch, solver  # imports the library

            first = None if start.g is None else start.g[part].contiguous()
            parts.append(solver.solve(launch.DeviceProblem(group, room), max_iter, tol, first, accelerate))
        return _joined(parts)


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
    """Gradients of the converged problem and the residual of its adjoint system.

    ``kept`` is what ``solve`` wrote there, ``shift`` that of its solution.
    """
    with _on(problem.left):
        parts, residuals = [], []
        for part, group, made in _groups(problem, kept):
            from otloss.backends.triton import gradient, launch, penalties

            whole = shift is None or problem.right is not None or is_relaxed(problem)  # nothing was taken out
            taken = None if whole else Shift(*(x[part] for x in shift or ()))
            prepared = launch.DeviceProblem(group, made, made is not None, taken)
            differentiate = (penalties if is_relaxed(problem) else gradient).implicit_gradient
            gradients, residual = differentiate(prepared, f[part], g[part], _part(upstream, part), adjoint, need_cost)
            parts.append(gradients)
            residuals.append(residual)
        return _joined(parts), torch.cat(residuals)


def unrolled_gradient(
    problem: Problem, n_iter: Tensor, upstream: Upstream, need_cost: bool, max_iter: int
) -> Gradients:
    """Gradients through the ``n_iter`` iterations that were run, at most ``max_iter``."""
    with _on(problem.left):
        parts = []
        for part, group, _ in _groups(problem, None):
            from otloss.backends.triton import gradient, launch

            prepared, given = launch.DeviceProblem(group), _part(upstream, part)
            parts.append(gradient.unrolled_gradient(prepared, n_iter[part], given, need_cost, max_iter))
        return _joined(parts)
