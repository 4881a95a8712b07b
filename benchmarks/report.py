"""Text from results files: the written parts of README.md, of benchmarks/README.md and of docs/gpu.md, and all rows in
``results/cpu.md``. Nothing is measured here."""

from __future__ import annotations

import math
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
GRADIENTS = {
    "sharp_cost": "⟨T, C⟩ by C",
    "sharp_a": "⟨T, C⟩ by a",
    "sharp_empty": "⟨T, C⟩ by a, at an empty row",
    "value_cost": "value by C",
    "value_a": "value by a",
}
"""Columns of the table of gradients: keys of ``correctness.json`` and their titles."""
LEVELS = {"v4": "AVX-512", "v3": "AVX2", "baseline": "neither AVX2 nor AVX-512"}


def seconds(value: float) -> str:
    """A time with three digits in a unit that fits. The difference of two noisy times may be negative."""
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
    """One line that names the machine and the versions."""
    caches = ", ".join(f"{level} {size}" for level, size in environment["caches"].items())
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items() if number)
    return (
        f"{environment['cpu']}, {environment['cores']} cores ({caches}), instruction level {environment['level']}, "
        f"{environment['memory_gib']} GiB; {versions}; commit {environment['commit']}, {environment['date'][:10]}."
    )


def _sizes(w: dict[str, Any]) -> str:
    return f"{w['batch']} × {w['n']} × {w['m']}, d {w['d']}"


def _chunk(entry: dict[str, Any]) -> dict[str, Any] | None:
    """The row of POT's unrolled solver in smaller calls; None where it ran in one call only."""
    for row in entry["times"]:
        if row["name"] == targets.POT and row["problems_per_call"] < entry["workload"]["batch"]:
            return row
    return None


def _chunked(entry: dict[str, Any]) -> str:
    if (row := _chunk(entry)) is None:
        return ""
    part = "" if row["problems"] == entry["workload"]["batch"] else f", on {row['problems']} problems only"
    return f"; {row['ratio']:.3g}× by {row['problems_per_call']}{part}"


def gradients(results: dict[str, Any]) -> str:
    """README.md: whose gradients are right, from ``correctness.json``."""

    def cell(value: Any) -> str:
        if value == "nan":
            return "**NaN**"
        if value == "none":
            return "none"
        return f"{value:.0e}" if value < 1e-4 else f"**wrong by {100 * value:.0f} %**"

    versions = results["environment"]["versions"]
    lines = [
        f"| gradient of (POT {versions['POT']}, geomloss {versions['geomloss']}) | {' | '.join(GRADIENTS.values())} |",
        "|---" * (len(GRADIENTS) + 1) + "|",
    ]
    lines += [f"| {name} | {' | '.join(cell(row[c]) for c in GRADIENTS)} |" for name, row in results["errors"].items()]
    return "\n".join(lines)


def readme(results: dict[str, Any]) -> str:
    """README.md: how many times as fast as the peers, a sentence on where a peer is faster, and one figure."""
    entries = {name: results["workloads"][name] for name in targets.SPEEDUPS if name in results["workloads"]}
    rows, ratios, lesser = [], [], False
    for name, entry in entries.items():
        pot, _, fastest = targets.speedups(name, entry)
        ratios.append((pot.found, fastest.found))
        chunk = _chunk(entry)
        smaller = "" if chunk is None else f" ({_times(chunk['ratio'])} in calls of {chunk['problems_per_call']})"
        star = "" if fastest.found is None or _is_exact(entry, fastest.who) else "\\*"
        lesser |= bool(star)
        cells = [
            f"{name}: {_sizes(entry['workload'])}",
            seconds(entry["times"][0]["median_s"]),
            _times(pot.found) + smaller,
            _times(fastest.found) + (f", {fastest.who}{star}" if fastest.who else ""),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    first = next(iter(entries.values()))
    environment, w = first["environment"], first["workload"]
    numbers = environment["versions"]
    shown = [name for name in ("torch", "POT", "ott-jax", "geomloss") if numbers.get(name)]
    versions = f" ({', '.join(f'{name} {numbers[name]}' for name in shown)})" if shown else ""
    note = " \\* This mode does not return the gradient of ⟨T, C⟩ that otloss returns." if lesser else ""
    lines = [
        f"On {w['batch']} problems of {w['n']} × {w['m']} points, {_plainly(*ratios[0])} {_over_all(ratios)}",
        "",
        "| problems | otloss | against POT's exact gradient | against the fastest peer |",
        "|---|---|---|---|",
        *rows,
        "",
        "A row names the number of problems, their points on both sides and the dimension d of the features. Times "
        f"are medians of forward and backward from features and logits: float32, eps {w['eps']:g}, "
        f"{w['iterations']} iterations, {environment['cores']} cores of {environment['cpu']} with "
        f"{LEVELS.get(environment['level'], environment['level'])}{versions}. Every peer was first checked to "
        "compute the same number. POT gets the whole batch in one call; in brackets stand calls that are small enough "
        f"for the caches.{note}",
        "",
        where_slower(results),
    ]
    return "\n".join(lines)


def _times(ratio: float | None) -> str:
    if ratio is None:
        return "not measured"
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.1f}×"


