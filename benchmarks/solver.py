"""Sweeps of ``solver="auto"`` beside ``solver="plain"`` over random problems; writes ``results/solver.json``.

    python -m benchmarks.solver                 # 2,000 problems
    python -m benchmarks.solver --problems 200  # fewer, and nothing is written

The problems cross sizes, kinds of cost, kinds of masses, eps and tol. "auto" is held to three promises: it converges
wherever "plain" does, to the same transport cost within tol, and takes no more than 1.1 times its sweeps, with ``ROOM``
sweeps of room for problems that take a few. As many problems again have what makes plain iterations short, and hard to
foresee: masses of which few count, ties and permutations. A third set is in float32. Among it are matched views: every
point is near one partner, so that a plain iteration changes little more than rounding does.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import otloss

RESULTS = Path(__file__).parent / "results" / "solver.json"
MAX_ITER, ROOM = 20_000, 2
KINDS = ("uniform", "squared distances", "line", "cosine", "blocks", "repeated rows", "offsets", "grid")
PEAKED_KINDS = ("ties", "permutation", "uniform", "cosine", "grid", "line", "noisy permutation", "squared distances")
SPREADS, PEAKED_SPREADS = (0.0, 1.0, 3.0), (0.0, 3.0, 5.0, 12.0)
SETS = {
    "random": (KINDS, SPREADS, torch.float64, 1e-7),
    "peaked": (PEAKED_KINDS, PEAKED_SPREADS, torch.float64, 1e-7),
    "float32": (("matched views", *KINDS), SPREADS, torch.float32, 1e-5),
}
"""Kinds of costs, spreads of masses, dtype and least tol of each set of problems."""


@dataclass
class Case:
    """One random problem."""

    kind: str
    spread: float
    """Of the logarithms of the masses; 0 is uniform."""
    eps: float
    tol: float
    cost: Tensor
    a: Tensor
    b: Tensor


@dataclass
class Outcome:
    """What both solvers did with a problem."""

    kind: str
    n: int
    m: int
    spread: float
    eps: float
    tol: float
    plain: int
    """Sweeps: its iterations, and the one that measures the last of them."""
    auto: int
    plain_converged: bool
    auto_converged: bool
    gap: float
    """The difference of the transport costs."""
    bound: float
    """How far they may lie apart: either plan is within tol of the marginals, and so is either value."""

    def failures(self) -> list[str]:
        found = []
        if self.plain_converged and not self.auto_converged:
            found.append("does not converge")
        if self.auto_converged and self.plain_converged and self.gap > self.bound:
            found.append("another solution")
        if self.auto > 1.1 * self.plain + ROOM:
            found.append("slower")
        return found


def random_cost(kind: str, n: int, m: int, rng: torch.Generator) -> Tensor:
    """A cost of a kind, in float64."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, dtype=torch.float64)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=rng)

    if kind == "squared distances":
        return torch.cdist(uniform(n, 2), uniform(m, 2)).square()
    if kind == "line":
        return (uniform(n, 1) - uniform(1, m)).abs()
    if kind == "cosine":
        x, y = (torch.randn(k, 8, generator=rng, dtype=torch.float64).relu() for k in (n, m))
        return otloss.cosine_cost(x, y)
    if kind == "blocks":
        return 0.1 * uniform(n, m) + uniform(1) * (integers(3, n)[:, None] != integers(3, m))
    if kind == "repeated rows":
        return uniform(n, m)[integers(n, n)]
    if kind == "offsets":
        return uniform(n, m) + 3 * uniform(n, 1) + 3 * uniform(1, m)
    if kind == "grid":
        return integers(4, n, m).double() / 2
    if kind == "matched views":
        cost = 0.72 + 0.05 * torch.randn(n, m, generator=rng, dtype=torch.float64)
        cost.diagonal().copy_(0.02 + 0.15 * uniform(min(n, m)))
        return cost
    if kind == "ties":
        return integers(3, n, m).double()
    if kind.endswith("permutation"):
        noise = 0.1 * uniform(n, n) if kind.startswith("noisy") else 0.0
        return 1 - torch.eye(n, dtype=torch.float64)[torch.randperm(n, generator=rng)] + noise
    return uniform(n, m)


