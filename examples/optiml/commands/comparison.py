"""Make all rows of a comparison under one budget: every method of the paper's tables, or the ablation.

It can be stopped and repeated at every step. It decides by the small files in ``results`` alone (``RowStore``) what is
left to do. They are meant to be committed. A row and seed of which they hold all records is not pretrained again, even
if its weights are gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..data.index import ChestIndex, open_index, with_all_splits
from ..data.masks import mask_set
from ..downstream.arms import ROWS, SUP1, SUP2
from ..downstream.result_files import Record
from ..downstream.starting_weights import Start
from ..errors import CommandError, DiskError
from ..pretraining.log import log_frame
from ..pretraining.monitor import measure, subsample
from ..pretraining.network import load_backbone
from ..pretraining.precision import fast_precision
from ..pretraining.settings import AugmentConfig, MethodOptions, MonitorConfig, PretrainConfig, check_imagenet
from ..pretraining.trainer import BACKBONE, LAST, LOG, MONITOR, pretrain
from ..reporting.comparison_rows import NOT_TRAINED, ComparisonRow
from ..reporting.row_files import comparison_rows, reference
from ..reporting.row_store import RowStore, Stores, curves_of, monitor_columns
from .settings import CompareConfig
from .sizes import Sizes
from .xray import stages

#: Subfolder of ``results`` with the files of each row and seed.
RUNS = "runs"


class NotComplete(Exception):
    """A row and seed lacks records that this command must not make. The message is empty if it has no record at all."""


@dataclass(frozen=True)
class RowResult:
    """What came of one row and seed."""

    records: list[Record]
    files: RowStore
    seconds: float | None
    """How long this command took to make what was missing; None if nothing was."""


@dataclass(frozen=True)
class DataSet:
    """A data set to evaluate on."""

    index: ChestIndex
    name: str
    """The column of the report."""
    sizes: Sizes
    segment_data: Path | None
    """Where to segment after the evaluation on this data set; None: nowhere."""


def seeds_there(runs: Path, known: list[ComparisonRow]) -> set[int]:
    """The seeds under which any of these rows has files."""
    arms = {row.arm for row in known}
    split = (path.stem.rpartition("-seed") for path in runs.glob("*-seed*.json"))
    return {int(seed) for arm, _, seed in split if arm in arms and seed.isdecimal()}


class Comparison:
    """The rows under one configuration."""

    def __init__(self, config: CompareConfig, console: Console) -> None:
        self.config, self.console, self.budget = config, console, config.budgeted()
        self.sizes, self.rows, self.reference = self.budget.sizes, comparison_rows(config.rows), reference(config.rows)
        sets = [(config.data, config.dataset, self.sizes, config.segment_data)]
        if config.rsna_data:
            sets.append((config.rsna_data, None, replace(self.sizes, heatmap_fractions=()), None))
        # Opened before anything is pretrained, so that a wrong folder is reported at once.
        self.sets = [
            DataSet(with_all_splits(open_index(path)), name or path.resolve().name, sizes, segment_data)
            for path, name, sizes, segment_data in sets
        ]
        self.main_set, *others = self.sets
        if self.main_set.name in [other.name for other in others]:
            raise CommandError(f"--data and --rsna-data have the same name {self.main_set.name!r}; give --dataset")
        self.mask_set = mask_set(open_index(config.segment_data), config.label) if config.segment_data else None
        check_imagenet(SUP2, True, config.imagenet_weights, None)
        runs = config.results / RUNS
        self.seeds = sorted({*config.seeds, *seeds_there(runs, self.rows)})
        # ImageNet's weights are the same under every seed, so Sup.2 has one: fine-tuning varies its own seeds.
        sup2_seed = min(seeds_there(runs, [ComparisonRow(SUP2)]), default=config.seeds[0])
        self.rows_and_seeds = [(r, s) for s in self.seeds for r in self.rows if r.arm != SUP2 or s == sup2_seed]

    def wanted(self, row: ComparisonRow, seed: int) -> bool:
        """Whether this command makes the records that the row and seed lacks."""
        named = not self.config.only or row.arm in self.config.only
        return named and not self.config.report_only and (row.arm == SUP2 or seed in self.config.seeds)

    def run_rows(self) -> tuple[list[Record], Stores, list[str]]:
        """Find or make every row and seed: all records, the files, and the names of those that failed."""
        records, stores, failed = list[Record](), Stores(), list[str]()
        left = sum(self.wanted(row, seed) for row, seed in self.rows_and_seeds)
        durations: list[float] = []
        self.console.print(f"{left} rows and seeds to go through; what is in {self.config.results} is not made again")
        for row, seed in self.rows_and_seeds:
            name = f"{row.arm}-seed{seed}"
            try:
                result = self.run_row(row, seed, name, left)
            except NotComplete as reason:
                if str(reason):
                    self.console.print(str(reason))
                continue
            except DiskError:
                raise
            except CommandError as error:
                self.console.print(f"{name} is left out: {error}", soft_wrap=True)
                failed += [] if row.arm == SUP2 else [name]
                continue
            left -= self.wanted(row, seed)
            records += result.records
            stores.setdefault(row.arm, {})[seed] = result.files
            if result.seconds is not None:
                durations.append(result.seconds)
                hours = left * np.mean(durations) / 3600
                self.console.print(f"{name}: {result.seconds / 60:.1f} min; at that pace at most {hours:.1f} h more")
        return records, stores, failed

    def run_row(self, row: ComparisonRow, seed: int, name: str, left: int) -> RowResult:
        """Find or make the records of one row under one seed; ``left`` rows and seeds, this one included, remain."""
        work, started = self.config.out / "downstream", time.monotonic()
        wanted, files = self.wanted(row, seed), RowStore(self.config.results / RUNS, name)
        files.restore(work)
        run = None if row.arm in NOT_TRAINED else self.pretrain_config(row, seed, name, files.pretraining)
        made, uncounted_seconds = False, 0.0

        def make_weights() -> None:
            """Called by the stages for each record that is missing, so never if all are there."""
            nonlocal made, uncounted_seconds
            if not wanted:
                known = f"{name} is left out: it is not complete, or of other settings" if files.records else ""
                raise NotComplete(known)
            if not made and run is not None:
                uncounted_seconds = self.pretrain_row(run, files, left)
            elif not made and row.arm == SUP1:
                files.keep_curves([{"epoch": 0, "step": 0, **monitor_columns(self.monitor_untrained(seed))}])
            made = True

        records = list[Record]()
        try:
            for data, start in self.starts(row, seed, run, make_weights):
                console = self.console if wanted else Console(quiet=True)
                for record in stages(data.sizes, start, name, work, console, data.segment_data, self.config.label):
                    files.add(record)
                    records.append(record)
        finally:
            seconds = time.monotonic() - started
            if made:
                files.spend(seconds + uncounted_seconds)
        for path in [*work.glob(f"*/{name}/*.pth"), *([run.out / LAST] if run else [])]:
            path.unlink(missing_ok=True)  # large, and no stage needs it any more
        return RowResult(records, files, seconds if made else None)

    def pretrain_config(self, row: ComparisonRow, seed: int, name: str, kept: dict[str, Any]) -> PretrainConfig:
        """How to pretrain a row. The name of the run folder has a digest of all that the weights depend on.

        ``kept`` is what the row's records say of their pretraining. If it differs from this one in precision alone, its
        precision is taken: the usual precision is chosen by the machine, and does not make another row.
        """
        sizes, budget, options = self.sizes, self.budget, MethodOptions()
        assert row.method is not None and sizes.image_size is not None and sizes.stem is not None
        of_method = getattr(options, row.method)
        if hasattr(of_method, "queue"):
            keys = {"queue": budget.queue or of_method.queue, "momentum": budget.key_momentum or of_method.momentum}
            options = replace(options, **{row.method: replace(of_method, **keys)})
        run = row.apply(
            PretrainConfig(
                self.config.data, self.config.out, row.method, epochs=sizes.epochs, batch_size=sizes.batch_size,
                image_size=sizes.image_size, stem=sizes.stem, seed=seed,
                augment=AugmentConfig(min_scale=sizes.min_scale), workers=self.config.workers,
                precision=budget.precision or fast_precision(), options=options,
                monitor=MonitorConfig(every=max(1, sizes.epochs // self.config.monitored)),
            )
        )  # fmt: skip
        as_kept = replace(run, precision=kept.get("precision", run.precision))
        run = as_kept if self.pretraining_of(as_kept) == kept else run
        return replace(run, out=self.config.out / f"{name}-{run.key()}")

    def pretraining_of(self, run: PretrainConfig) -> dict[str, Any]:
        """What records say of a pretraining, under the key ``pretraining``."""
        return {**run.identity(), "data_fingerprint": self.main_set.index.fingerprint()}

    def pretrain_row(self, run: PretrainConfig, files: RowStore, left: int) -> float:
        """Pretrain, and keep the curves.

        Returns the seconds of the steps that earlier, interrupted commands took: their time is not counted yet.
        """
        earlier = 0.0 if (run.out / BACKBONE).exists() else float(log_frame(run.out / LOG)["seconds"].sum())
        if pretrain(run, self.console) is None:
            raise CommandError(f"{run.out} did not finish; the same command goes on")
        seconds = log_frame(run.out / LOG)["seconds"]
        files.keep_curves(curves_of(run.out / LOG, run.out / MONITOR))
        hours = float(seconds.median()) * len(seconds) / 3600
        self.console.print(
            f"{len(seconds)} steps took {hours * 60:.1f} min; as many for {left - 1} more: {hours * (left - 1):.1f} h"
        )
        return earlier

    def monitor_untrained(self, seed: int) -> dict[str, float]:
        """What the monitor measures of random weights, before the first step."""
        index, config = self.main_set.index, MonitorConfig()
        assert self.sizes.image_size is not None and self.sizes.stem is not None
        bank, queries = (subsample(index.split(split), config.images) for split in ("train", "val"))
        return measure(load_backbone(None, seed, self.sizes.stem), bank, queries, self.sizes.image_size, config)

    def starts(
        self, row: ComparisonRow, seed: int, run: PretrainConfig | None, make_weights: Callable[[], None]
    ) -> list[tuple[DataSet, Start]]:
        """The start of the stages on each data set that is evaluated on."""
        like = run or PretrainConfig(self.config.data, self.config.out)
        pretraining: dict[str, Any] = {"seed": seed} if row.arm == SUP1 else {}
        if run is not None:
            pretraining = self.pretraining_of(run)
        if row.arm == SUP2:
            check_imagenet(SUP2, True, self.config.imagenet_weights, self.sizes.stem)
        assert self.sizes.image_size is not None and self.sizes.stem is not None
        start = Start(
            row.arm, "", self.sizes.image_size, like.val_fraction, like.split_seed, self.config.data,
            weights=run.out / BACKBONE if run else None, imagenet=row.arm == SUP2, pretraining=pretraining,
            imagenet_weights=self.config.imagenet_weights if row.arm == SUP2 else None, stem=self.sizes.stem,
            seed=seed if row.arm == SUP1 else None, make_weights=make_weights,
            title="" if row.arm in ROWS else row.title,
        )  # fmt: skip
        return [(data, replace(start, data=data.index.root, dataset=data.name)) for data in self.sets]
