"""``python -m benchmarks.accuracy``: the largest errors of the cpu backend over a fixed set of problems.

The truth is the reference backend in float64, iterated until the marginals are right to 1e-12. Problems are made in
float64 and rounded to float32, so that both precisions solve the same problem. The cpu backend runs as many iterations
as the reference needed. An error is the largest difference of an entry, relative to the natural size of the quantity:

* ``transport_cost``, ``value``: their true size, but at least eps, since entropy blurs whatever is smaller;
* ``potentials`` (f and g, in the gauge <a, f> = <b, g>): the largest of them, but at least eps;
* ``plan``: the sum of all differences, relative to its mass, which is 1;
* a gradient: its largest true entry, but by a feature at least the largest ratio of a point's mass to its length (under
  squared distances and products: the largest mass times the largest derivative of a cost), and by the logarithm of a
  mass at least eps times the largest mass: the size of the terms that cancel where a gradient vanishes, for instance by
  features of one dimension. By a cost it does not: a shift of the cost moves every output.

Errors grow with 1/eps, so each eps has a row of its own. The results file holds, for each, the largest error measured
over all instruction levels that this machine can run, and a bound, which tests/test_accuracy.py holds every later
commit to. A bound is that error times ``MARGIN``, and at least ``ROUNDINGS`` roundings of the dtype, since another
processor or compiler rounds differently: a vector level that is left out here exceeds the others by up to 2.3. In
float64 the truth, made of PyTorch's operations, rounds as much as what is tested, and differently on each processor, so
the margin counts twice there. The script only lowers bounds; ``--update`` also raises them. ``--kinds`` measures some
kinds of cost alone, and leaves the others as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import otloss
from otloss.operators import ConvergenceWarning

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
MARGIN, ROUNDINGS = 2.5, 4
LEVELS = ("v4", "v3", "baseline")
# Sizes near those of lanes (2 to 16), row blocks (8), tiles (32) and panels of products, and sizes that models use.
SIZES = (
    (1, 1), (1, 8), (3, 16), (8, 3), (16, 16), (31, 49), (49, 31), (49, 49), (64, 65), (65, 8),
    (100, 128), (128, 64), (196, 197), (257, 100), (197, 257), (512, 128), (512, 512),
)  # fmt: skip
DIMENSIONS = (1, 7, 49, 64, 65, 384, 512)
KINDS = ("dense", "features", "sqeuclidean", "dot")  # "features" are those under the cosine cost
FEW_SIZES = ((8, 3), (31, 49), (64, 65), (100, 128), (196, 197))  # of the last two kinds
MARGINALS = ("uniform", "random", "peaked", "zeros")
FEW = 6  # iterations in the modes that need no solution
Quantities = dict[str, Tensor]
Errors = dict[str, float]
Table = dict[str, Errors]  # by kind of cost, dtype and eps


@dataclass(frozen=True)
class Case:
    """One problem; ``d`` is the dimension of the features, 0 for a dense cost."""

    n: int
    m: int
    d: int
    eps: float
    marginals: str
    seed: int
    kind: str


@cache
def inputs(case: Case) -> tuple[Tensor, ...]:
    """The cost or both features, then the logarithms of both masses: float64 numbers that float32 holds exactly."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def log_mass(count: int) -> Tensor:
        scale = {"uniform": 0.0, "random": 1.0, "peaked": 4.0, "zeros": 1.0}[case.marginals]
        logits = scale * normal(count)
        if case.marginals == "zeros":
            logits[1::3] = -math.inf
        return logits.log_softmax(-1)

    if case.d:
        sides = (normal(case.n, case.d), normal(case.m, case.d))
        if case.kind == "sqeuclidean":  # distances of about 1, of points that lie around 0 or around 1000
            problem = tuple(x / math.sqrt(2 * case.d) + 1000 * (case.seed % 2) for x in sides)
        elif case.kind == "dot":  # products of about 1
            problem = tuple(x / case.d**0.25 for x in sides)
        else:
            problem = tuple(x.relu() for x in sides) if case.d > 7 else sides  # as a network's features are
    else:
        problem = (2 * torch.rand(case.n, case.m, generator=generator, dtype=torch.float64),)
    return tuple(t.float().double() for t in (*problem, log_mass(case.n), log_mass(case.m)))


