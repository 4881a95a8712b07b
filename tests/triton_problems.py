"""Problems, tolerances and comparisons of the tests of the Triton kernels (triton_*.py).

Every regime is proven on shapes that are no multiple of a tile, with rows and columns without mass: the fixture
``regime`` lowers ``LIMITS`` so that small shapes reach the kernels of large ones, and one case of each has the size
that reaches it by itself.

Tolerances as in ``test_cpu.py``: an entry of the plan is known to about ``u c / eps``, u = 2^-24 (2^-53), c the
cost; a gradient of the plan to 1/eps times that, and through the adjoint system to its condition times that.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import reference_solution
from torch import Tensor

from otloss.backends import reference, triton
from otloss.backends.protocol import Problem, Shift, Solution, Upstream

EPS = 0.1
DTYPES = (torch.float32, torch.float64)
Given = tuple[Tensor, Tensor | None, Tensor, Tensor]
KINDS = ("dense", "features")
SIZES = [(1, 7), (9, 1), (21, 38)]
REGIMES = {
    "small": {"small": 64, "medium": 1024},
    "medium": {"small": 0, "medium": 1024},
    "large": {"small": 0, "medium": 0},
    "streamed": {"small": 0, "medium": 0},
}


def slack(dtype: torch.dtype, eps: float = EPS, room: float = 16.0) -> float:
    return room * torch.finfo(dtype).eps / 2 * max(1.0, 2.0 / eps)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Largest difference, relative to the largest entry wanted; what vanishes is what is left of terms above 0.1."""
    assert got.shape == want.shape and got.isfinite().all()
    size = max(float(want.abs().max()), 0.1) if want.numel() else 0.1
    difference = float((got.double() - want).abs().max()) if want.numel() else 0.0
    assert difference <= tolerance * size, (difference / size, tolerance)


def check_reads_what_is_written(everything: Callable[[], list[Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, all of them finite, where new memory is filled with NaN and with the largest integers."""
    torch.manual_seed(1)
    want = everything()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        torch.manual_seed(1)
        got = everything()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, got, want)) and all(x.isfinite().all() for x in got)


def problem(kind: str, n: int, m: int, dtype: torch.dtype, batch: int = 2, d: int = 5, masked: bool = True) -> Given:
    """Features or their cost, and masses, of which every fifth is none where there are enough."""
    x, y = torch.randn(batch, n, d, dtype=torch.float64), torch.randn(batch, m, d, dtype=torch.float64)
    a, b = (torch.randn(batch, k, dtype=torch.float64).softmax(-1) for k in (n, m))
    if masked:
        a, b = (mass * (torch.arange(mass.shape[1]) % 5 != 3) for mass in (a, b))
        a, b = (mass / mass.sum(-1, keepdim=True) for mass in (a, b))
    left, right = (x, y) if kind == "features" else (reference.dense_cost(x, y), None)
    return left.to(dtype), None if right is None else right.to(dtype), a.to(dtype), b.to(dtype)


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def upstream(a: Tensor, b: Tensor) -> Upstream:
    w, v, p, q = torch.randn_like(a[:, 0]), torch.randn_like(a[:, 0]), torch.randn_like(a) * a, torch.randn_like(b) * b
    return Upstream(w, v, p, q + b * (p.sum(-1) - q.sum(-1)).unsqueeze(-1))


def whole_solution(problem: Problem, max_iter: int, tol: float) -> Solution:
    """The solution with the potentials of the cost as it was given."""
    solution = triton.solve(problem, max_iter, tol)
    assert (solution.shift is None) == (problem.right is not None)
    f, g = reference.unshifted(solution, problem.a, problem.b)
    return solution._replace(f=f, g=g, shift=None)


def check_solve(given: Given, eps: float, iterations: int, room: float = 16.0) -> None:
    dtype = given[2].dtype
    got = whole_solution(Problem(*given, eps), iterations, 0.0)
    want = reference_solution(Problem(*wide(*given), eps), iterations, 0.0)
    for one, other in zip(got[:4], want[:4], strict=True):
        close(one, other, slack(dtype, eps, room))
    assert got[4].tolist() == [iterations] * len(given[0])
    assert torch.allclose(got[5].double(), want[5], rtol=1e-2, atol=slack(dtype, eps, room))


def check_implicit(given: Given, adjoint: bool = True, lost: tuple[int, int] | None = None) -> None:
    """``lost`` are a row and a column without mass that are forbidden to all: their gradients mean nothing."""
    left, right, a, b = given
    exact = Problem(*wide(*given), EPS)
    solution = reference.solve(exact, 300, 1e-12)
    f, g, up = solution.f.to(a.dtype), solution.g.to(a.dtype), upstream(a, b)
    shift = None if solution.shift is None else Shift(*(x.to(a.dtype) for x in solution.shift))
    got, residual = triton.implicit_gradient(Problem(*given, EPS), f, g, up, adjoint, True, shift=shift)
    same = None if shift is None else Shift(*(x.double() for x in shift))
    want, _ = reference.implicit_gradient(exact, *wide(f, g), Upstream(*wide(*up)), adjoint, True, shift=same)
    for k, (one, other) in enumerate(zip(got, want, strict=True)):
        if k in (2, 3) and lost is not None:
            kept = torch.arange(one.shape[1]) != lost[k - 2]
            one, other = one[:, kept], other[:, kept]
        if k in (2, 3):  # up to a constant: the gauge of U and V is free
            one, other = one - one.mean(-1, keepdim=True), other - other.mean(-1, keepdim=True)
        close(one, other, slack(a.dtype, room=300.0))
    assert (residual < (1e-5 if a.dtype == torch.float32 else 1e-10)).all()
    assert got[0].dtype == left.dtype and (right is None or got[1].dtype == right.dtype)


def check_unrolled(given: Given, counts: list[int]) -> None:
    w, v, *_ = upstream(given[2], given[3])
    n_iter = torch.tensor(counts)
    exact, up = Problem(*wide(*given), EPS), Upstream(w.double(), v.double())
    got = triton.unrolled_gradient(Problem(*given, EPS), n_iter, Upstream(w, v), True, max(counts))
    want = reference.unrolled_gradient(exact, n_iter, up, True, max(counts))
    for one, other in zip(got, want, strict=True):
        close(one, other, slack(given[2].dtype, room=100.0))
