"""All rows under one budget: every method of the paper's tables, or the ablation; resumable at every step.

What was made is known from the files in ``results`` alone (``kept``), which are small and meant to be committed:
where they have a record of every stage of a row and seed, that is not pretrained again, whatever became of its weights.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..data.index import open_index, with_all_splits
from ..data.masks import mask_set
from ..downstream.arms import SUP1, SUP2
from ..downstream.result_files import Record
from ..downstream.starting_weights import Start
from ..pretraining.log import log_frame
from ..pretraining.monitor import measure, subsample
from ..pretraining.network import load_backbone
from ..pretraining.precision import fast_precision
from ..pretraining.settings import AugmentConfig, MethodOptions, MonitorConfig, PretrainConfig
from ..pretraining.trainer import BACKBONE, LAST, LOG, MONITOR, pretrain
from ..reporting.comparison_page import pretraining_table, provenance_text, write_tables
from ..reporting.comparison_rows import NOT_TRAINED, RECOMMENDED, ComparisonRow, rows
from ..reporting.differences import auc_measures, beyond_zero, dice_measure, difference_table, replicated, verdicts
from ..reporting.figures import draw_curves
from ..reporting.report import RECORDS, build, report
from ..reporting.row_store import RowStore, curves_of, monitor_columns
from ..reporting.tables import Table, only_ran
from .settings import CompareConfig, XrayConfig
from .xray import outlined, stages

HERE = Path(__file__).parent
#: Of ``results``, what is kept of each row and seed.
RUNS = "runs"
#: Measurements with labels while a row is pretrained.
LOOKS = 5


def seeds_there(runs: Path, known: list[ComparisonRow]) -> set[int]:
    """Those that something is kept of, by any of these rows."""
    names = {row.name for row in known}
    split = (path.stem.rpartition("-seed") for path in runs.glob("*-seed*.json"))
    return {int(seed) for name, _, seed in split if name in names and seed.isdecimal()}


class LeftOut(SystemExit):
    """A row that was not to be made is not there; says why, if some of it is."""


class Comparison:
    """The rows under one configuration."""

    def __init__(self, config: CompareConfig, console: Console) -> None:
        self.config, self.console, self.sizes = config, console, config.stages()
        self.rows, sets = rows(config.rows), [(config.data, config.dataset, self.sizes)]
        if config.rsna_data:
            sets.append((config.rsna_data, None, replace(self.sizes, segment_data=None, heatmap_fractions=())))
        # What is wrong with a folder is worth knowing before hours of pretraining.
        self.sets = [(with_all_splits(open_index(path)), name or path.resolve().name, s) for path, name, s in sets]
        if len(columns := [name for _, name, _ in self.sets]) > len(set(columns)):
            raise SystemExit(f"--data and --rsna-data have the same name {columns[0]!r}; give --dataset")
        self.task = mask_set(open_index(config.segment_data), config.label) if config.segment_data else None
        runs = config.results / RUNS
        self.seeds = sorted({*config.seeds, *seeds_there(runs, self.rows)})
        # ImageNet's weights are the same under every seed; fine-tuning has seeds of its own.
        once = min(seeds_there(runs, [ComparisonRow(SUP2)]), default=config.seeds[0])
        self.units = [(r, s) for s in self.seeds for r in self.rows if r.name != SUP2 or s == once]

    def wanted(self, row: ComparisonRow, seed: int) -> bool:
        """Whether to make what is not there of it."""
        named = not self.config.only or row.name in self.config.only
        return named and not self.config.report_only and (row.name == SUP2 or seed in self.config.seeds)

    def all(self) -> tuple[list[Record], dict[str, dict[int, RowStore]], list[str]]:
        """Every row and seed, made or found: records, kept files by row and seed, and which of them failed."""
        records, kept, failed = list[Record](), dict[str, dict[int, RowStore]](), list[str]()
        left = sum(self.wanted(row, seed) for row, seed in self.units)
        took: list[float] = []
        self.console.print(f"{left} rows and seeds to go through; what is in {self.config.results} is not made again")
        for row, seed in self.units:
            name, started, made = f"{row.name}-seed{seed}", time.monotonic(), list[float]()
            try:
                found, files = self.one(row, seed, name, left, made)
            except LeftOut as reason:
                if reason.code:
                    self.console.print(reason.code)
                continue
            except SystemExit as stop:
                if not isinstance(stop.code, str):  # told to stop
                    raise
                self.console.print(f"{name} is left out: {stop.code}", soft_wrap=True)
                failed += [] if row.name == SUP2 else [name]
                continue
            left -= self.wanted(row, seed)
            records += found
            kept.setdefault(row.name, {})[seed] = files
            if made:
                took.append(time.monotonic() - started)
                self.console.print(
                    f"{name}: {took[-1] / 60:.1f} min; at that pace at most {left * np.mean(took) / 3600:.1f} h more"
                )
        return records, kept, failed

    def one(
        self, row: ComparisonRow, seed: int, name: str, left: int, made: list[float]
    ) -> tuple[list[Record], RowStore]:
        """One row under one seed; ``made`` gets an entry when something has to be made: seconds not counted yet."""
        work, started = self.config.out / "downstream", time.monotonic()
        wanted, files = self.wanted(row, seed), RowStore(self.config.results / RUNS, name)
        files.restore(work)
        run = None if row.name in NOT_TRAINED else self._pretraining(row, seed, name, files.pretraining)

        def make() -> None:
            """Called whenever weights are needed, so never where all is there."""
            if not wanted:
                known = f"{name} is left out: it is not complete, or of other settings" if files.records else None
                raise LeftOut(known)
            uncounted = 0.0
            if not made and run is not None:
                uncounted = self._pretrain(run, files, left)
            elif not made and row.name == SUP1:
                files.keep_curves([{"epoch": 0, "step": 0, **monitor_columns(self._untrained(seed))}])
            made.append(uncounted)

        found = []
        try:
            for start, sizes in self._starts(row, seed, run, make):
                for record in stages(sizes, start, name, work, self.console if wanted else Console(quiet=True)):
                    files.add(record)
                    found.append(record)
        finally:
            if made:
                files.spend(time.monotonic() - started + sum(made))
        for path in [*work.glob(f"*/{name}/*.pth"), *([run.out / LAST] if run else [])]:
            path.unlink(missing_ok=True)  # large, and no stage needs it any more
        return found, files

    def _pretraining(self, row: ComparisonRow, seed: int, name: str, kept: dict[str, Any]) -> PretrainConfig:
        """A run folder of its own for everything that its result depends on.

        In the precision of what is ``kept`` of it: that is the machine's choice and makes no other row.
        """
        s, budget, options = self.sizes, self.config.budgeted(), MethodOptions()
        assert row.method is not None and s.image_size is not None
        mine = getattr(options, row.method)
        if hasattr(mine, "queue"):
            keys = {"queue": budget.queue or mine.queue, "momentum": budget.key_momentum or mine.momentum}
            options = replace(options, **{row.method: replace(mine, **keys)})
        run = row.apply(
            PretrainConfig(
                self.config.data, self.config.out, row.method, epochs=s.epochs, batch_size=s.batch_size,
                image_size=s.image_size, seed=seed, augment=AugmentConfig(min_scale=s.min_scale), workers=s.workers,
                precision=budget.precision or fast_precision(), options=options,
                monitor=MonitorConfig(every=max(1, s.epochs // LOOKS)),
            )
        )  # fmt: skip
        same = replace(run, precision=kept.get("precision", run.precision))
        run = same if self._saved(same) == kept else run
        return replace(run, out=self.config.out / f"{name}-{run.key()}")

    def _saved(self, run: PretrainConfig) -> dict[str, Any]:
        """What records say of a pretraining."""
        return {**run.identity(), "data_fingerprint": self.sets[0][0].fingerprint()}

    def _pretrain(self, run: PretrainConfig, files: RowStore, left: int) -> float:
        """Returns the seconds of steps that earlier calls took without finishing, which nothing has counted."""
        earlier = 0.0 if (run.out / BACKBONE).exists() else float(log_frame(run.out / LOG)["seconds"].sum())
        if pretrain(run, self.console) is None:
            raise SystemExit(f"{run.out} did not finish; the same command goes on")
        seconds = log_frame(run.out / LOG)["seconds"]
        files.keep_curves(curves_of(run.out / LOG, run.out / MONITOR))
        hours = float(seconds.median()) * len(seconds) / 3600
        self.console.print(
            f"{len(seconds)} steps took {hours * 60:.1f} min; as many for {left - 1} more: {hours * (left - 1):.1f} h"
        )
        return earlier

    def _untrained(self, seed: int) -> dict[str, float]:
        """What the monitor would say before the first step."""
        (index, _, sizes), config = self.sets[0], MonitorConfig()
        assert sizes.image_size is not None
        bank, queries = (subsample(index.split(name), config.images) for name in ("train", "val"))
        return measure(load_backbone(None, seed), bank, queries, sizes.image_size, config)

    def _starts(
        self, row: ComparisonRow, seed: int, run: PretrainConfig | None, make: Callable[[], None]
    ) -> list[tuple[Start, XrayConfig]]:
        """Where the stages begin, for each data set that is evaluated on, with their sizes."""
        like = run or PretrainConfig(self.config.data, self.config.out)
        saved: dict[str, Any] = {"seed": seed} if row.name == SUP1 else {}
        if run is not None:
            saved = self._saved(run)
        assert self.sizes.image_size is not None
        start = Start(
            row.name, "", self.sizes.image_size, like.val_fraction, like.split_seed, self.config.data,
            weights=run.out / BACKBONE if run else None, imagenet=row.name == SUP2, pretraining=saved,
            seed=seed if row.name == SUP1 else None, make=make, title=row.title,
        )  # fmt: skip
        return [(replace(start, data=index.root, dataset=name), sizes) for index, name, sizes in self.sets]

    def differences(self, records: list[Record], kept: dict[str, dict[int, RowStore]]) -> tuple[Table, str]:
        """The recommended OPTiML minus each other row; and on whether each beats the untrained network."""
        draws, shown = self.sizes.draws, {row.name: row.shown for row in self.rows}
        measures = [measure for index, name, _ in self.sets for measure in auc_measures(index, name, draws)]
        if self.task is not None:
            name = outlined(self.task.index.root, self.config.data, self.sets[0][1])
            measures.append(dice_measure(self.task, name, max(self.sizes.segment_fractions), draws))
        arrays = {
            title: {seed: files.arrays_of(records) for seed, files in kept[name].items()}
            for name, title in shown.items()
            if name in kept
        }
        if alone := arrays.get(shown.get(SUP2, "")):
            arrays[shown[SUP2]] = dict.fromkeys(self.seeds, next(iter(alone.values())))
        found = replicated(measures, arrays)
        table = difference_table(shown[RECOMMENDED], found)
        return table, f"{beyond_zero(table)}\n{verdicts(shown[SUP1], found)}" if found else ""


def compare(config: CompareConfig, console: Console | None = None) -> Path:
    """All rows; returns the report."""
    console = console or Console()
    comparison = Comparison(config, console)
    records, kept, failed = comparison.all()
    if not records:
        raise SystemExit(f"nothing to report: {', '.join(failed) or 'no row'} was made")
    console.rule("report")
    table, lines = comparison.differences(records, kept)
    lines += "\n" + provenance_text(config.rows, config.options(), comparison.sets[0][0], records, kept)
    out, final = config.out / f"report-{config.rows}", config.results / config.rows
    curves = {r.shown: [f.curves for f in kept[r.name].values() if f.curves] for r in comparison.rows if r.name in kept}
    trained = {name: runs for name, runs in curves.items() if runs and "loss" in runs[0][0]}
    if trained:
        out.mkdir(parents=True, exist_ok=True)
        draw_curves(trained, out / "curves.png")
        picture = "![Loss, deviations and kNN over epochs](curves.png)"
        lines = f"## Pretraining\n\n{pretraining_table(curves)}\n{picture}\n\n{lines}"
    path = report(records, out, console, (table,), lines)
    shutil.copytree(out, final, dirs_exist_ok=True, ignore=shutil.ignore_patterns(RECORDS))
    readme = config.readme or (HERE / "README.md" if config.results.resolve().is_relative_to(HERE) else None)
    if readme is not None:
        picture = f"![{table.title}](differences.png)\n\n" if only_ran(table).sections else ""
        figures = ", ".join(f"[{path.stem}]({path.name})" for path in sorted(out.glob("*.png")))
        all_of_it = f"\nFigures: {figures}. Everything on one page: [report.md](report.md).\n"
        write_tables(readme, config.rows, [*build(records), table], picture + lines + all_of_it, final)
    console.print(f"Copied to {final}")
    if failed:
        raise SystemExit(f"not in the report: {', '.join(failed)}")
    return path


def main(config: CompareConfig) -> None:
    """The ``compare`` command."""
    console, started = Console(), time.monotonic()
    path = compare(config, console)
    console.print(f"{(time.monotonic() - started) / 60:.0f} min. {path}")
