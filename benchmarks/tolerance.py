"""``python -m benchmarks.tolerance``: how long each library takes to reach a tolerance, at large and small eps.

The suite of ``python -m benchmarks`` runs a fixed number of iterations. Users ask for an accuracy instead. Here each
solver runs until the L1 error of both marginals of its plan is below ``tol``, in the largest problem of the batch. The
error is computed in float64 from the potentials that the solver returns, whatever the solver itself reports.

A solver has a list of settings, in order of rising effort: more iterations, a smaller threshold of its own. The first
setting whose plan reaches the tolerance is timed, in rounds with otloss beside it. A solver that no setting brings
there, or that takes longer than ``--seconds`` for one call, is shown with the error that it left; it is not tried at
smaller eps. An error up to that of `allowed` counts as reached: solvers look at one marginal, or round in float32.

otloss and OTT-JAX are timed forward and backward, by the features x. POT, geomloss and the plain log-domain iterations
are timed forward only, as none of them has an exact gradient at that cost; this is in their favour. POT solves one
problem per call: it gets ``POT_PROBLEMS`` of the batch, and its time is scaled to the whole.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import otloss
from benchmarks import results
from benchmarks.machine import environment

RESULTS, PAGE, PICTURE = (results.FOLDER / name for name in ("tolerance.json", "tolerance.md", "tolerance.png"))
EPS, TOLERANCES = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002), (1e-3, 1e-5)
SLACK, ROUNDS, POT_PROBLEMS, ENOUGH = 2.0, 3, 2, 2.0
ITERATIONS = (300, 3000, 30000)


@dataclass(frozen=True)
class Shape:
    """A batch of problems between the features of two views: y is x with noise, both after a ReLU."""

    name: str
    batch: int
    points: int
    d: int

    @cache  # noqa: B019 (a handful of shapes)
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, y, a and b in float32."""
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(2, self.batch, self.points, self.d, generator=generator)
        x = normal[0].relu()
        masses = torch.randn(2, self.batch, self.points, generator=generator).softmax(-1)
        return x, (x + 0.5 * normal[1]).relu(), masses[0], masses[1]

    def describe(self) -> str:
        return f"{self.name}: {self.batch} × {self.points} × {self.points}, d {self.d}"


SHAPES = (
    Shape("channels", 16, 512, 49), Shape("tokens", 16, 196, 128), Shape("positions", 64, 49, 512),
    Shape("large", 1, 2048, 64),
)  # fmt: skip

Potentials = tuple[Tensor, Tensor]
Run = Callable[[], Potentials]
"""One call on the whole batch, which is what is timed. It returns the potentials of the problems that it solved."""


@dataclass(frozen=True)
class Solver:
    """A library's way to a tolerance: `settings` makes the calls to try, in order of rising effort."""

    name: str
    library: str
    settings: Callable[[Shape, float, float], Iterator[Run]]
    backward: bool
    problems: int | None = None
    """How many of the batch it solves; None: all."""


def error(shape: Shape, eps: float, potentials: Potentials) -> float:
    """The largest L1 error of both marginals, in float64."""
    f, g = (p.double() for p in potentials)
    x, y, a, b = (t[: len(f)].double() for t in shape.tensors())
    log_plan = (f.unsqueeze(-1) + g.unsqueeze(-2) - otloss.cosine_cost(x, y)) / eps
    plan = a.unsqueeze(-1) * b.unsqueeze(-2) * log_plan.exp()
    missed = (plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1)
    return float(missed.nan_to_num(nan=torch.inf).max())


def allowed(eps: float, tol: float) -> float:
    """The error that counts as reached. float32 knows costs of up to 1 to 2^-24, so a plan's entries to 2^-24 / eps."""
    return SLACK * tol + 4 * 2.0**-24 / eps


def _ours(solver: str) -> Callable[[Shape, float, float], Iterator[Run]]:
    def settings(shape: Shape, eps: float, tol: float) -> Iterator[Run]:
        for iterations in ITERATIONS:
            x, y, a, b = shape.tensors()
            x = x.clone().requires_grad_()

            def run(iterations: int = iterations, x: Tensor = x, others: tuple[Tensor, ...] = (y, a, b)) -> Potentials:
                x.grad = None
                out = otloss.cosine_sinkhorn(
                    x, *others, eps=eps, tol=tol, max_iter=iterations, solver=solver, backend="cpu"
                )
                out.transport_cost.sum().backward()
                return out.f.detach(), out.g.detach()

            yield run

    return settings


