"""The report's pictures: tables as dots, Dice as bars, heatmaps beside boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .tables import Section, Table

OURS, PAPER, WITHIN, BOX = "#1f5fa8", "#b0483a", "#6aa9d8", "#5dff6a"
BARS = {"positives": "#1f5fa8", "kaggle": "#9cc3e6", "global": "#c9c9c9"}


def draw_table(table: Table, path: Path) -> None:
    """Dots per row and column: the paper's value, ours with its 95 % interval, ours within sources."""
    sections = [s for s in table.sections if s.ran] or table.sections
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

    for y, row in enumerate(section.rows):
        cell = row.cells[column]
        if cell.paper:
            axes.plot(float(cell.paper), y, "D", mfc="none", mec=PAPER, ms=5, label=once("paper"))
        for ours, colour, offset, label in (
            (cell.ours, OURS, 0.0, "ours, 95 % interval"), (cell.within, WITHIN, 0.25, "ours, within source"),
        ):  # fmt: skip
            if ours:
                ends = [[ours.value - min(ours.low, ours.value)], [max(ours.high, ours.value) - ours.value]]
                axes.errorbar(ours.value, y + offset, xerr=ends, fmt="o", ms=4, lw=1.2, color=colour, label=once(label))
    axes.set_ylim(len(section.rows) - 0.4, -0.6)
    names = [row.name for row in section.rows]
    axes.set_yticks(range(len(names)), names if column == 0 else [""] * len(names), fontsize=8)
    axes.set_title(f"{section.title}: {section.rows[0].cells[column].column}" if column == 0
                   else section.rows[0].cells[column].column, fontsize=9)  # fmt: skip
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#e3e3e3", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_dice(table: Table, path: Path) -> None:
    """Bars per arm: Dice over positives, Kaggle's, global; the paper's value as a line."""
    sections = [s for s in table.sections if s.ran] or table.sections
    arms = [max(1, sum(1 for row in s.rows if s.ran is False or any(c.ours for c in row.cells))) for s in sections]
    figure = Figure(figsize=(sum(1.8 + 0.75 * n for n in arms) + 0.4, 3.6), layout="constrained")
    line = figure.subplots(1, len(sections), squeeze=False, width_ratios=[1.8 + 0.75 * n for n in arms])[0]
    for axes, section in zip(line, sections, strict=True):
        rows = [row for row in section.rows if not section.ran or any(cell.ours for cell in row.cells)]
        for place, (kind, colour) in enumerate(BARS.items()):
            for x, row in enumerate(rows):
                ours = row.cells[place].ours
                if ours:
                    ends = [[max(0.0, ours.value - ours.low)], [max(0.0, ours.high - ours.value)]]
                    axes.bar(x + 0.27 * (place - 1), ours.value, 0.25, color=colour, yerr=ends,
                             error_kw={"lw": 1, "capsize": 2}, label=kind if x == 0 else None)  # fmt: skip
        printed = [float(row.cells[0].paper) for row in section.rows if row.cells[0].paper]
        for value in printed:
            axes.axhline(value, color=PAPER, ls="--", lw=1, label=f"paper's OPTiML, {value}")
        axes.set_xticks(range(len(rows)), [row.name for row in rows], fontsize=8, rotation=20 if len(rows) > 3 else 0)
        axes.set_ylim(0, 1)
        axes.set_title(section.title, fontsize=9)
        axes.set_ylabel("Dice", fontsize=8)
        axes.tick_params(axis="y", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    known = {label: handle for axes in line for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if known:
        figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(table.title, fontsize=11)
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
    _save(figure, path)


def same_films(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two arms' maps may stand side by side."""
    return all(np.array_equal(a[key], b[key]) for key in ("names", "labels", "images"))


def _save(figure: Figure, path: Path) -> None:
    with mpl.rc_context({"font.family": "DejaVu Sans"}):
        figure.savefig(path, dpi=130, metadata={"Software": None})
