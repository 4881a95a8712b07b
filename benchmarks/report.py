"""Tables from a results file: the README's section, and all rows in ``results/cpu.md``."""

from __future__ import annotations

from typing import Any

from benchmarks import targets
from benchmarks.phases import PHASES
from benchmarks.targets import Verdict

PLOTS = {
    "time_n.png": "Time against n",
    "time_batch.png": "Time against the number of problems",
    "accuracy.png": "Error against time",
    "memory.png": "Peak memory",
    "step.png": "Share of a training step",
}


def seconds(value: float) -> str:
    """A time with three digits and a fitting unit; a difference of noisy times may be negative."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if abs(value) * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def verdict(v: Verdict, sign: str = "×") -> str:
    """``12.3× (≥ 8×, met)``."""
    if v.met is None:
        return "not measured"
    relation = "≥" if v.least else "≤"
    return f"{v.found:.3g}{sign} ({relation} {v.wanted:g}{sign}, {'met' if v.met else '**missed**'})"


def _percent(v: Verdict) -> str:
    scaled = Verdict(v.name, 100 * v.wanted, None if v.found is None else 100 * v.found, v.least, v.who)
    return verdict(scaled, " %")


def where(environment: dict[str, Any]) -> str:
    """One line on machine and versions."""
    caches = ", ".join(f"{level} {size}" for level, size in environment["caches"].items())
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items() if number)
    return (
        f"{environment['cpu']}, {environment['cores']} cores ({caches}), instruction level {environment['level']}, "
        f"{environment['memory_gib']} GiB; {versions}; commit {environment['commit']}, {environment['date'][:10]}."
    )


def _sizes(w: dict[str, Any]) -> str:
    return f"{w['batch']} × {w['n']} × {w['m']}, d {w['d']}"


def _chunked(entry: dict[str, Any]) -> str:
    """POT's unrolled solver in smaller calls, where it was run so."""
    for row in entry["times"]:
        if row["name"] == targets.POT and row["problems_per_call"] < entry["workload"]["batch"]:
            part = "" if row["problems"] == entry["workload"]["batch"] else f", on {row['problems']} problems only"
            return f"; {row['ratio']:.3g}× by {row['problems_per_call']}{part}"
    return ""


def speedups(results: dict[str, Any]) -> list[str]:
    """The main rows with their targets."""
    lines = [
        "| problems | otloss | against POT `log_sinkhorn` autodiff | against OTT-JAX's best mode | "
        "against the fastest peer in any mode |",
        "|---|---|---|---|---|",
    ]
    for name in targets.SPEEDUPS:
        if (entry := results.get("workloads", {}).get(name)) is None:
            continue
        pot, ott, fastest = targets.speedups(name, entry)
        ours = seconds(entry["times"][0]["median_s"])
        cells = [
            verdict(pot) + _chunked(entry),
            *(f"{verdict(v)}{', ' if v.who else ''}{v.who}" for v in (ott, fastest)),
        ]
        lines.append(f"| {name}: {_sizes(entry['workload'])} | {ours} | {' | '.join(cells)} |")
    return lines


def limits(results: dict[str, Any]) -> list[str]:
    """Shares of what the machine allows."""
    lines = [
        "| problems | iterations / reading of one core | products / FMA of one core | two threads "
        "| two cores, each by itself (FMA; reading) | floor of a step |",
        "|---|---|---|---|---|---|",
    ]
    for name in targets.SPEEDUPS:
        if (entry := results.get("limits", {}).get(name)) is None:
            continue
        iterations, products, threads = targets.limits(entry)
        floor = "not measured"
        if "floor_s" in entry:
            floor = f"{seconds(entry['floor_s'])} of {seconds(entry['step_s'])}: {100 * entry['floor_share']:.0f} %"
        rates = entry.get("probes") or {}
        alone = "; ".join(f"{rates[key]:.3g}×" if key in rates else "–" for key in ("scaling_fma", "scaling_read"))
        lines.append(
            f"| {name} | {_percent(iterations)} | {_percent(products)} | {verdict(threads)} | {alone} | {floor} |"
        )
    call, step = targets.others(results)
    return [
        *lines,
        "",
        f"One call costs {verdict(call, ' µs')} beyond plain operations; the OT loss takes {_percent(step)} "
        "of an OPTiML step (ResNet18, 64 images at 224 px).",
    ]