def _log_domain(shape: Shape, eps: float, tol: float) -> Iterator[Run]:
    """Plain PyTorch, all problems of the batch until the last has converged."""
    x, y, a, b = shape.tensors()
    log_a, log_b = a.log().unsqueeze(-1), b.log().unsqueeze(-2)
    for iterations in ITERATIONS:

        def run(iterations: int = iterations) -> Potentials:
            cost = otloss.cosine_cost(x, y)
            f, g = torch.zeros_like(a), torch.zeros_like(b)
            for k in range(iterations):
                f_next = -eps * torch.logsumexp((g.unsqueeze(-2) - cost) / eps + log_b, -1)
                if k % 10 == 0 and bool(((a * ((f - f_next) / eps).expm1().abs()).sum(-1) < tol).all()):
                    break
                f = f_next
                g = -eps * torch.logsumexp((f.unsqueeze(-1) - cost) / eps + log_a, -2)
            return f, g

        yield run


def _pot(method: str) -> Callable[[Shape, float, float], Iterator[Run]]:
    def settings(shape: Shape, eps: float, tol: float) -> Iterator[Run]:
        import numpy as np
        import ot

        x, y, a, b = (t[:POT_PROBLEMS].double() for t in shape.tensors())
        cost = otloss.cosine_cost(x, y).numpy()
        masses = list(zip(a.numpy(), b.numpy(), strict=True))

        # Its stopping rule is the L2 norm, and is looked at every ten iterations (here).
        for iterations in ITERATIONS:
            for threshold in (tol, tol / 10, tol / 100):

                def run(threshold: float = threshold, iterations: int = iterations) -> Potentials:
                    f, g = [], []
                    for c, (p, q) in zip(cost, masses, strict=True):
                        _, log = ot.sinkhorn(
                            p, q, c, eps, method=method, stopThr=threshold, numItermax=iterations, log=True, warn=False
                        )
                        u, v = (log["log_u"], log["log_v"]) if "log_u" in log else (log["logu"], log["logv"])
                        # POT's plan is exp(u + v - C/eps), without the masses.
                        f.append(eps * (np.asarray(u) - np.log(p)))
                        g.append(eps * (np.asarray(v) - np.log(q)))
                    return torch.from_numpy(np.stack(f)), torch.from_numpy(np.stack(g))

                yield run

    return settings


def _geomloss(shape: Shape, eps: float, tol: float) -> Iterator[Run]:
    """Annealing: no stopping rule. Of unit vectors |x - y|^2 / 2 is the cosine cost, and eps is blur^2."""
    import geomloss

    x, y, a, b = shape.tensors()
    for scaling in (0.5, 0.9, 0.99, 0.999):
        loss = geomloss.SamplesLoss(
            "sinkhorn", p=2, blur=eps**0.5, scaling=scaling, debias=False, potentials=True, backend="tensorized"
        )

        def run(loss: Any = loss) -> Potentials:
            rows = (torch.nn.functional.normalize(t, dim=-1) for t in (x, y))
            u, v = next(rows), next(rows)
            f, g = loss(a, u, b, v)
            return f, g

        yield run


def _ott(mode: str) -> Callable[[Shape, float, float], Iterator[Run]]:
    def settings(shape: Shape, eps: float, tol: float) -> Iterator[Run]:
        import jax
        import jax.numpy as jnp
        from ott.geometry.geometry import Geometry
        from ott.problems.linear.linear_problem import LinearProblem
        from ott.solvers.linear import implicit_differentiation
        from ott.solvers.linear.acceleration import AndersonAcceleration, Momentum
        from ott.solvers.linear.sinkhorn import Sinkhorn

        inputs = tuple(jnp.asarray(t.numpy()) for t in shape.tensors())
        options: dict[str, list[dict[str, Any]]] = {
            "plain": [{}],
            "momentum": [{"momentum": Momentum(start=300, value=value)} for value in (1.5, 1.3)],
            "Anderson": [{"anderson": AndersonAcceleration(memory=memory, refresh_every=1)} for memory in (5, 2)],
        }
        for iterations in ITERATIONS:
            for option in options[mode]:
                solver = Sinkhorn(
                    threshold=tol, max_iterations=iterations, lse_mode=True, **option,
                    implicit_diff=implicit_differentiation.ImplicitDiff(solver_kwargs={"ridge_kernel": 1e-2}),
                )  # fmt: skip

                def total(x: Any, y: Any, a: Any, b: Any, solver: Any = solver) -> Any:
                    def one(x: Any, y: Any, a: Any, b: Any) -> Any:
                        x, y = (t / jnp.maximum(jnp.linalg.norm(t, axis=-1, keepdims=True), 1e-12) for t in (x, y))
                        out = solver(LinearProblem(Geometry(cost_matrix=1 - x @ y.T, epsilon=eps), a, b))
                        return out.primal_cost, (out.f, out.g)

                    costs, potentials = jax.vmap(one)(x, y, a, b)
                    return costs.sum(), potentials

                step = jax.jit(jax.value_and_grad(total, has_aux=True))

                def run(step: Any = step) -> Potentials:
                    (_, (f, g)), gradient = step(*inputs)
                    jax.block_until_ready(gradient)
                    # OTT's potentials belong to exp((f + g - C)/eps), without the masses.
                    f, g = (torch.tensor(jax.device_get(p)) for p in (f, g))
                    _, _, a, b = shape.tensors()
                    return f - eps * a.log(), g - eps * b.log()

                yield run

    return settings


