"""``python -m benchmarks.precision``: float32 against float64 at every eps, and the linear systems of the gradients.

The truth is a float64 solution with marginals right to 1e-11. Two calls are compared with it, both with the default
tol of 1e-5: one in float32, and one in float64, which shows what part of the error tol explains. The transport cost
is differentiated by the features x. The system of the gradient is solved by conjugate gradients; their steps, each one
pass over the plan, and the relative residual that they leave are shown beside. Writes ``results/precision.json`` and
``results/precision.md``.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from typing import Any

import torch

import otloss
from benchmarks import results
from benchmarks.machine import environment
from benchmarks.tolerance import SHAPES, Shape
from otloss.backends import cpu
from otloss.backends.protocol import Problem, Upstream

RESULTS, PAGE = (results.FOLDER / name for name in ("precision.json", "precision.md"))
EPS = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
PROBLEMS = {"channels": 2, "tokens": 4, "positions": 16}
TOL, EXACT_TOL, MAX_ITER = 1e-5, 1e-11, 30_000
MEASURES = ("plan", "transport_cost", "gradient")


def solve(shape: Shape, eps: float, dtype: torch.dtype, tol: float) -> dict[str, Any]:
    """The plans, transport costs and gradients by x of the first problems of a shape, and how they came about."""
    count = PROBLEMS[shape.name]
    x, y, a, b = (t[:count].to(dtype) for t in shape.tensors())
    out = otloss.cosine_sinkhorn(x.requires_grad_(), y, a, b, eps=eps, tol=tol, max_iter=MAX_ITER, backend="cpu")
    (gradient,) = torch.autograd.grad(out.transport_cost.sum(), x)
    kernels = importlib.import_module("otloss._C")
    before = kernels.adjoint_steps()
    upstream = Upstream(torch.ones(count, dtype=dtype), None, None, None)
    f, g = out.f.detach(), out.g.detach()
    _, residual = cpu.implicit_gradient(Problem(x.detach(), y, a, b, eps), f, g, upstream, True, False)
    return {
        "plan": out.plan.detach().double(),
        "transport_cost": out.transport_cost.detach().double(),
        "gradient": gradient.double(),
        "converged": int(out.converged.sum()),
        "sweeps": float(out.n_iter.double().mean()),
        "steps": (kernels.adjoint_steps() - before) / count,
        "residual": float(residual.max()),
    }


def errors(got: dict[str, Any], exact: dict[str, Any]) -> dict[str, float]:
    """The largest of the problems: L1 of the plan, relative of the transport cost, relative 2-norm of the gradient."""
    plan = (got["plan"] - exact["plan"]).abs().sum((-1, -2))
    cost = (got["transport_cost"] / exact["transport_cost"] - 1).abs()
    gradient = (got["gradient"] - exact["gradient"]).norm(dim=(-1, -2)) / exact["gradient"].norm(dim=(-1, -2))
    return {name: float(error.max()) for name, error in zip(MEASURES, (plan, cost, gradient), strict=True)}


def measure(shape: Shape, eps: float) -> dict[str, Any]:
    """One row of the table."""
    exact = solve(shape, eps, torch.float64, EXACT_TOL)
    row: dict[str, Any] = {"problems": PROBLEMS[shape.name], "exact converged": exact["converged"]}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        got = solve(shape, eps, dtype, TOL)
        told = {key: got[key] for key in ("converged", "sweeps", "steps", "residual")}
        row[name] = errors(got, exact) | told
    return row


def page(found: dict[str, Any]) -> str:
    """One table for each shape."""
    machine = next(iter(found["points"].values()))["environment"]
    parts = [
        "# Precision",
        "",
        f"Written by `python -m benchmarks.precision`; the numbers are in `{RESULTS.name}`. "
        f"Kernels {machine['level']}, otloss {machine['versions']['otloss']}, torch {machine['versions']['torch']}.",
        "",
        f"Errors at tol {TOL:g} against float64 at tol {EXACT_TOL:g}, the largest of the problems, float32 / float64: "
        "the L1 error of the plan, the relative error of the transport cost, and that of its gradient by x. Then the "
        "sweeps of the solver, how many problems say that they have converged, the steps of conjugate gradients for "
        "the gradient, and the relative residual that they leave. Sweeps and steps are means.",
        "",
    ]
    for shape in SHAPES:
        rows = {eps: found["points"].get(f"{shape.name} eps {eps:g}") for eps in EPS}
        if not any(rows.values()):
            continue
        parts += [
            f"## {shape.name}: {PROBLEMS[shape.name]} × {shape.points} × {shape.points}, d {shape.d}",
            "",
            "| eps | plan | transport cost | gradient | sweeps | converged | steps | residual |",
            "|---" * 8 + "|",
        ]
        for eps, row in rows.items():
            if row:
                pair = row["float32"], row["float64"]
                cells = [" / ".join(f"{one[name]:.1e}" for one in pair) for name in MEASURES]
                cells += [" / ".join(f"{one[name]:.0f}" for one in pair) for name in ("sweeps", "converged", "steps")]
                cells.append(" / ".join(f"{one['residual']:.0e}" for one in pair))
                parts.append(f"| {eps:g} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-only", action="store_true", help="write the page from the results file")
    if not parser.parse_args().page_only:
        warnings.simplefilter("ignore", otloss.ConvergenceWarning)
        for shape in SHAPES:
            for eps in EPS if shape.name in PROBLEMS else ():
                point = measure(shape, eps) | {"environment": environment()}
                results.put(RESULTS, "points", f"{shape.name} eps {eps:g}", point)
                print(shape.name, eps, {name: point[name] for name in ("float32", "float64")}, flush=True)
    PAGE.write_text(page(results.load(RESULTS)))


if __name__ == "__main__":
    main()
