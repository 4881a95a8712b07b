"""What a comparison writes about itself: how it was made, and its tables between two lines of a page."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import atomic_path
from ..data.index import ChestIndex
from ..downstream.arms import SUP2
from ..downstream.result_files import Record
from .comparison_rows import Kind, rows
from .row_store import RowStore
from .tables import Table, markdown, only_ran


def provenance_text(
    kind: Kind, options: dict[str, Any], index: ChestIndex, records: list[Record], kept: dict[str, dict[int, RowStore]]
) -> str:
    """The command with its ``options``, the sizes, where and how long."""
    settings = {**options, "seeds": tuple(sorted(set().union(*kept.values())))}  # all that are reported
    settings["precision"] = None  # which says below what was, not what would be
    given = [
        f"--{name.replace('_', '-')} {' '.join(map(str, x)) if isinstance(x, tuple) else x}"
        for name, x in settings.items()
        if x is not None
    ]
    machines = sorted({_machine(r["made"]) for r in records})
    hours = sum(files.seconds for seeds in kept.values() for files in seeds.values()) / 3600
    commits = sorted({str(r["made"]["commit"])[:10] for r in records})
    films = f"{len(index.split('train'))} training and {len(index.split('test'))} test films"
    return (
        f"Made by `python -m examples.optiml compare {' '.join(given)}` in {hours:.1f} h on {', '.join(machines)} at "
        f"commit {', '.join(commits)}: {films}.{seeds_of(kept)}{precisions(kept)}{uncommitted(records)}"
        f"{without_scores(kept)}{missing_rows_text(kind, kept)}\n"
    )


def _machine(made: dict[str, Any]) -> str:
    on = made["device"] if made["device"] != "cpu" else made.get("processor", "cpu")
    return f"{on} ({made['machine']}, {made['threads']} threads)"


def uncommitted(records: list[Record]) -> str:
    """Which rows and seeds were made where something was not committed."""
    changed = sorted({Path(r["file"]).parent.name for r in records if r["made"]["uncommitted_changes"]})
    return f" With uncommitted changes: {', '.join(changed)}." if changed else ""


def without_scores(kept: dict[str, dict[int, RowStore]]) -> str:
    """Which rows and seeds have a figure with all labels, but not the test scores that a paired difference needs."""
    lacking: dict[str, list[str]] = {}
    for files in (files for seeds in kept.values() for files in seeds.values()):
        for protocol in dict.fromkeys(files.records[key]["protocol"] for key in files.records_without_scores()):
            lacking.setdefault(protocol, []).append(files.name)
    parts = [f"{protocol}: {', '.join(names)}" for protocol, names in lacking.items()]
    return f" Not in the paired differences, as test scores were not kept: {'; '.join(parts)}." if parts else ""


def missing_rows_text(kind: Kind, kept: dict[str, dict[int, RowStore]]) -> str:
    """Which rows are not in the report, and why one may not be."""
    why = {SUP2: " (its weights have to be downloaded)"}
    names = [row.name + why.get(row.name, "") for row in rows(kind) if row.name not in kept]
    return f" Not in this report: {', '.join(names)}." if names else ""


def seeds_of(kept: dict[str, dict[int, RowStore]]) -> str:
    """Which rows were made under which seeds, where not all have the same."""
    made: dict[tuple[int, ...], list[str]] = {}
    for name, files in kept.items():
        made.setdefault(tuple(sorted(files)), []).append(name)
    if len(made) < 2:
        return ""
    parts = [f"{', '.join(map(str, seeds))}: {', '.join(made[seeds])}" for seeds in sorted(made)]
    return f" Seeds {'; '.join(parts)}."


def precisions(kept: dict[str, dict[int, RowStore]]) -> str:
    """What was pretrained in which precision: the most frequent one, and what was in another."""
    found: dict[str, list[str]] = {}
    for files in (files for seeds in kept.values() for files in seeds.values()):
        if precision := files.pretraining.get("precision"):
            found.setdefault(precision, []).append(files.name)
    if not found:
        return ""
    usual, *others = sorted(found, key=lambda precision: -len(found[precision]))
    return f" Pretrained in {usual}" + "".join(f", in {p} {', '.join(found[p])}" for p in others) + "."


#: Columns of the table of how pretraining ended, by their names in the log.
ENDS = {
    "loss": "loss", "std_q": "std of embeddings", "std_g": "std of pooled features", "effective_rank": "effective rank",
    "map_std": "std over a map", "perplexity": "perplexity of marginals", "knn_auc_within": "kNN AUC, within source",
    "knn_auc": "kNN AUC",
}  # fmt: skip


def pretraining_table(curves: dict[str, list[list[dict[str, float]]]]) -> str:
    """How each row's pretraining ended, as a table in Markdown."""
    ended = [run[-1] for runs in curves.values() for run in runs]
    names = [name for name in ENDS if any(np.isfinite(epoch.get(name, np.nan)) for epoch in ended)]
    lines = [
        "Means over the last epoch, then over seeds (in brackets: over how many, where not all had the figure); after "
        "it: effective rank of the pooled features of the training films, and a vote of the nearest of these on the "
        "validation films. Embeddings of SimCLR, MoCo v2, DenseCL, BYOL and SimSiam have length 1, so that their "
        "deviation is at most 1 / √dim.", "",
        "| | seeds | " + " | ".join(ENDS[name] for name in names) + " |", "| --- |" + " ---: |" * (1 + len(names)),
    ]  # fmt: skip
    for row, runs in ((row, runs) for row, runs in curves.items() if runs):
        found = [[run[-1][name] for run in runs if np.isfinite(run[-1].get(name, np.nan))] for name in names]
        of_some = [f" ({len(x)})" if len(x) < len(runs) else "" for x in found]
        means = [f"{np.mean(x):.3g}{few}" if x else "" for x, few in zip(found, of_some, strict=True)]
        lines.append(f"| {' | '.join([row, str(len(runs)), *means])} |")
    return "\n".join(lines) + "\n"


def markers(kind: Kind) -> tuple[str, str]:
    """Lines of a file between which a comparison's tables stand."""
    return f"<!-- compare --rows {kind}: written by that command, do not edit -->", f"<!-- end of {kind} -->"


def write_tables(path: Path, kind: Kind, tables: list[Table], notes: str, folder: Path) -> None:
    """Put what ran between the markers, a level of headings deeper; pictures are in ``folder``."""
    ran = [markdown(table) for table in map(only_ran, tables) if table.sections]
    body = "\n".join([*ran, notes]).replace("](", f"]({os.path.relpath(folder, path.parent)}/")
    body = re.sub("^#", "###", body, flags=re.MULTILINE)
    text, (begin, end) = path.read_text(), markers(kind)
    if begin not in text or end not in text:
        raise SystemExit(f"{path} lacks the lines {begin!r} and {end!r}")
    before, _, rest = text.partition(begin)
    with atomic_path(path) as part:
        part.write_text(f"{before}{begin}\n\n{body}\n{end}{rest.partition(end)[2]}")