def cases() -> list[Case]:
    """The fixed set: every size and eps, with a dense cost and with features; dimensions and marginals take turns.

    Some of them follow under the other costs of features.
    """
    chosen: list[Case] = []
    for n, m in SIZES:
        for eps in (0.005, 0.05, 0.5):
            if eps == 0.005 and n * m > 65 * 65:
                continue  # the reference would take minutes
            for d in (0, DIMENSIONS[len(chosen) // 2 % len(DIMENSIONS)]):
                seed = 100 + len(chosen)
                kind = "features" if d else "dense"
                chosen.append(Case(n, m, d, eps, MARGINALS[(seed + seed // 4) % len(MARGINALS)], seed, kind))
    for place, (n, m) in enumerate(FEW_SIZES):
        for eps in (0.05, 0.5):
            for kind in KINDS[2:]:
                seed = 100 + len(chosen)
                d = DIMENSIONS[(place + seed // 4) % len(DIMENSIONS)]
                chosen.append(Case(n, m, d, eps, MARGINALS[(seed // 2 + seed // 8) % len(MARGINALS)], seed, kind))
    return chosen


def _solve(case: Case, leaves: tuple[Tensor, ...], **options: Any) -> otloss.SinkhornOutput:
    *problem, log_a, log_b = leaves
    solver = otloss.sinkhorn
    if case.d:
        solver = partial(otloss.feature_sinkhorn, cost="cosine" if case.kind == "features" else case.kind)
    return solver(*problem, log_a=log_a, log_b=log_b, eps=case.eps, **options)


def compute(case: Case, dtype: torch.dtype, backend: str, n_iter: int | None = None) -> tuple[Quantities, int]:
    """Every output, and every gradient in every mode, after ``n_iter`` iterations (None: as many as are needed)."""
    leaves = tuple(t.to(dtype).detach().requires_grad_() for t in inputs(case))
    names = (*(("x", "y") if case.d else ("cost",)), "log_a", "log_b")
    run = {"max_iter": 20_000, "tol": 1e-12, "solver": "plain"} if n_iter is None else {"max_iter": n_iter, "tol": 0.0}
    found: Quantities = {}

    def gradients(mode: str, output: str, loss: Tensor) -> None:
        grads = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=mode == "none")
        found.update({f"{mode}: {output} by {name}": g for name, g in zip(names, grads, strict=True) if g is not None})

    out = _solve(case, leaves, backend=backend, **run)
    if n_iter is None and not out.converged:
        raise RuntimeError(f"{case} did not converge: error {float(out.marginal_error):g}")
    found |= {"transport_cost": out.transport_cost.detach(), "value": out.value.detach(), "plan": out.plan.detach()}
    found["potentials"] = torch.cat((out.f, out.g)).detach()
    generator = torch.Generator().manual_seed(case.seed)
    p, q = (torch.randn(k, generator=generator, dtype=torch.float64).to(dtype) for k in (case.n, case.m))
    gradients("implicit", "transport_cost", out.transport_cost)
    gradients("implicit", "value", out.value)
    gradients(
        "implicit", "potentials", (p * leaves[-2].detach().exp()) @ out.f + (q * leaves[-1].detach().exp()) @ out.g
    )
    for mode, outputs in (("unroll", ("transport_cost", "value")), ("none", ("transport_cost",))):
        few = _solve(case, leaves, backend=backend, gradient=mode, max_iter=FEW, tol=0.0)
        for output in outputs:
            gradients(mode, output, getattr(few, output))
    return found, int(out.n_iter)


@cache
def truth(case: Case) -> tuple[Quantities, int]:
    """The true outputs and gradients, and the iterations that they took."""
    return compute(case, torch.float64, "reference")


def _least_size(case: Case, name: str) -> float:
    """The size that a quantity is compared with where its own is smaller; see the module's docstring."""
    *problem, log_a, log_b = inputs(case)
    if name == "plan":
        return 1.0
    by = name.partition(" by ")[2]
    if by in ("x", "y"):
        side, other, mass = (*problem, log_a) if by == "x" else (*reversed(problem), log_b)
        if case.kind == "sqeuclidean":
            return float(mass.exp().max() * 2 * (side.unsqueeze(-2) - other.unsqueeze(-3)).abs().max())
        if case.kind == "dot":
            return float(mass.exp().max() * other.abs().max())
        length = side.norm(dim=-1)
        return float((mass.exp() / torch.where(length > 0, length, torch.inf)).max())
    if by in ("log_a", "log_b"):
        return case.eps * float((log_a if by == "log_a" else log_b).exp().max())
    return 0.0 if by else case.eps


def errors(case: Case, dtype: torch.dtype) -> Errors:
    """The error of every quantity for one problem."""
    right, n_iter = truth(case)
    got, _ = compute(case, dtype, "cpu", n_iter)
    found = {}
    for name, true in right.items():
        difference = (got[name].double() - true).abs()
        size = max(float(true.abs().max()), _least_size(case, name))
        error = float(difference.sum() if name == "plan" else difference.max() / size)
        found[name] = error if math.isfinite(error) else math.inf
    return found


def measure(chosen: Iterable[Case]) -> Table:
    """The largest error of every quantity, by kind of cost, dtype and eps."""
    worst: Table = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a tolerance of 0 is never reached
        for case in chosen:
            for dtype in (torch.float32, torch.float64):
                row = worst.setdefault(f"{case.kind} {str(dtype)[6:]} eps {case.eps:g}", {})
                for name, error in errors(case, dtype).items():
                    row[name] = max(row.get(name, 0.0), error)
    return worst


_AT_LEVEL = """
import json, sys, torch
from benchmarks import accuracy
from otloss.backends import cpu
torch.set_num_threads(1)
print(json.dumps(cpu.status() or accuracy.measure(c for c in accuracy.cases() if c.kind in sys.argv[1:])))
"""


def measure_at(level: str, kinds: Iterable[str]) -> Table | str:
    """The errors at one instruction level, from a process of its own; or a text that says why it cannot run here."""
    done = subprocess.run(
        [sys.executable, "-c", _AT_LEVEL, *kinds],
        env={**os.environ, "OTLOSS_CPU_LEVEL": level},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"level {level}: {done.stderr}")
    found: Table | str = json.loads(done.stdout)
    return found


def exceeded(found: Table, bounds: Table) -> list[str]:
    """One line for every error above its bound, or without one."""
    lines = []
    for row, quantities in found.items():
        for name, error in quantities.items():
            bound = bounds.get(row, {}).get(name)
            if bound is None:
                lines.append(f"{row}, {name}: {error:.2e} has no bound")
            elif not error <= bound:
                lines.append(f"{row}, {name}: {error:.2e} is above the bound {bound:.2e}")
    return lines


def _bound(row: str, error: float) -> float:
    """The margin times the error, rounded up to two digits, and no less than ``ROUNDINGS`` roundings."""
    dtype, margin = (torch.float32, MARGIN) if "float32" in row else (torch.float64, 2 * MARGIN)
    bound = max(margin * error, ROUNDINGS * torch.finfo(dtype).eps)
    digit = 10.0 ** (math.floor(math.log10(bound)) - 1)
    return float(f"{math.ceil(bound / digit) * digit:.1e}")


def table(errors: Table, bounds: Table) -> str:
    """For each kind of cost and dtype, one line for each quantity, with its error and bound at each eps."""
    lines: list[str] = []
    for head in dict.fromkeys(row.rpartition(" eps ")[0] for row in errors):
        rows = [row for row in errors if row.startswith(f"{head} eps ")]
        lines += ["", f"{head:40s}" + "".join(f"{row.removeprefix(head).strip():>20s}" for row in rows)]
        for name in errors[rows[0]]:
            cells = (f"{errors[row][name]:.1e} ({bounds[row][name]:.1e})" for row in rows)
            lines.append(f"  {name:38s}" + "".join(f"{cell:>20s}" for cell in cells))
    return "\n".join(lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--update", action="store_true", help="raise bounds that are exceeded, instead of failing")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="measure these kinds of cost alone")
    args = parser.parse_args()
    from benchmarks.machine import environment

    by_level = {level: measure_at(level, args.kinds) for level in LEVELS}
    for level, measured in by_level.items():
        print(f"level {level}: {measured if isinstance(measured, str) else 'measured'}")
    tables = {level: measured for level, measured in by_level.items() if not isinstance(measured, str)}
    worst: Table = {}
    for measured in tables.values():
        for row, quantities in measured.items():
            for name, error in quantities.items():
                worst.setdefault(row, {})[name] = float(f"{max(worst.get(row, {}).get(name, 0.0), error):.2e}")
    bounds = {row: {name: _bound(row, error) for name, error in line.items()} for row, line in worst.items()}
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"errors": {}, "bounds": {}}
    known = {row: line for row, line in before["bounds"].items() if row in worst}
    if not args.update:
        above = exceeded({row: worst[row] for row in known}, known)
        if above:
            print("\n".join(above))
            raise SystemExit("errors have grown, nothing is written; if that is meant: --update")
        bounds = {
            row: {name: min(known.get(row, line)[name], bound) for name, bound in line.items()}
            for row, line in bounds.items()
        }
    print(table(worst, bounds))
    here = {**environment(), "levels": list(tables)}
    if set(args.kinds) != set(KINDS):  # rows that are measured alone say where
        some = {**before.get("environment of some kinds", {}), **dict.fromkeys(args.kinds, here)}
        head = {"environment": before.get("environment", here), "environment of some kinds": some}
        worst, bounds = before["errors"] | worst, before["bounds"] | bounds
    else:
        head = {"environment": here}
    results = {**head, "margin": MARGIN, "errors": worst, "bounds": bounds}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
