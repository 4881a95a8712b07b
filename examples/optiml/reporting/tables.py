"""Tables as rows of cells, each with the paper's printed value and ours; blank where a side has none."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..downstream.arms import ABLATION, DATASETS, ROWS, paper_dataset
from ..downstream.result_files import Record
from ..markdown import markdown_table
from .paper import FIG3, FRACTIONS, TABLE3

#: What the columns of the Dice table are.
DICE_NOTE = (
    "*positives* is the mean over films that have an outline. *kaggle* counts the others too: as 1 where the network "
    "outlines nothing, else as 0, so that a network that never outlines anything scores high. *global* is over all "
    "pixels."
)
HEATMAP_COLUMNS = {"pointing": "pointing game", "iou": "IoU", "empty": "empty maps"}


@dataclass(frozen=True)
class Summary:
    """Our figure: mean over seeds, their deviation, and the mean of their bootstrap intervals' ends."""

    value: float
    deviation: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, estimates: Sequence[dict[str, float | None]], scale: float = 1.0) -> Summary | None:
        """From one ``{value, low, high}`` per run; runs without a value are left out."""
        known = [[e[key] for key in ("value", "low", "high")] for e in estimates if e and e["value"] is not None]
        if not known:
            return None
        array = scale * np.array(known, dtype=float)
        value, low, high = array.mean(axis=0)
        deviation = array[:, 0].std(ddof=1) if len(array) > 1 else 0.0
        return cls(float(value), float(deviation), float(low), float(high), len(array))

    def text(self, digits: int) -> str:
        spread = f" ± {self.deviation:.{digits}f}" if self.seeds > 1 else ""
        return f"{self.value:.{digits}f}{spread} ({self.seeds})"


@dataclass(frozen=True)
class Cell:
    """One place of a table."""

    column: str
    paper: str | None = None
    ours: Summary | None = None
    within: Summary | None = None
    """Ours within sources, where the data set names them."""


@dataclass(frozen=True)
class Row:
    name: str
    cells: list[Cell]


@dataclass(frozen=True)
class Section:
    """The part of a table that belongs to one data set."""

    title: str
    rows: list[Row]
    note: str = ""
    digits: int = 1
    differences: bool = False
    """Whether nought means that two rows are alike, so that a figure shows where it is."""

    @property
    def ran(self) -> bool:
        return any(cell.ours for row in self.rows for cell in row.cells)


@dataclass(frozen=True)
class Table:
    key: str
    title: str
    sections: list[Section] = field(default_factory=list)


def only_ran(table: Table) -> Table:
    """Without the sections, rows and columns in which nothing of ours stands; the paper's values beside ours only."""
    return dataclasses.replace(table, sections=[_only_ran(section) for section in table.sections if section.ran])


def has_printed_values(table: Table) -> bool:
    """Whether a value of the paper stands in it."""
    return any(cell.paper for section in table.sections for row in section.rows for cell in row.cells)


def _only_ran(section: Section) -> Section:
    rows = [row for row in section.rows if any(cell.ours for cell in row.cells)]
    places = [i for i in range(len(section.rows[0].cells)) if any(row.cells[i].ours for row in rows)]
    return dataclasses.replace(section, rows=[Row(row.name, [_beside(row.cells[i]) for i in places]) for row in rows])


def _beside(cell: Cell) -> Cell:
    """The cell, without the paper's value where there is none of ours."""
    return cell if cell.ours else Cell(cell.column)


def auc_table(key: str, title: str, records: list[Record], protocol: str, printed: dict[Any, str]) -> Table:
    """Table I or II: a section per data set, percent."""
    mine = [r for r in records if r["stage"] == "evaluate" and r["protocol"] == protocol]
    sections = []
    for dataset in _datasets(mine, tuple(DATASETS)):
        here = [r for r in mine if r["dataset"] == dataset]
        column = paper_dataset(dataset)
        fractions = sorted({r["fraction"] for r in here} | (set(FRACTIONS) if column else set()))
        rows = []
        for arm, name in _arms(here, every=column is not None):
            cells = []
            for f in fractions:
                runs = [r for r in here if r["arm"] == arm and r["fraction"] == f]
                cells.append(Cell(f"{f * 100:g} %", printed.get((arm, column, f)), _auc(runs, "raw"),
                                  _auc(runs, "within_source")))  # fmt: skip
            rows.append(Row(name, cells))
        sections.append(Section(_title(dataset), rows, _sizes(here)))
    return Table(key, title, sections)


