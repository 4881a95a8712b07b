"""The report's pictures: tables as dots, heatmaps beside boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .overview import Effect
from .tables import Section, Table

OURS, PAPER, WITHIN, BOX = "#1f5fa8", "#b0483a", "#6aa9d8", "#5dff6a"


def draw_table(table: Table, path: Path) -> None:
    """Dots per row and column: the paper's value, ours with its 95 % interval (of runs: their mean), within sources."""
    sections = table.sections
    columns = max(len(s.rows[0].cells) for s in sections)
    heights = [0.9 + 0.27 * len(s.rows) for s in sections]
    figure = Figure(figsize=(2.2 + 2.6 * columns, sum(heights) + 0.6), layout="constrained")
    grid = figure.subplots(len(sections), columns, squeeze=False, height_ratios=heights, sharex="row")
    labelled: set[str] = set()
    for line, section in zip(grid, sections, strict=True):
        for column, axes in enumerate(line):
            _dots(axes, section, column, labelled)
    figure.suptitle(table.title, fontsize=11)
    pairs = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    if pairs:
        handles, labels = zip(*pairs, strict=True)
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    _save(figure, path)


def _dots(axes: Axes, section: Section, column: int, labelled: set[str]) -> None:
    if column >= len(section.rows[0].cells):
        axes.axis("off")
        return

    def once(label: str) -> str | None:
        new = label not in labelled
        labelled.add(label)
        return label if new else None

    interval = "ours, 95 % interval" if section.differences else "ours, mean of the runs' 95 % intervals"
    for y, row in enumerate(section.rows):
        cell = row.cells[column]
        if cell.paper:
            axes.plot(float(cell.paper), y, "D", mfc="none", mec=PAPER, ms=5, label=once("paper"))
        for ours, colour, offset, label in (
            (cell.ours, OURS, 0.0, interval), (cell.within, WITHIN, 0.25, "ours, within source"),
        ):  # fmt: skip
            if ours:
                ends = [[ours.value - min(ours.low, ours.value)], [max(ours.high, ours.value) - ours.value]]
                axes.errorbar(ours.value, y + offset, xerr=ends, fmt="o", ms=4, lw=1.2, color=colour, label=once(label))
    if section.differences:
        axes.axvline(0, color="#888888", lw=0.8)
    axes.set_ylim(len(section.rows) - 0.4, -0.6)
    names = [row.name for row in section.rows]
    axes.set_yticks(range(len(names)), names if column == 0 else [""] * len(names), fontsize=8)
    axes.set_title(section.rows[0].cells[column].column, fontsize=8)
    if column == 0:
        axes.set_title(f"{section.title}\n", loc="left", fontsize=9, fontweight="bold")
    axes.tick_params(axis="x", labelsize=8)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color="#e3e3e3", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_curves(curves: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """A line of panels per row, a curve per seed: loss, deviation of embeddings over the batch, kNN on validation."""
    figure = Figure(figsize=(10, 1.25 * len(curves) + 0.7), layout="constrained")
    grid = figure.subplots(len(curves), 3, squeeze=False, sharex=True)
    epochs = [epoch for runs in curves.values() for run in runs for epoch in run]
    known = {
        name: [epoch[name] for epoch in epochs if np.isfinite(epoch.get(name, np.nan))]
        for name in ("knn_auc_within", "knn_auc")
    }
    knn, reached = next(((name, x) for name, x in known.items() if x), ("knn_auc", [0.5]))
    spreads = sorted({name for runs in curves.values() for run in runs for name in run[0] if name.startswith("std")})
    colours = dict(zip(spreads, (OURS, PAPER, WITHIN, "#555555", "#999999"), strict=False))
    for (left, middle, right), (title, runs) in zip(grid, curves.items(), strict=True):
        for run in runs:
            number = [epoch["epoch"] for epoch in run]
            left.plot(number, [epoch["loss"] for epoch in run], color=OURS, lw=1.1, marker=".", ms=3)
            for name in (name for name in colours if name in run[0]):
                label = None if name in middle.get_legend_handles_labels()[1] else name
                middle.plot(
                    number, [epoch[name] for epoch in run], color=colours[name], lw=1.1, marker=".", ms=3, label=label
                )
            measured = [(epoch["epoch"], epoch[knn]) for epoch in run if knn in epoch]
            right.plot(*np.reshape(measured, (-1, 2)).T, color=OURS, lw=1.1, marker=".", ms=3)
        left.set_title(title, loc="left", fontsize=8, fontweight="bold")
        middle.set_ylim(bottom=0)
        middle.legend(fontsize=6, frameon=False, ncols=3)
        right.set_ylim(min(reached) - 0.02, max(reached) + 0.02)
        for axes in (left, middle, right):
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
    for axes, name in zip(grid[-1], ("loss", "deviation", "kNN AUC on validation"), strict=True):
        axes.set_xlabel(f"{name} over epochs", fontsize=8)
    _save(figure, path)


def draw_effects(effects: dict[str, dict[str, Effect]], path: Path) -> None:
    """For each measure a dot per row: its difference from the first row with the 95 % interval, where there is one."""
    titles = list(dict.fromkeys(title for rows in effects.values() for title in rows))
    figure = Figure(figsize=(1.8 + 2.2 * len(effects), 0.9 + 0.27 * len(titles)), layout="constrained")
    places = figure.subplots(1, len(effects), squeeze=False, sharey=True)[0]
    for axes, (measure, rows) in zip(places, effects.items(), strict=True):
        for title, gap in rows.items():
            reach = gap.value - gap.interval[0]
            colour = OURS if gap.beyond else "#888888"
            bar = None if np.isnan(reach) else reach
            axes.errorbar(gap.value, titles.index(title), xerr=bar, fmt="o", ms=4, lw=1.2, color=colour)
        axes.axvline(0, color="#888888", lw=0.8)
        axes.set_title(measure, fontsize=9)
        axes.tick_params(labelsize=8)
    figure.axes[0].set_yticks(range(len(titles)), titles)
    figure.axes[0].invert_yaxis()
    figure.supxlabel("points of AUC above the first row; blue where the interval leaves out 0", fontsize=8)
    _save(figure, path)


def draw_heatmaps(title: str, arms: dict[str, dict[str, Any]], path: Path) -> None:
    """A column per film, ground-truth boxes in all rows: the film, then each arm's map over it."""
    first = next(iter(arms.values()))
    count = len(first["names"])
    figure = Figure(figsize=(1.75 * count + 0.4, 1.75 * (len(arms) + 1) + 0.6), layout="constrained")
    grid = figure.subplots(len(arms) + 1, count, squeeze=False)
    size = first["images"].shape[1]
    for i in range(count):
        for axes, name in zip(grid[:, i], ["film", *arms], strict=True):
            axes.imshow(first["images"][i], cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
            if name != "film":
                heat = arms[name]["maps"][i]
                heat = heat / heat.max() if heat.max() > 0 else heat
                axes.imshow(heat, cmap="jet", alpha=0.15 + 0.4 * heat, vmin=0, vmax=1, interpolation="bilinear")
                if not heat.any():
                    axes.text(0.5, 0.5, "empty map", transform=axes.transAxes, ha="center", color="white", fontsize=8)
            for row, x, y, w, h in first["boxes"]:
                if int(row) == i:
                    corner = (x * size - 0.5, y * size - 0.5)
                    axes.add_patch(Rectangle(corner, w * size, h * size, fill=False, ec=BOX, lw=1.4))
            axes.set_xticks([])
            axes.set_yticks([])
            if i == 0:
                axes.set_ylabel(name, fontsize=9)
        grid[0, i].set_title(str(first["labels"][i]), fontsize=9)
    figure.suptitle(title, fontsize=10)
    _save(figure, path, 80)


def same_films(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two arms' maps may stand side by side."""
    return all(np.array_equal(a[key], b[key]) for key in ("names", "labels", "images"))


def _save(figure: Figure, path: Path, dpi: int = 130) -> None:
    with mpl.rc_context({"font.family": "DejaVu Sans"}):
        figure.savefig(path, dpi=dpi, metadata={"Software": None})
