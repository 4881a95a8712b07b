"""The report: what was run, in the form of the paper's tables and figures, from records and nothing else."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..downstream.arms import ROWS
from ..downstream.result_files import Record, read_records
from ..errors import CommandError
from .figures import draw_heatmaps, draw_table, same_films
from .paper import TABLE1, TABLE2
from .settings import ReportConfig
from .tables import (
    Table,
    ablation_table,
    as_csv,
    auc_table,
    dice_table,
    has_printed_values,
    heatmap_table,
    markdown,
    neighbours_table,
    only_ran,
)

RECORDS = "records.json"
#: The tables as the paper has them, with a blank for everything that was not run.
PAPER_TABLES = "paper-tables.md"
PREAMBLE = """# OPTiML: what was run

Ours: mean ± deviation over runs, and in brackets how many. Tables I and II are in percent, III and Dice are shares of
one. Intervals and all digits are in the CSV files beside this page, all figures in `records.json`.
"""
#: Said where a printed value stands beside one of ours.
BESIDE = """Paper: values as printed. Our runs differ from the paper's in data and scale, which stand above each table.
"""
APPENDIX = """# The paper's tables

Every row and column that the paper prints, with our values beside its own. A blank means that it was not run.
"""


def build(records: list[Record]) -> list[Table]:
    """All tables, in the paper's order."""
    return [
        auc_table("table1", "Table I: fine-tuned (AUC, %)", records, "finetune", TABLE1),
        auc_table("table2", "Table II: frozen, linear (AUC, %)", records, "linear", TABLE2),
        ablation_table(records),
        heatmap_table(records),
        dice_table(records),
    ]


def report(
    records: list[Record], out: Path, console: Console | None = None, more: Sequence[Table] = (), notes: str = "",
    opening: str = "",
) -> Path:  # fmt: skip
    """Write ``opening``, what was run, ``more`` tables, ``notes``, and the paper's tables as an appendix.

    Returns the page.
    """
    console = console or Console()
    check(records)
    out.mkdir(parents=True, exist_ok=True)
    full = build(records)
    ran = [only_ran(table) for table in (*full, neighbours_table(records), *more)]
    for table in ran:  # also those without a line, so that no figure of an earlier report stays
        (out / f"{table.key}.csv").write_text(as_csv(table))
    tables = [table for table in ran if table.sections]
    beside = [BESIDE] if any(has_printed_values(table) for table in tables) else []
    parts = [PREAMBLE, *beside, *_mixed(records), *([opening] if opening else [])]
    for table in tables:
        if table.key == "fig2":
            pictures = _heatmaps(records, out)
        else:
            pictures = [f"{table.key}.png"]
            draw_table(table, out / pictures[0])
        parts.append(markdown(table))
        parts += [f"![{table.title}]({picture})\n" for picture in pictures]
    appendix = f"The paper's tables, with a blank for all that was not run: [{PAPER_TABLES}]({PAPER_TABLES}).\n"
    parts += [notes, _made(records), appendix]
    (out / PAPER_TABLES).write_text("\n".join([APPENDIX, *(markdown(table) for table in full if table.sections)]))
    (out / RECORDS).write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
    path = out / "report.md"
    path.write_text("\n".join(parts))
    console.print(f"{len(records)} records, report: {path}")
    return path


def check(records: list[Record]) -> None:
    """No figure may be counted twice."""
    seen: dict[str, str] = {}
    for record in records:
        keys = ("stage", "arm", "dataset", "protocol", "label", "fraction", "seed")
        key = str([record.get(name) for name in keys] + [record["pretraining"].get("seed")])
        if key in seen:
            both = f"{record['file']} and {seen[key]}"
            raise CommandError(f"{both} are the same run of the same arm; leave one out or set --arm")
        seen[key] = record["file"]


def _mixed(records: list[Record]) -> list[str]:
    """A warning where one row averages over runs of different settings; precision is the machine's choice, and none."""
    settings: dict[tuple[str, str], set[str]] = defaultdict(set)
    for record in records:
        row = f"Row {record['arm']} on {record['dataset']}"
        trained = {key: value for key, value in record["pretraining"].items() if key not in ("seed", "precision")}
        settings[row, "pretraining settings"].add(_same(trained))
        of = [str(record[key]) for key in ("protocol", "label") if key in record]
        identity = {key: record["identity"].get(key) for key in ("data", "image_size", "stem", "train", "draws")}
        where = " ".join([row, record["stage"], *of, f"{record['fraction']:.0%}"])
        settings[where, "versions of data or sizes"].add(_same(identity))
    return [f"**{where} mixes {len(s)} {what}.**\n" for (where, what), s in sorted(settings.items()) if len(s) > 1]


def _same(settings: dict[str, Any]) -> str:
    """Equal for equal settings, in whatever order they were written."""
    return json.dumps(settings, sort_keys=True)


def _heatmaps(records: list[Record], out: Path) -> list[str]:
    """One figure per data set and fraction: the arms' first seeds, over the same films."""
    groups: dict[tuple[str, float], dict[str, dict[str, np.ndarray]]] = defaultdict(dict)
    order = list(ROWS)
    mine = [r for r in records if r["stage"] == "heatmap"]
    for record in sorted(mine, key=lambda r: (order.index(r["arm"]) if r["arm"] in order else len(order), r["seed"])):
        path = Path(record["file"]).with_suffix(".npz")
        known = groups[record["dataset"], record["fraction"]]
        name = str(ROWS.get(record["arm"], record.get("title", record["arm"])))
        if name in known or not path.exists():
            continue
        with np.load(path) as arrays:
            maps = dict(arrays)
        if not known or same_films(next(iter(known.values())), maps):
            known[name] = maps
    pictures = []
    for (dataset, fraction), arms in sorted(groups.items()):
        if arms:
            pictures.append(f"fig2-{dataset}-{fraction:g}.png")
            draw_heatmaps(f"Grad-CAM, fine-tuned with {fraction:.0%} of {dataset}", arms, out / pictures[-1])
    return pictures


def _made(records: list[Record]) -> str:
    if not records:
        return "No records.\n"
    trained = [record for record in records if record["pretraining"].get("method")]
    runs = {(r["arm"], _same(r["pretraining"])): r["pretraining"] for r in trained}
    lines = ["## How it was made", ""]
    for (arm, _), run in sorted(runs.items()):
        lines.append(
            f"* {arm}: {run.get('epochs')} epochs of {run.get('method')} at {run.get('image_size')} px, "
            f"batch {run.get('batch_size')}, seed {run.get('seed')}"
        )
    commits = sorted({str(r["made"]["commit"])[:10] for r in records})
    days = sorted({r["made"]["time"][:10] for r in records})
    lines.append(f"* {len(records)} records of {', '.join(days)}, commit {', '.join(commits)}")
    return "\n".join(lines) + "\n"


def main(config: ReportConfig) -> None:
    """The ``report`` command."""
    report(read_records(config.runs), config.out)