def random_cases(count: int, seed: int = 0, name: str = "random") -> Iterator[Case]:
    """Problems of a set, its kinds in turn: up to 64 points a side, eps from 0.002 to 1, tol from 1e-7 to 1e-2."""
    kinds, spreads, dtype, least_tol = SETS[name]
    rng = torch.Generator().manual_seed(seed)

    def number(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng))

    for index in range(count):
        kind = kinds[index % len(kinds)]
        n, m = (int(k) for k in torch.randint(1, 65, (2,), generator=rng))
        m = n if kind.endswith(("permutation", "views")) else m
        spread = spreads[int(torch.randint(len(spreads), (), generator=rng))] if kind != "matched views" else 0.0
        a, b = ((spread * torch.randn(k, generator=rng, dtype=torch.float64)).softmax(0) for k in (n, m))
        eps, tol = 10 ** number(math.log10(0.002), 0), 10.0 ** int(number(-7, -2))
        cost = random_cost(kind, n, m, rng)
        yield Case(kind, spread, eps, max(tol, least_tol), *(t.to(dtype) for t in (cost, a, b)))


def compare(case: Case, backend: str = "cpu") -> Outcome:
    """Solve a problem both ways."""
    solved = []
    for solver in ("plain", "auto"):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", otloss.ConvergenceWarning)
            options = {"eps": case.eps, "tol": case.tol, "max_iter": MAX_ITER, "solver": solver, "backend": backend}
            solved.append(otloss.sinkhorn(case.cost, case.a, case.b, **options))
    plain, auto = solved
    # f and g move by what the marginals are off, times the largest potential: the values are dual to them.
    size = float(case.cost.max() - case.cost.min()) + case.eps * (
        1 - float(torch.minimum(case.a.min(), case.b.min()).log())
    )
    return Outcome(
        case.kind,
        *case.cost.shape,
        case.spread,
        case.eps,
        case.tol,
        int(plain.n_iter) + 1,
        int(auto.n_iter),
        bool(plain.converged),
        bool(auto.converged),
        abs(float(plain.value - auto.value)),
        4 * case.tol * size,
    )


def summary(outcomes: list[Outcome]) -> dict[str, float | int]:
    """Totals over the problems."""
    ratios = torch.tensor([o.auto / max(o.plain, 1) for o in outcomes])
    failures = [failure for o in outcomes for failure in o.failures()]
    return {
        "problems": len(outcomes),
        "plain sweeps": sum(o.plain for o in outcomes),
        "auto sweeps": sum(o.auto for o in outcomes),
        "plain not converged": sum(not o.plain_converged for o in outcomes),
        "auto not converged": sum(not o.auto_converged for o in outcomes),
        "auto does not converge where plain does": failures.count("does not converge"),
        "auto finds another solution": failures.count("another solution"),
        f"auto slower by more than 10 % and {ROOM} sweeps": failures.count("slower"),
        "auto slower by more than 10 %": sum(o.auto > 1.1 * o.plain for o in outcomes),
        "median of auto / plain": float(ratios.median()),
        "largest auto - 1.1 plain": max(o.auto - 1.1 * o.plain for o in outcomes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--problems", type=int, default=2000)
    count = parser.parse_args().problems
    found = {}
    for name in SETS:
        outcomes = [compare(case) for case in random_cases(count, name=name)]
        totals = summary(outcomes)
        print(f"{name}:")
        for what, value in totals.items():
            print(f"  {what}: {value:.4g}" if isinstance(value, float) else f"  {what}: {value}")
        failed = [asdict(o) | {"failures": o.failures()} for o in outcomes if o.failures()]
        for failure in failed:
            print(f"  {failure}")
        found[name] = {"summary": totals, "failures": failed}
    if count == parser.get_default("problems"):
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