def phases(results: dict[str, Any]) -> list[str]:
    """Where the time of a step goes, and how far ahead of the peers the floor itself would be."""
    lines = [
        "| problems | " + " | ".join(PHASES.values()) + " | floor against OTT-JAX | floor against the fastest peer |",
        "|---" * (len(PHASES) + 3) + "|",
    ]
    for name in targets.SPEEDUPS:
        found, entry = results.get("limits", {}).get(name, {}), results.get("workloads", {}).get(name)
        if "phases" not in found or "floor_s" not in found or entry is None:
            continue
        parts = [seconds(found["phases"][phase]) for phase in PHASES]
        ours = entry["times"][0]["median_s"]
        _, *rivals = targets.speedups(name, entry)
        reach = [
            f"{v.found * ours / found['floor_s']:.3g}× (target {v.wanted:g}×)" if v.found else "not measured"
            for v in rivals
        ]
        lines.append(f"| {name} | {' | '.join([*parts, *reach])} |")
    return lines if len(lines) > 2 else []


def section(results: dict[str, Any], plots: list[str]) -> str:
    """The README's section."""
    first = next(iter(results["workloads"].values()))["environment"]
    lines = [
        "Medians of forward + backward from features and logits, float32, eps 0.05, 50 iterations. Every peer was "
        "first checked to compute the same number. Targets in brackets. " + where(first),
        "",
        *speedups(results),
        "",
        "POT is called on the whole batch, as its interface offers; smaller calls stay in the cache and are quoted "
        "too. A peer in the last column may return a lesser gradient. All rows: `benchmarks/results/cpu.md`.",
    ]
    if results.get("limits"):
        lines += ["", *limits(results)]
    if table := phases(results):
        lines += ["", *table, "", "What the rows say about the missed targets: `benchmarks/README.md`."]
    for plot in plots:
        lines += ["", f"![{PLOTS[plot]}](benchmarks/results/{plot})"]
    return "\n".join(lines)


def full(results: dict[str, Any]) -> str:
    """Every row of every workload."""
    lines = ["# All rows", "", "Written by `python -m benchmarks readme`; the numbers are in `cpu.json`."]
    for name, entry in results.get("workloads", {}).items():
        lines += ["", f"## {name}", "", _describe(entry), "", *_rows(entry)]
    return "\n".join(lines) + "\n"


def _describe(entry: dict[str, Any]) -> str:
    from benchmarks.workloads import Workload

    return f"{Workload(**entry['workload']).describe()}. {where(entry['environment'])}"


def _rows(entry: dict[str, Any]) -> list[str]:
    memory = {(m["name"], m["problems_per_call"]): m for m in entry.get("memory", [])}
    lines = [
        "| | problems a call | exact sharp gradient | median | quartiles | runs | times ours | peak memory | "
        "number's error | gradient's error |",
        "|---" * 10 + "|",
    ]
    batch = entry["workload"]["batch"]
    for row in entry["times"]:
        check = entry["checks"].get(row["name"], {})
        errors = [f"{check[key]:.0e}" if key in check else "" for key in ("number", "gradient")]
        found = memory.get((row["name"], row["problems_per_call"]), {})
        gib = f"{found['gib']:.3g} GiB" if "gib" in found else ""
        part = "" if row["problems"] == batch else f" of {row['problems']} timed"
        cells = [
            row["name"],
            f"{row['problems_per_call']}{part}",
            "yes" if row["exact"] else "no",
            seconds(row["median_s"]),
            f"{seconds(row['q1_s'])} – {seconds(row['q3_s'])}",
            str(row["runs"]),
            f"{row['ratio']:.3g}",
            gib,
            *errors,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if entry["skipped"]:
        lines += ["", "Not timed:", ""]
        lines += [f"* {name}: {reason}" for name, reason in entry["skipped"].items()]
    return lines
