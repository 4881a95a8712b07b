"""Compare all rows under one budget, and report them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from rich.console import Console

from ..downstream.arms import SUP1, SUP2
from ..downstream.result_files import Record
from ..errors import CommandError
from ..reporting.comparison_page import pretraining_table, provenance_text
from ..reporting.comparison_rows import BUILT_IN
from ..reporting.differences import auc_measures, beyond_zero, dice_measure, difference_table, replicated, verdicts
from ..reporting.figures import draw_curves, draw_effects
from ..reporting.overview import Overview, OverviewRow, overview
from ..reporting.report import RECORDS, report
from ..reporting.row_store import Stores
from ..reporting.tables import Table
from .comparison import Comparison
from .settings import CompareConfig
from .xray import outlined

PACKAGE = Path(__file__).parents[1]


def compare(config: CompareConfig, console: Console | None = None) -> Path:
    """Make or find all rows; return the report."""
    console = console or Console()
    comparison = Comparison(config, console)
    records, stores, failed = comparison.run_rows()
    if not records:
        raise CommandError(f"nothing to report: {', '.join(failed) or 'no row'} was made")
    console.rule("report")
    path = write_report(comparison, records, stores)
    if failed:
        raise CommandError(f"not in the report: {', '.join(failed)}")
    return path


def write_report(comparison: Comparison, records: list[Record], stores: Stores) -> Path:
    """Write the report and copy it to ``results``; return the page."""
    config, console = comparison.config, comparison.console
    table, notes = differences(comparison, records, stores)
    notes += "\n" + provenance_text(config.rows, config.options(), comparison.main_set.index, records, stores)
    out, final = config.out / f"report-{config.rows_name}", config.results / config.rows_name
    curves = {
        row.title: [files.curves for files in stores[row.arm].values() if files.curves]
        for row in comparison.rows
        if row.arm in stores
    }
    trained = {title: runs for title, runs in curves.items() if runs and "loss" in runs[0][0]}
    if trained:
        out.mkdir(parents=True, exist_ok=True)
        draw_curves(trained, out / "curves.png")
        picture = "![Loss, deviations and kNN over epochs](curves.png)"
        notes = f"## Pretraining\n\n{pretraining_table(curves)}\n{picture}\n\n{notes}"
    found = None if config.rows in BUILT_IN else overview_of(comparison, records, stores)
    if found and found.effects:
        out.mkdir(parents=True, exist_ok=True)
        draw_effects(found.effects, out / "effects.png")
    opening = f"{found.text}\n![Every row minus the first one](effects.png)\n" if found else ""
    path = report(records, out, console, (table,), notes, opening)
    shutil.copytree(out, final, dirs_exist_ok=True, ignore=shutil.ignore_patterns(RECORDS))
    console.print(f"Copied to {final}")
    return path


def overview_of(comparison: Comparison, records: list[Record], stores: Stores) -> Overview | None:
    """The rows of a file on the main data set, after the row that they are compared with; None without that row."""
    if comparison.reference not in stores:
        return None
    first = [row for row in comparison.rows if row.arm == comparison.reference]
    others = [row for row in comparison.rows if row.method and row.arm != comparison.reference]
    ordered = [*first, *others, *(row for row in comparison.rows if row.method is None)]
    rows = [
        OverviewRow(
            row.arm,
            row.title,
            {seed: files.arrays_of(records) for seed, files in stores[row.arm].items()},
            [files.curves for files in stores[row.arm].values() if files.curves],
        )
        for row in ordered
        if row.arm in stores
    ]
    data, sizes = comparison.main_set, comparison.sizes
    return overview(data.index, data.name, sizes.fractions, sizes.draws, rows)


def differences(comparison: Comparison, records: list[Record], stores: Stores) -> tuple[Table, str]:
    """The reference (the recommended OPTiML, or the first row of a file) minus each row; and each minus untrained."""
    draws, titles = comparison.sizes.draws, {row.arm: row.title for row in comparison.rows}
    measures = [measure for data in comparison.sets for measure in auc_measures(data.index, data.name, draws)]
    if comparison.mask_set is not None:
        column = outlined(comparison.mask_set.index.root, comparison.config.data, comparison.main_set.name)
        measures.append(dice_measure(comparison.mask_set, column, max(comparison.sizes.segment_fractions), draws))
    arrays = {
        title: {seed: files.arrays_of(records) for seed, files in stores[arm].items()}
        for arm, title in titles.items()
        if arm in stores
    }
    if sup2 := arrays.get(titles.get(SUP2, "")):
        arrays[titles[SUP2]] = dict.fromkeys(comparison.seeds, next(iter(sup2.values())))
    found = replicated(measures, arrays)
    table = difference_table(titles[comparison.reference], found)
    return table, f"{beyond_zero(table)}\n{verdicts(titles[SUP1], found)}" if found else ""


def main(config: CompareConfig) -> None:
    """The ``compare`` command."""
    console, started = Console(), time.monotonic()
    path = compare(config, console)
    console.print(f"{(time.monotonic() - started) / 60:.0f} min. {path}")