def neighbours_table(records: list[Record]) -> Table:
    """Frozen features by a vote of the nearest training films, percent; the paper has no such table."""
    return auc_table("neighbours", "Frozen, nearest neighbours (AUC, %)", records, "neighbours", {})


def ablation_table(records: list[Record]) -> Table:
    """Table III: fine-tuned AUC of OPTiML with and without its parts, as a share of one."""
    arms = [r for r in records if r["stage"] == "evaluate" and r["protocol"] == "finetune" and r["arm"] in ABLATION]
    ablated = {r["dataset"] for r in arms if r["arm"] != "optiml"}
    mine = [r for r in arms if r["dataset"] in ablated]
    sections = []
    for dataset in _datasets(mine, ("nih",)):
        here = [r for r in mine if r["dataset"] == dataset]
        fractions = (0.01, 0.1)
        rows = []
        for arm, (var_cov, cvsim) in ABLATION.items():
            name = f"var+cov {'✓' if var_cov else '✗'}, CV-SIM {'✓' if cvsim else '✗'}"
            cells = []
            for f in fractions:
                runs = [r for r in here if r["arm"] == arm and r["fraction"] == f]
                printed = TABLE3[var_cov, cvsim][f] if paper_dataset(dataset) == "nih" else None
                cells.append(Cell(f"{f * 100:g} %", printed, _auc(runs, "raw", 1), _auc(runs, "within_source", 1)))
            rows.append(Row(name, cells))
        sections.append(Section(_title(dataset), rows, _sizes(here), digits=3))
    return Table("table3", "Table III: ablation, fine-tuned (AUC)", sections)


def dice_table(records: list[Record]) -> Table:
    """What Fig. 3 plots: Dice, in our three conventions; the paper does not say which is its own."""
    mine = [r for r in records if r["stage"] == "segment"]
    sections = []
    for dataset in _datasets(mine, ("siim",)):
        here = [r for r in mine if r["dataset"] == dataset]
        tasks = sorted({(r["label"], r["fraction"]) for r in here}) or [("Pneumothorax", 1.0)]
        for label, f in tasks:
            rows = []
            for arm, name in _arms(here, every=paper_dataset(dataset) == "siim"):
                runs = [r for r in here if (r["arm"], r["label"], r["fraction"]) == (arm, label, f)]
                printed = FIG3.get(arm) if paper_dataset(dataset) == "siim" else None
                cells = [Cell("positives", printed, Summary.of([r["positives"] for r in runs]))]
                cells += [Cell(kind, None, Summary.of([r[kind] for r in runs])) for kind in ("kaggle", "global")]
                rows.append(Row(name, cells))
            part = "" if f == 1.0 else f", {f:.0%} of the outlines"
            note = " ".join(filter(None, [_sizes(here), DICE_NOTE if here else ""]))
            sections.append(Section(f"{_title(dataset)}, {label}{part}", rows, note, digits=3))
    return Table("fig3", "Fig. 3: segmentation (Dice)", sections)


def heatmap_table(records: list[Record]) -> Table:
    """Numbers that the paper's Fig. 2 does not give."""
    mine = [r for r in records if r["stage"] == "heatmap"]
    sections = []
    for dataset in _datasets(mine, ()):
        here = [r for r in mine if r["dataset"] == dataset]
        for f in sorted({r["fraction"] for r in here}):
            rows = []
            # Where no finding was learnt nothing is scored; records of an earlier pointing game know no empty maps.
            scored = [r for r in here if r["fraction"] == f and "empty" in r]
            for arm, name in _arms(here, every=False):
                runs = [r for r in scored if r["arm"] == arm]
                cells = [
                    Cell(title, None, Summary.of([r[key] for r in runs])) for key, title in HEATMAP_COLUMNS.items()
                ]
                rows.append(Row(name, cells))
            if scored:
                means = [np.mean([r["chance"].get(key, np.nan) for r in scored]) for key in HEATMAP_COLUMNS]
                known = [None if np.isnan(x) else Summary(float(x), 0, float(x), float(x), 1) for x in means]
                pairs = zip(HEATMAP_COLUMNS.values(), known, strict=True)
                rows.append(Row("chance", [Cell(title, None, ours) for title, ours in pairs]))
            counts = sorted({r["scored_findings"] for r in scored}) or [0]
            span = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
            note = f"{span} of {here[0]['boxed_findings']} boxed findings, whose class was among the labels."
            note += _weak_maps(scored)
            title = f"{_title(dataset)}, networks fine-tuned with {f:.0%} of the labels"
            sections.append(Section(title, rows, note, 3))
    return Table("fig2", "Fig. 2: Grad-CAM against boxes", sections)


