"""The tables of docs/performance.md, each from one results file. Nothing is measured here."""

from __future__ import annotations

from typing import Any

from benchmarks import report, targets
from benchmarks.peers import OURS
from benchmarks.tolerance import EPS, SHAPES, TOLERANCES

SOLVER_ROWS = {
    "random": "random costs and masses",
    "peaked": "peaked masses, ties and permutations",
    "float32": "the first kinds in float32, and matched views",
}
"""The sets of problems in ``solver.json``, and what they are called."""


def _memory(entry: dict[str, Any], row: dict[str, Any]) -> str:
    """The peak memory of a row of ``cpu.json``, in brackets; nothing where it was not measured."""
    for found in entry.get("memory", []):
        if (found["name"], found["problems_per_call"]) == (row["name"], row["problems_per_call"]) and "gib" in found:
            return f" ({1024 * found['gib']:.0f} MiB)"
    return ""


def fixed(cpu: dict[str, Any]) -> str:
    """Forward and backward of the main workloads: time and memory, beside the fastest peers."""
    lines = [
        "| problems | otloss | fastest with the same gradient | fastest in any mode |",
        "|---|---|---|---|",
    ]
    for name in targets.SPEEDUPS:
        if (entry := cpu["workloads"].get(name)) is None:
            continue
        ours, *rows = entry["times"]
        cells = [report.seconds(ours["median_s"]) + _memory(entry, ours)]
        for some in ([row for row in rows if row["exact"]], rows):
            rivals = [row for row in some if row["library"] != OURS.library]
            best = min(rivals, key=lambda row: row["ratio"], default=None)
            cells.append("none" if best is None else f"{best['ratio']:.1f}×, {best['name']}{_memory(entry, best)}")
        w = entry["workload"]
        lines.append(f"| {name}: {w['batch']} × {w['n']} × {w['m']}, d {w['d']} | {' | '.join(cells)} |")
    first = next(iter(cpu["workloads"].values()))["environment"]
    return "\n".join([*lines, "", report.where(first), "", report.where_slower(cpu)])


def to_tolerance(found: dict[str, Any]) -> str:
    """Milliseconds of otloss to the smallest tolerance at every eps, and how many times as long the best peer takes."""
    tol = min(TOLERANCES)
    lines = ["| to an error of " + f"{tol:g} | " + " | ".join(f"eps {eps:g}" for eps in EPS) + " |"]
    lines.append("|---" * (len(EPS) + 1) + "|")
    for shape in SHAPES:
        cells = []
        for eps in EPS:
            point = found["points"].get(f"{shape.name} eps {eps:g} tol {tol:g}")
            ours, *rows = point["rows"] if point else [None]
            if ours is None or ours["seconds"] is None:
                cells.append("not reached" if ours else "")
                continue
            rivals = [row for row in rows if row["library"] != OURS.library and row["seconds"] is not None]
            best = min(rivals, key=lambda row: row["ratio"], default=None)
            rest = "no peer" if best is None else f"{best['ratio']:.3g}×, {best['name']}"
            cells.append(f"{1000 * ours['seconds']:.3g} ms; {rest}")
        lines.append(f"| {shape.describe()} | {' | '.join(cells)} |")
    machine = next(iter(found["points"].values()))["environment"]
    return "\n".join([*lines, "", report.where(machine)])


def sweeps(found: dict[str, Any]) -> str:
    """How many sweeps the accelerated solver takes beside plain iterations."""
    lines = [
        "| problems | sweeps, plain | sweeps, auto | problems above 1.1 times plain | not converged, plain and auto |",
        "|---|---|---|---|---|",
    ]
    for name, title in SOLVER_ROWS.items():
        s = found[name]["summary"]
        cells = [
            f"{s['problems']:,} with {title}",
            *(f"{s[f'{solver} sweeps']:,}" for solver in ("plain", "auto")),
            str(s["auto slower by more than 10 %"]),
            f"{s['plain not converged']} and {s['auto not converged']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