OURS = Solver("otloss", "otloss", _ours("auto"), backward=True)
SOLVERS = (
    Solver('otloss, solver="plain"', "otloss", _ours("plain"), backward=True),
    Solver("PyTorch log-domain", "PyTorch", _log_domain, backward=False),
    Solver("POT sinkhorn_log", "POT", _pot("sinkhorn_log"), backward=False, problems=POT_PROBLEMS),
    Solver("POT sinkhorn_stabilized", "POT", _pot("sinkhorn_stabilized"), backward=False, problems=POT_PROBLEMS),
    Solver("OTT-JAX", "OTT-JAX", _ott("plain"), backward=True),
    Solver("OTT-JAX, momentum", "OTT-JAX", _ott("momentum"), backward=True),
    Solver("OTT-JAX, Anderson", "OTT-JAX", _ott("Anderson"), backward=True),
    Solver("geomloss, annealing", "geomloss", _geomloss, backward=False),
)


def timed(run: Run) -> tuple[float, Potentials]:
    """Seconds of one call, and what it returned."""
    start = time.perf_counter()
    potentials = run()
    return time.perf_counter() - start, potentials


def reach(solver: Solver, shape: Shape, eps: float, tol: float, seconds: float) -> tuple[Run | None, float | None]:
    """The first setting that reaches the tolerance, warmed up, and its error.

    None and the least error that was left if there is no such setting; None twice if every call failed.
    """
    least: float | None = None
    for run in solver.settings(shape, eps, tol):
        try:
            took, potentials = timed(run)
        except Exception as failure:  # of whatever kind a library has
            print(f"  {solver.name}: {type(failure).__name__}: {str(failure).splitlines()[0][:100]}", flush=True)
            return None, least
        left = error(shape, eps, potentials)
        least = left if least is None else min(least, left)
        if left <= allowed(eps, tol):
            return run, left
        if took * shape.batch / (solver.problems or shape.batch) > seconds:
            break
    return None, least


def measure(
    shape: Shape, eps: float, tol: float, chosen: tuple[Solver, ...], lost: set[str], seconds: float
) -> list[dict[str, Any]]:
    """A row for otloss, then one for each solver. ``lost`` names those that failed at a larger eps."""
    ours, left = reach(OURS, shape, eps, tol, seconds)
    rows: list[dict[str, Any]] = []
    all_ours: list[float] = []
    for solver in chosen:
        row: dict[str, Any] = {"name": solver.name, "library": solver.library, "backward": solver.backward}
        if solver.name in lost:
            rows.append({**row, "error": None, "seconds": None, "tried": False})
            continue
        run, row["error"] = reach(solver, shape, eps, tol, seconds)
        if run is None or ours is None:
            if run is None:
                lost.add(solver.name)
            rows.append({**row, "seconds": None})
            continue
        mine, theirs = [], []
        for _ in range(ROUNDS):
            mine.append(timed(ours)[0])
            theirs.append(timed(run)[0] * shape.batch / (solver.problems or shape.batch))
            if sum(theirs) > ENOUGH:
                break
        all_ours += mine
        row["seconds"] = statistics.median(theirs)
        row["ratio"] = row["seconds"] / statistics.median(mine)
        rows.append(row)
    if ours is not None and not all_ours:
        all_ours = [timed(ours)[0] for _ in range(ROUNDS)]
    first = {"name": OURS.name, "library": OURS.library, "backward": True, "error": left}
    return [{**first, "seconds": statistics.median(all_ours) if all_ours else None, "ratio": 1.0}, *rows]


def missed(row: dict[str, Any]) -> str:
    """Why a row has no time."""
    if not row.get("tried", True):
        return "–"
    return "fails" if row["error"] is None else f"not reached ({row['error']:.0e})"


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    if row["seconds"] is None:
        return f"  {row['name']:28s} {missed(row)}"
    return f"  {row['name']:28s} {1000 * row['seconds']:10.1f} ms {row['ratio']:7.1f}x   error {row['error']:.0e}"


