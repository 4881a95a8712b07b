"""Plots from a results file. Each library has one colour."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import PLOTS

COLOURS = {
    "otloss": "#d62728",
    "POT": "#1f77b4",
    "OTT-JAX": "#2ca02c",
    "PyTorch": "#7f7f7f",
    "geomloss": "#9467bd",
    "KeOps": "#8c564b",
    "flash-sinkhorn": "#e377c2",
}
STYLES = ("-", "--", ":", "-.")
SECONDS = "forward + backward, s"


def draw(results: dict[str, Any], folder: Path) -> list[str]:
    """Draw what the results hold; return the names of the files, in the order of `PLOTS`.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("plots need matplotlib: pip install 'otloss[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    for name in PLOTS:
        figure, axes = pyplot.subplots(figsize=(7.5, 4.5), dpi=130, layout="constrained")
        if DRAWERS[name](axes, results):
            axes.spines[["top", "right"]].set_visible(False)
            figure.savefig(folder / name)
            drawn.append(name)
        pyplot.close(figure)
    return drawn


def _lines(axes: Any, curve: list[dict[str, Any]], x: str, y: str) -> None:
    """One line for each peer: the library sets its colour, the mode its style. otloss is drawn on top."""
    names = list(dict.fromkeys(point["name"] for point in curve))
    used: dict[str, int] = {}
    for name in names:
        points = [point for point in curve if point["name"] == name]
        library = points[0]["library"]
        style = STYLES[used.setdefault(library, 0) % len(STYLES)]
        used[library] += 1
        ours = library == "otloss"
        axes.plot(
            [point[x] for point in points],
            [point[y] for point in points],
            style,
            marker="o",
            markersize=4,
            linewidth=2.5 if ours else 1.5,
            color=COLOURS[library],
            label=name,
            zorder=3 if ours else 2,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="major")
    axes.legend(fontsize=8, frameon=False)


def _curve(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return results.get("sweeps", {}).get(name, {}).get("curve", [])


def _time_n(axes: Any, results: dict[str, Any]) -> bool:
    if curve := _curve(results, "n"):
        _lines(axes, curve, "n", "seconds")
        axes.set_xscale("log", base=2)
        axes.set(title="16 problems of n × n, d 64, eps 0.05, 50 iterations", xlabel="n", ylabel=SECONDS)
    return bool(curve)


def _time_batch(axes: Any, results: dict[str, Any]) -> bool:
    if curve := _curve(results, "batch"):
        _lines(axes, curve, "batch", "seconds")
        axes.set_xscale("log", base=2)
        axes.set(
            title="Problems of 64 × 64, d 64, eps 0.05, 50 iterations",
            xlabel="problems",
            ylabel=SECONDS,
        )
    return bool(curve)


def _accuracy(axes: Any, results: dict[str, Any]) -> bool:
    if curve := _curve(results, "accuracy"):
        _lines(axes, curve, "seconds", "error")
        title = "16 problems of 196 × 196, eps 0.02: 10 to 200 iterations"
        axes.set(title=title, xlabel=SECONDS, ylabel="gradient's relative error against float64")
    return bool(curve)


def _memory(axes: Any, results: dict[str, Any]) -> bool:
    """For each library and main workload, the mode that takes the least memory."""
    groups = {name: entry["memory"] for name, entry in results.get("workloads", {}).items() if entry.get("memory")}
    measured = {row["library"] for rows in groups.values() for row in rows if "gib" in row}
    libraries = [library for library in COLOURS if library in measured]
    width = 0.8 / max(1, len(libraries))
    for k, library in enumerate(libraries):
        least = [
            min((max(m["gib"], 1e-3) for m in rows if m["library"] == library and "gib" in m), default=0)
            for rows in groups.values()
        ]
        axes.bar([i + k * width for i in range(len(groups))], least, width, color=COLOURS[library], label=library)
    axes.set_yscale("log")
    axes.set_ylim(bottom=5e-4)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(groups))], list(groups))
    axes.set(title="Whole batch in one call, the least of each library's modes", ylabel="peak memory of one step, GiB")
    axes.grid(alpha=0.3, axis="y")
    if groups:
        axes.legend(fontsize=8, frameon=False, ncols=2)
    return bool(groups)


def _step(axes: Any, results: dict[str, Any]) -> bool:
    found = results.get("step", {}).get("optiml")
    if not found:
        return False
    for i, match in enumerate(("position", "channel")):
        rest = found[match]["step_s"] - found[match]["ot_s"]
        axes.barh(i, rest, color="#cccccc", label="encoder, expander, other terms, update" if i else None)
        axes.barh(i, found[match]["ot_s"], left=rest, color=COLOURS["otloss"], label="OT loss" if i else None)
        axes.annotate(f"{100 * found[match]['share']:.1f} %", (found[match]["step_s"], i), (4, 0),
                      textcoords="offset points", va="center")  # fmt: skip
    axes.set_yticks([0, 1], ["positions", "channels"])
    title = f"OPTiML step: ResNet18, {found['batch']} images at {found['pixels']} px, two views"
    axes.set(title=title, xlabel="s")
    axes.margins(x=0.1)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    return True


DRAWERS: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
    "time_n.png": _time_n,
    "time_batch.png": _time_batch,
    "accuracy.png": _accuracy,
    "memory.png": _memory,
    "step.png": _step,
}