def _is_exact(entry: dict[str, Any], who: str) -> bool:
    return all(row["exact"] for row in entry["times"] if row["name"] == who)


def _plainly(pot: float | None, fastest: float | None) -> str:
    """How many times as fast, in words, rounded down."""
    parts = [
        f"{math.floor(ratio)} times as fast as {who}"
        for ratio, who in ((pot, "POT's exact gradient"), (fastest, "the fastest peer"))
        if ratio is not None
    ]
    return f"otloss is {' and '.join(parts)}." if parts else "no peer was timed."


def _over_all(ratios: list[tuple[float | None, float | None]]) -> str:
    """The range of both ratios over the workloads of the table, rounded down."""
    ranges = []
    for found, who in zip(zip(*ratios, strict=True), ("POT", "the fastest peer"), strict=True):
        known = [math.floor(ratio) for ratio in found if ratio is not None]
        if known:
            ranges.append(f"{min(known)} to {max(known)} times as fast as {who}")
    return f"Over all rows of the table it is {' and '.join(ranges)}." if len(ratios) > 1 and ranges else ""


def where_slower(results: dict[str, Any]) -> str:
    """On which points of the two curves a peer is faster than otloss."""
    places, who = [], []
    for axis, text in (("batch", "up to {} problems of 64 × 64"), ("n", "16 problems of up to {0} × {0}")):
        points = results.get("sweeps", {}).get(axis, {}).get("curve", [])
        ours = {point[axis]: point["seconds"] for point in points if point["library"] == "otloss"}
        faster = [point for point in points if point["seconds"] < ours.get(point[axis], math.inf)]
        faster = [point for point in faster if point["library"] != "otloss" and point[axis] in ours]
        if faster:
            places.append(text.format(max(point[axis] for point in faster)))
            who += [point["library"] for point in faster]
    if not places:
        return "No peer is faster at any point of the figure."
    rivals = " or ".join(dict.fromkeys(who))
    return f"otloss is not always the fastest: on {' and on '.join(places)}, {rivals} is faster."


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


def details(results: dict[str, Any], plots: list[str]) -> str:
    """benchmarks/README.md: targets, limits and phases of the main workloads, and the other figures."""
    entries = [results["workloads"][name] for name in targets.SPEEDUPS if name in results["workloads"]]
    commits = ", ".join(dict.fromkeys(entry["environment"]["commit"] for entry in entries))
    lines = [
        "### Speed against the peers",
        "",
        "Medians of forward and backward from features and logits, float32, eps 0.05, 50 iterations. Every peer was "
        "first checked to compute the same number. Brackets hold the target and whether it is met. "
        + where({**entries[0]["environment"], "commit": commits}),
        "",
        *speedups(results),
        "",
        "POT gets the whole batch in one call, as its interface offers. What follows the semicolon is POT in smaller "
        "calls, whose tensors stay in the caches. A peer in the last column may return a lesser gradient. All rows: "
        "[`results/cpu.md`](results/cpu.md).",
    ]
    if results.get("limits"):
        lines += ["", "### Shares of what the machine allows", "", *limits(results)]
    if table := phases(results):
        lines += ["", "### Where the time of a step goes, and how far the floor is from the peers", "", *table]
    if plots:
        lines += ["", "### Figures"]
    for plot in plots:
        lines += ["", f"![{PLOTS[plot]}](results/{plot})"]
    return "\n".join(lines)


def static(reports: list[dict[str, Any]]) -> str:
    """docs/gpu.md: with which Triton how many configurations were compiled, and which of them spill registers."""
    versions: dict[str, list[dict[str, Any]]] = {}
    for r in reports:
        versions.setdefault(r["triton"], []).append(r)
    lines = ["| Triton | compiled for | compilations | spill registers |", "|---|---|---|---|"]
    for version, own in sorted(versions.items(), key=lambda item: [int(part) for part in item[0].split(".")[:2]]):
        archs = ", ".join(f"sm_{arch}" for arch in sorted({r["arch"] for r in own}))
        spilling = [r for r in own if r["spilled"]]
        names = "; ".join(dict.fromkeys(f"`{r['kernel']}` ({r['tile']}) {r['spilled']} bytes" for r in spilling))
        lines.append(f"| {version} | {archs} | {len(own)} | {f'{len(spilling)}: {names}' if spilling else 'none'} |")
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