def cell(row: dict[str, Any]) -> str:
    """A cell of the page: milliseconds, and how many times those of otloss."""
    if row["seconds"] is None:
        return missed(row)
    shown = f"{1000 * row['seconds']:.3g} ms"
    return shown if row["name"] == OURS.name else f"{shown} ({row['ratio']:.3g}×)"


def page(found: dict[str, Any]) -> str:
    """The tables, one for each shape and tolerance."""
    machine = next(iter(found["points"].values()))["environment"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    parts = [
        "# Time to tolerance",
        "",
        f"Written by `python -m benchmarks.tolerance`; the numbers are in `{RESULTS.name}`. {machine['cpu']}, "
        f"{machine['cores']} cores, kernels {machine['level']}; {versions}.",
        "",
        "Milliseconds for the whole batch until the L1 error of both marginals of every plan is below the tolerance "
        f"(up to {SLACK:g} times it and the rounding of float32, 4 · 2^-24 / eps, count), and how many times the "
        "milliseconds of otloss beside it. *not reached* shows the error that was left; *fails* ended in an error; – "
        "was not tried, as it had failed at a larger eps. otloss and OTT-JAX: with backward.",
        "",
    ]
    for shape in SHAPES:
        for tol in TOLERANCES:
            points = {eps: found["points"].get(f"{shape.name} eps {eps:g} tol {tol:g}") for eps in EPS}
            known = {eps: point["rows"] for eps, point in points.items() if point}
            if not known:
                continue
            parts += [f"## {shape.describe()}, tolerance {tol:g}", ""]
            parts.append("| | " + " | ".join(f"eps {eps:g}" for eps in known) + " |")
            parts.append("|---" * (len(known) + 1) + "|")
            for name in dict.fromkeys(row["name"] for rows in known.values() for row in rows):
                cells = []
                for rows in known.values():
                    (row,) = [row for row in rows if row["name"] == name] or [None]
                    cells.append("" if row is None else cell(row))
                parts.append(f"| {name} | " + " | ".join(cells) + " |")
            parts.append("")
    return "\n".join(parts)


def draw(found: dict[str, Any]) -> None:
    """Time over eps at the smallest tolerance, one panel for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from benchmarks.plots import COLOURS, STYLES

    tol = min(TOLERANCES)
    figure, panels = pyplot.subplots(1, len(SHAPES), figsize=(13, 3.6), dpi=120, layout="constrained", sharey=True)
    for axes, shape in zip(panels, SHAPES, strict=True):
        used: dict[str, int] = {}
        for solver in (OURS, *SOLVERS):
            style = STYLES[used.setdefault(solver.library, 0) % len(STYLES)]
            used[solver.library] += 1
            where, times = [], []
            for eps in EPS:
                point = found["points"].get(f"{shape.name} eps {eps:g} tol {tol:g}")
                row = next((r for r in point["rows"] if r["name"] == solver.name), None) if point else None
                if row and row["seconds"] is not None:
                    where.append(eps)
                    times.append(row["seconds"])
            axes.plot(where, times, style, color=COLOURS[solver.library], marker="o", markersize=3, label=solver.name)
        axes.set(xscale="log", yscale="log", title=shape.describe(), xlabel="eps")
        axes.invert_xaxis()
        axes.title.set_fontsize(9)
    panels[0].set_ylabel(f"seconds to an error of {tol:g}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=[s.name for s in SHAPES], default=[s.name for s in SHAPES])
    parser.add_argument("--eps", nargs="*", type=float, choices=EPS, default=list(EPS))
    parser.add_argument("--tol", nargs="*", type=float, choices=TOLERANCES, default=list(TOLERANCES))
    parser.add_argument("--solvers", help="only solvers whose name contains this")
    parser.add_argument("--seconds", type=float, default=10.0, help="most seconds of a call that may be tried")
    parser.add_argument("--page-only", action="store_true", help="write page and plot from the results file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = tuple(s for s in SOLVERS if args.solvers is None or args.solvers in s.name)
    for shape in SHAPES if not args.page_only else ():
        for tol in args.tol if shape.name in args.shapes else ():
            lost: set[str] = set()
            for eps in sorted(args.eps, reverse=True):
                print(f"{shape.describe()}, eps {eps:g}, tolerance {tol:g}", flush=True)
                rows = measure(shape, eps, tol, chosen, lost, args.seconds)
                print("\n".join(map(line, rows)), flush=True)
                point = {"rows": rows, "environment": environment()}
                results.put(RESULTS, "points", f"{shape.name} eps {eps:g} tol {tol:g}", point)
    found = results.load(RESULTS)
    PAGE.write_text(page(found))
    draw(found)


if __name__ == "__main__":
    main()
