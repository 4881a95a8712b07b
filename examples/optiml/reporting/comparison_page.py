"""The text around a comparison's tables, which says how they were made; and the tables' place in a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..data.index import ChestIndex
from ..downstream.arms import SUP2
from ..downstream.result_files import Record
from ..markdown import markdown_table
from .row_files import comparison_rows
from .row_store import Stores


def provenance_text(
    kind: str, options: dict[str, Any], index: ChestIndex, records: list[Record], stores: Stores
) -> str:
    """The command with its ``options``, the time and the machines it took, the number of films, and what is missing."""
    settings = {**options, "seeds": tuple(sorted(set().union(*stores.values())))}  # all seeds in the report
    settings["precision"] = None  # the text says below what was computed in which precision
    given = [
        f"--{name.replace('_', '-')} {' '.join(map(str, x)) if isinstance(x, tuple) else x}"
        for name, x in settings.items()
        if x is not None
    ]
    machines = sorted({_machine(r["made"]) for r in records})
    hours = sum(files.seconds for seeds in stores.values() for files in seeds.values()) / 3600
    commits = sorted({str(r["made"]["commit"])[:10] for r in records})
    films = f"{len(index.split('train'))} training and {len(index.split('test'))} test films"
    return (
        f"Made by `python -m examples.optiml compare {' '.join(given)}` in {hours:.1f} h on {', '.join(machines)} at "
        f"commit {', '.join(commits)}: {films}.{seeds_of(stores)}{precisions(stores)}"
        f"{uncommitted(records)}{without_scores(stores)}{missing_rows_text(kind, stores)}\n"
    )


def _machine(made: dict[str, Any]) -> str:
    on = made["device"] if made["device"] != "cpu" else made.get("processor", "cpu")
    return f"{on} ({made['machine']}, {made['threads']} threads)"


def uncommitted(records: list[Record]) -> str:
    """Which rows and seeds were made by code with uncommitted changes."""
    changed = sorted({Path(r["file"]).parent.name for r in records if r["made"]["uncommitted_changes"]})
    return f" With uncommitted changes: {', '.join(changed)}." if changed else ""


def without_scores(stores: Stores) -> str:
    """Which rows and seeds lack the test scores with all labels, which a paired difference needs."""
    lacking: dict[str, list[str]] = {}
    for files in (files for seeds in stores.values() for files in seeds.values()):
        for protocol in dict.fromkeys(files.records[key]["protocol"] for key in files.records_without_scores()):
            lacking.setdefault(protocol, []).append(files.name)
    parts = [f"{protocol}: {', '.join(names)}" for protocol, names in lacking.items()]
    return f" Not in the paired differences, as test scores were not kept: {'; '.join(parts)}." if parts else ""


def missing_rows_text(kind: str, stores: Stores) -> str:
    """Which rows are not in the report, with the reason if there is one."""
    reasons = {SUP2: " (its weights have to be downloaded)"}
    missing = [row.arm + reasons.get(row.arm, "") for row in comparison_rows(kind) if row.arm not in stores]
    return f" Not in this report: {', '.join(missing)}." if missing else ""


def seeds_of(stores: Stores) -> str:
    """Which rows were made under which seeds; nothing if all have the same seeds."""
    arms_by_seeds: dict[tuple[int, ...], list[str]] = {}
    for arm, files in stores.items():
        arms_by_seeds.setdefault(tuple(sorted(files)), []).append(arm)
    if len(arms_by_seeds) < 2:
        return ""
    parts = [f"{', '.join(map(str, seeds))}: {', '.join(arms_by_seeds[seeds])}" for seeds in sorted(arms_by_seeds)]
    return f" Seeds {'; '.join(parts)}."


def precisions(stores: Stores) -> str:
    """The most frequent precision of the pretrainings, and the rows and seeds of each other one."""
    found: dict[str, list[str]] = {}
    for files in (files for seeds in stores.values() for files in seeds.values()):
        if precision := files.pretraining.get("precision"):
            found.setdefault(precision, []).append(files.name)
    if not found:
        return ""
    usual, *others = sorted(found, key=lambda precision: -len(found[precision]))
    return f" Pretrained in {usual}" + "".join(f", in {p} {', '.join(found[p])}" for p in others) + "."


#: The columns of :func:`pretraining_table`: their names in the log, and their titles.
FIGURES = {
    "loss": "loss", "std_q": "std of embeddings", "std_g": "std of pooled features", "effective_rank": "effective rank",
    "map_std": "std over a map", "perplexity": "perplexity of marginals", "knn_auc_within": "kNN AUC, within source",
    "knn_auc": "kNN AUC",
}  # fmt: skip


def pretraining_table(curves: dict[str, list[list[dict[str, float]]]]) -> str:
    """How each row's pretraining ended, as a table in Markdown. ``curves``: by title, the epochs under each seed."""
    last_epochs = [run[-1] for runs in curves.values() for run in runs]
    names = [name for name in FIGURES if any(np.isfinite(epoch.get(name, np.nan)) for epoch in last_epochs)]
    cells = []
    for title, runs in ((title, runs) for title, runs in curves.items() if runs):
        found = [[run[-1][name] for run in runs if np.isfinite(run[-1].get(name, np.nan))] for name in names]
        counts = [f" ({len(x)})" if len(x) < len(runs) else "" for x in found]
        means = [f"{np.mean(x):.3g}{count}" if x else "" for x, count in zip(found, counts, strict=True)]
        cells.append([title, str(len(runs)), *means])
    lines = [
        "Means over the last epoch, then over seeds (in brackets: over how many, where not all had the figure); after "
        "it: effective rank of the pooled features of the training films, and a vote of the nearest of these on the "
        "validation films. Embeddings of SimCLR, MoCo v2, DenseCL, BYOL and SimSiam have length 1, so that their "
        "deviation is at most 1 / √dim.", "",
        *markdown_table(["", "seeds", *(FIGURES[name] for name in names)], cells, align="right"),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
