"""``python -m benchmarks.correctness``: which library's gradients are right, by finite differences in float64.

There is one problem of 6 x 5 points with random, non-uniform marginals and eps 0.2. The true derivatives are central
differences of the converged problem: by every entry of the cost, and by the marginal along directions that keep its
total. The figure of a library is its largest error, divided by the largest true derivative.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import otloss
from benchmarks import report, results
from benchmarks.machine import environment
from benchmarks.readme import write_pages

EPS = 0.2
Outputs = tuple[Tensor | None, Tensor | None]  # <T, C> and the regularised value, None where there is none
Solver = Callable[[Tensor, Tensor, Tensor], Outputs]


def _problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(6, 5, generator=generator, dtype=torch.float64)
    a, b = (torch.randn(k, generator=generator, dtype=torch.float64).softmax(-1) for k in (6, 5))
    return cost, a, b


def _ours(cost: Tensor, a: Tensor, b: Tensor) -> Outputs:
    out = otloss.sinkhorn(cost, a, b, eps=EPS, tol=1e-13, max_iter=10_000)
    return out.transport_cost, out.value


def _true(cost: Tensor, a: Tensor, b: Tensor) -> Outputs:
    with otloss.use_backend("reference"):
        return _ours(cost, a, b)


def _pot_solve(cost: Tensor, a: Tensor, b: Tensor) -> Outputs:
    import ot

    result = ot.solve(cost, a, b, reg=EPS, reg_type="KL", grad="envelope", max_iter=10_000, tol=1e-13)
    return result.value_linear, result.value


def _pot_batch(grad: str) -> Solver:
    def solve(cost: Tensor, a: Tensor, b: Tensor) -> Outputs:
        import ot.batch

        result = ot.batch.solve_batch(
            cost[None],
            EPS,
            a[None],
            b[None],
            method="log_sinkhorn",
            reg_type="kl",
            grad=grad,
            max_iter=2000,
            tol=1e-13,
        )
        return result.value_linear.sum(), result.value.sum()

    return solve


def _geomloss(cost: Tensor, a: Tensor, b: Tensor) -> Outputs:
    import geomloss.ot

    result = geomloss.ot.solve_batch(cost[None], reg=EPS, a=a[None], b=b[None], max_iter=2000)
    return None, result.value.sum()


SOLVERS: dict[str, Solver] = {
    "otloss": _ours,
    "POT `ot.solve`, KL, envelope": _pot_solve,
    "POT `ot.batch`, KL, envelope (its default)": _pot_batch("envelope"),
    "POT `ot.batch`, KL, last_step": _pot_batch("last_step"),
    "POT `ot.batch`, KL, autodiff": _pot_batch("autodiff"),
    "geomloss `ot.solve_batch`": _geomloss,
}


def _differences(which: int, by: str, problem: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Directions, one in each row, and the true derivative along each of them."""
    position = {"cost": 0, "a": 1, "empty": 1}[by]
    at = problem[position]
    directions = torch.eye(at.numel(), dtype=torch.float64)
    if position == 1:  # mass moves from the first row to another one
        directions = directions[1:] - directions[0]
    if by == "empty":
        directions = directions[[1]]  # row 2 is empty, so that mass can only be added there
    step, derivatives = 1e-5, []
    for direction in directions.reshape(-1, *at.shape):

        def along(t: float, direction: Tensor = direction) -> float:
            moved = [*problem]
            moved[position] = at + t * direction
            out = _true(*moved)[which]
            assert out is not None
            return float(out)

        if by == "empty":
            derivatives.append((-3 * along(0) + 4 * along(step) - along(2 * step)) / (2 * step))
        else:
            derivatives.append((along(step) - along(-step)) / (2 * step))
    return directions, torch.tensor(derivatives, dtype=torch.float64)


def error(solver: Solver, column: str, problem: tuple[Tensor, Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> Any:
    """The largest relative error, or a word: "none" where there is no gradient, "nan" where it is not finite."""
    which, position = (0 if column.startswith("sharp") else 1), (0 if column.endswith("cost") else 1)
    leaves = [t.clone() for t in problem]
    leaves[position].requires_grad_()
    out = solver(*leaves)[which]
    if out is None or not out.requires_grad:
        return "none"
    (grad,) = torch.autograd.grad(out, leaves[position], allow_unused=True)
    if grad is None:
        return "none"
    directions, true = truth
    found = directions @ grad.flatten()
    if not found.isfinite().all():
        return "nan"
    return float((found - true).abs().max() / true.abs().max())


def main() -> None:
    warnings.simplefilter("ignore")
    problem = _problem()
    cost, a, b = problem
    emptied = a.clone()
    emptied[2] = 0
    empty = (cost, emptied / emptied.sum(), b)
    found: dict[str, Any] = {"environment": environment(), "errors": {name: {} for name in SOLVERS}}
    for column in report.GRADIENTS:
        kind, by = column.split("_")
        where = empty if by == "empty" else problem
        truth = _differences(0 if kind == "sharp" else 1, by, where)
        for name, solver in SOLVERS.items():
            found["errors"][name][column] = error(solver, column, where, truth)
    results.save(results.CORRECTNESS, found)
    write_pages()
    print(report.gradients(found))


if __name__ == "__main__":
    main()