def _weak_maps(scored: list[Record]) -> str:
    """Which rows' maps show little, and why: what a reader of the figure must know."""
    weak = []
    for arm, name in _arms(scored, every=False):
        runs = [r for r in scored if r["arm"] == arm]
        hits, empty = (float(np.mean([r[key]["value"] for r in runs])) for key in ("pointing", "empty"))
        luck = float(np.mean([r["chance"]["pointing"] for r in runs]))
        if hits < 2 * luck:
            weak.append(
                f"{name} points at {hits:.0%} of the findings (chance: {luck:.0%}), {empty:.0%} of its maps are empty"
            )
    if not weak:
        return ""
    return (
        f" {'; '.join(weak)}. A map is empty where no position speaks for the finding. So short a "
        "training hardly teaches where the findings are: read these maps as a check of the stage, not as evidence."
    ).replace("%", " %")


_KINDS: dict[str, Callable[[Cell, int], str]] = {
    "paper": lambda cell, digits: cell.paper or "",
    "ours": lambda cell, digits: cell.ours.text(digits) if cell.ours else "",
    "ours, within source": lambda cell, digits: cell.within.text(digits) if cell.within else "",
}


def markdown(table: Table) -> str:
    """Paper and ours side by side; blank where a side has no value."""
    lines = [f"## {table.title}", ""]
    for section in table.sections:
        lines += [f"### {section.title}", ""]
        shown = [
            (place, cell.column, kind, text)
            for place, cell in enumerate(section.rows[0].cells)
            for kind, text in _KINDS.items()
            if kind == "ours" or any(text(row.cells[place], section.digits) for row in section.rows)
        ]
        plain = all(kind == "ours" for _, _, kind, _ in shown)
        if section.note:
            lines += [section.note, ""]
        head = ["", *(column if plain else f"{column} {kind}" for _, column, kind, _ in shown)]
        cells = [
            [row.name, *(text(row.cells[place], section.digits) for place, _, _, text in shown)] for row in section.rows
        ]
        lines += [*markdown_table(head, cells, align="right"), ""]
    return "\n".join(lines)


def as_csv(table: Table) -> str:
    """One line per cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ("value", "deviation", "low", "high", "seeds")
    writer.writerow(["section", "row", "column", "paper", *names, *(f"within_{n}" for n in names[:4])])
    for section in table.sections:
        for row in section.rows:
            for cell in row.cells:
                mine = [_number(getattr(cell.ours, n)) if cell.ours else "" for n in names]
                within = [_number(getattr(cell.within, n)) if cell.within else "" for n in names[:4]]
                writer.writerow([section.title, row.name, cell.column, cell.paper or "", *mine, *within])
    return out.getvalue()


def _number(value: float) -> str:
    return f"{value:.5g}"


def _auc(runs: list[Record], kind: str, scale: float = 100.0) -> Summary | None:
    return Summary.of([run[kind]["macro"] for run in runs if kind in run], scale)


def _datasets(records: Iterable[Record], printed: tuple[str, ...]) -> list[str]:
    """The paper's data sets (those that we have a variant of, by that name), then others."""
    ran = sorted({r["dataset"] for r in records})
    result = []
    for name in printed:
        result += [d for d in ran if paper_dataset(d) == name] or [name]
    return result + [d for d in ran if d not in result]


def _title(dataset: str) -> str:
    column = paper_dataset(dataset)
    name = {**DATASETS, "siim": "SIIM-ACR"}.get(column or "", dataset)
    rest = dataset.partition("-")[2]
    return f"{name} (ours: {rest})" if column and rest else name


def _arms(records: list[Record], every: bool) -> list[tuple[str, str]]:
    """The paper's rows (all, or those that ran), then rows of our own in the order of their records."""
    ran = {r["arm"]: str(r.get("title", r["arm"])) for r in records}
    own = [(arm, title) for arm, title in ran.items() if arm not in ROWS]
    return [(arm, name) for arm, name in ROWS.items() if every or arm in ran] + own


def _sizes(records: list[Record]) -> str:
    """How much our figures rest on."""
    if not records:
        return "Not run."
    trained: dict[float, set[int]] = {}
    for record in records:
        trained.setdefault(record["fraction"], set()).add(record["train_images"])
    sizes = " / ".join(" or ".join(map(str, sorted(trained[f]))) for f in sorted(trained))
    pixels = sorted({r["identity"]["image_size"] for r in records} - {0})
    return (
        f"Ours: {sizes} labelled training films, {records[0]['images']} test films, "
        f"{' and '.join(map(str, pixels))} px; mean ± deviation over runs (their number)."
    )
