"""All rows under one budget: every method of the paper's tables, or the ablation; resumable at every step.

What was made is known from the files in ``results`` alone (``kept``), which are small and meant to be committed:
where they have a record of every stage of a row and seed, that is not pretrained again, whatever became of its weights.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console

from .callbacks import read_log
from .config import AugmentConfig, MethodOptions, PretrainConfig
from .data import ChestIndex, open_index, with_all_splits
from .differences import auc_measures, dice_measure, difference_table, only_ran, verdicts
from .figures import draw_curves
from .kept import Kept
from .masks import mask_set
from .pretrain import BACKBONE, LAST, LOG, pretrain
from .records import Record
from .report import RECORDS, build, report
from .rows import NOT_TRAINED, RECOMMENDED, Kind, Row, rows
from .start import SUP1, SUP2, Start
from .tables import Table, markdown
from .training import TrainConfig
from .xray import XrayConfig, outlined, stages

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Budget:
    """All sizes, the same for every row; what is unset is as the named budget has it."""

    image_size: int | None = None
    epochs: int | None = None
    """Of pretraining."""
    batch_size: int | None = None
    min_scale: float | None = None
    """Smallest share of the film that a crop of the pretraining shows. Unset: each method's own."""
    queue: int | None = None
    """Keys in the queues of methods that have any; more than there are films make a film its own negative."""
    key_momentum: float | None = None
    """Share of its weights that the key encoder of those keeps; 0.999 hardly moves it in a few hundred steps."""
    fractions: tuple[float, ...] | None = None
    """Shares of the labels, frozen and fine-tuned."""
    small_seeds: tuple[int, ...] | None = None
    """Label subsets of fractions below a tenth."""
    large_seeds: tuple[int, ...] | None = None
    """Of the other fractions; pretraining seeds add to the spread."""
    heatmap_fractions: tuple[float, ...] | None = None
    finetune_lr: float | None = None
    finetune_epochs: int | None = None
    finetune_steps: int | None = None
    """At least so many."""
    finetune_max_steps: int | None = None
    segment_fractions: tuple[float, ...] | None = None
    segment_seeds: tuple[int, ...] | None = None
    unet_lr: float | None = None
    unet_epochs: int | None = None
    unet_steps: int | None = None
    unet_max_steps: int | None = None
    checks: int | None = None
    """Looks at validation while fine-tuning or segmenting."""
    figure_images: int | None = None
    draws: int | None = None
    """Bootstrap replicates."""


BUDGETS = {
    "small": Budget(
        image_size=64, epochs=10, batch_size=64, queue=1024, key_momentum=0.99,
        fractions=(0.01, 0.1, 1.0), small_seeds=(0, 1, 2), large_seeds=(0,),
        heatmap_fractions=(0.01,), finetune_lr=1e-3, finetune_epochs=5, finetune_steps=60, segment_fractions=(1.0,),
        segment_seeds=(0,), unet_lr=1e-3, unet_epochs=3, unet_steps=60, checks=5, figure_images=6, draws=2000,
    ),
    "paper": Budget(
        image_size=224, epochs=300, batch_size=64, fractions=(0.01, 0.1, 1.0), small_seeds=(0, 1, 2, 3, 4),
        large_seeds=(0, 1, 2), heatmap_fractions=(0.01,), finetune_lr=1e-4, finetune_epochs=30, finetune_steps=300,
        segment_fractions=(1.0,), segment_seeds=(0, 1, 2), unet_lr=1e-3, unet_epochs=30, unet_steps=300, checks=10,
        figure_images=6, draws=2000,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class CompareConfig:
    """Pretrain, evaluate, segment and draw heatmaps by every method, or for every row of the ablation; then report."""

    data: Path
    """Prepared data set, or a folder in the layout of NIH ChestX-ray14."""
    out: Path = Path("runs/compare")
    """Run folders and all else that is large; not needed to go on."""
    results: Path = HERE / "results" / "compare"
    """Small files that are: of each row and seed in ``runs``; the report in ``methods`` or ``ablation``."""
    dataset: str | None = None
    """Column of the report (``nih-cxr-dev`` stands beside the paper's NIH); unset: the data folder's name."""
    rsna_data: Path | None = None
    """Also evaluate on this data set, a column named as its folder."""
    segment_data: Path | None = None
    """Data set to segment; unset: none."""
    label: str = "Pneumothorax"
    """What to segment: a finding, or whatever else there are masks of, such as Lung."""
    rows: Kind = "methods"
    """methods: Tables I and II, Figs 2 and 3. ablation: Table III, and one factor at a time."""
    only: tuple[str, ...] = ()
    """Make these rows and no others; those that are there are reported all the same."""
    report_only: bool = False
    """Make nothing, only report."""
    budget: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(BUDGETS) + "}")] = "small"
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the pretraining, or of random weights."""
    sizes: Annotated[Budget, tyro.conf.arg(name="")] = Budget()
    readme: Path | None = None
    """Write the tables between this file's markers. Unset: the package's, if ``results`` lie inside the package."""
    workers: int = 0

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise ValueError(f"budget must be one of {', '.join(BUDGETS)}, not {self.budget!r}")
        names = [row.name for row in rows(self.rows)]
        if unknown := sorted(set(self.only) - set(names)):
            raise ValueError(f"only must be among {', '.join(names)}, not {', '.join(unknown)}")

    def budgeted(self) -> Any:
        """The named budget, with what was set beside it."""
        return replace(
            BUDGETS[self.budget], **{name: value for name, value in vars(self.sizes).items() if value is not None}
        )

    def stages(self) -> XrayConfig:
        """The sizes, as all stages take them."""
        b = self.budgeted()
        return XrayConfig(
            self.data, self.out, epochs=b.epochs, batch_size=b.batch_size, image_size=b.image_size,
            min_scale=b.min_scale, workers=self.workers, fractions=b.fractions, seeds=b.small_seeds,
            large_seeds=b.large_seeds, heatmap_fractions=b.heatmap_fractions, segment_data=self.segment_data,
            label=self.label, segment_fractions=b.segment_fractions, segment_seeds=b.segment_seeds,
            figure_images=b.figure_images, draws=b.draws,
            finetune=TrainConfig(b.finetune_lr, epochs=b.finetune_epochs, min_steps=b.finetune_steps,
                                 max_steps=b.finetune_max_steps, checks=b.checks),
            unet=TrainConfig(b.unet_lr, batch_size=16, epochs=b.unet_epochs, min_steps=b.unet_steps,
                             max_steps=b.unet_max_steps, checks=b.checks),
        )  # fmt: skip


class LeftOut(SystemExit):
    """A row that was not to be made is not there."""


class Comparison:
    """The rows under one configuration."""

    def __init__(self, config: CompareConfig, console: Console) -> None:
        self.config, self.console, self.sizes = config, console, config.stages()
        self.rows, sets = rows(config.rows), [(config.data, config.dataset, self.sizes)]
        if config.rsna_data:
            sets.append((config.rsna_data, None, replace(self.sizes, segment_data=None, heatmap_fractions=())))
        # What is wrong with a folder is worth knowing before hours of pretraining.
        self.sets = [(with_all_splits(open_index(path)), name or path.resolve().name, s) for path, name, s in sets]
        self.task = mask_set(open_index(config.segment_data), config.label) if config.segment_data else None
        # ImageNet's weights are the same under every seed; fine-tuning has seeds of its own.
        self.units = [(r, s) for s in config.seeds for r in self.rows if r.name != SUP2 or s == config.seeds[0]]

    def wanted(self, row: Row) -> bool:
        return not self.config.report_only and (not self.config.only or row.name in self.config.only)

    def all(self) -> tuple[list[Record], dict[str, dict[int, Kept]], list[str]]:
        """Every row and seed, made or found: records, kept files by row and seed, and which of them failed."""
        records, kept, failed = list[Record](), dict[str, dict[int, Kept]](), list[str]()
        left = sum(self.wanted(row) for row, _ in self.units)
        took: list[float] = []
        self.console.print(f"{left} rows and seeds to go through; what is in {self.config.results} is not made again")
        for row, seed in self.units:
            name, started, made = f"{row.name}-seed{seed}", time.monotonic(), list[float]()
            try:
                found, files = self.one(row, seed, name, left, made)
            except LeftOut:
                continue
            except SystemExit as stop:
                if not isinstance(stop.code, str):  # told to stop
                    raise
                self.console.print(f"{name} is left out: {stop.code}", soft_wrap=True)
                failed += [] if row.name == SUP2 else [name]
                continue
            left -= self.wanted(row)
            records += found
            kept.setdefault(row.name, {})[seed] = files
            if made:
                took.append(time.monotonic() - started)
                self.console.print(
                    f"{name}: {took[-1] / 60:.1f} min; at that pace at most {left * np.mean(took) / 3600:.1f} h more"
                )
        return records, kept, failed

    def one(self, row: Row, seed: int, name: str, left: int, made: list[float]) -> tuple[list[Record], Kept]:
        """One row under one seed; ``made`` gets an entry when something has to be made."""
        work, started = self.config.out / "downstream", time.monotonic()
        files = Kept(self.config.results / "runs", name)
        files.restore(work)
        run = None if row.name in NOT_TRAINED else self._pretraining(row, seed, name)

        def make() -> None:
            """Called whenever weights are needed, so never where all is there."""
            if not self.wanted(row):
                raise LeftOut(f"{name} is not there")
            if not made and run is not None:
                self._pretrain(run, files, left)
            made.append(started)

        found = []
        try:
            for start, sizes in self._starts(row, seed, run, make):
                for record in stages(sizes, start, name, work, self.console):
                    files.add(record)
                    found.append(record)
            files.only(found)
        finally:
            if made:
                files.spend(time.monotonic() - started)
        for path in [*work.glob(f"*/{name}/*.pth"), *([run.out / LAST] if run else [])]:
            path.unlink(missing_ok=True)  # large, and no stage needs it any more
        return found, files

    def _pretraining(self, row: Row, seed: int, name: str) -> PretrainConfig:
        """A run folder of its own for everything that its result depends on."""
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
                options=options,
            )
        )  # fmt: skip
        return replace(run, out=self.config.out / f"{name}-{run.key()}")

    def _pretrain(self, run: PretrainConfig, files: Kept, left: int) -> None:
        if pretrain(run, self.console) is None:
            raise SystemExit(f"{run.out} did not finish; the same command goes on")
        log = read_log(run.out / LOG)
        files.keep_curves(run.out / LOG)
        hours = float(np.median([step["seconds"] for step in log])) * len(log) / 3600
        self.console.print(
            f"{len(log)} steps took {hours * 60:.1f} min; as many for {left - 1} more: {hours * (left - 1):.1f} h"
        )

    def _starts(
        self, row: Row, seed: int, run: PretrainConfig | None, make: Callable[[], None]
    ) -> list[tuple[Start, XrayConfig]]:
        """Where the stages begin, for each data set that is evaluated on, with their sizes."""
        like = run or PretrainConfig(self.config.data, self.config.out)
        saved: dict[str, Any] = {"seed": seed} if row.name == SUP1 else {}
        if run is not None:
            saved = {**run.identity(), "data_fingerprint": self.sets[0][0].fingerprint()}
        assert self.sizes.image_size is not None
        start = Start(
            row.name, "", self.sizes.image_size, like.val_fraction, like.split_seed, self.config.data,
            weights=run.out / BACKBONE if run else None, imagenet=row.name == SUP2, pretraining=saved,
            seed=seed if row.name == SUP1 else None, make=make, title=row.title,
        )  # fmt: skip
        return [(replace(start, data=index.root, dataset=name), sizes) for index, name, sizes in self.sets]

    def differences(self, kept: dict[str, dict[int, Kept]]) -> tuple[Table, str]:
        """The recommended OPTiML minus each other row; and a line per row on whether it beats the untrained network."""
        draws, shown = self.sizes.draws, {row.name: row.shown for row in self.rows}
        measures = [measure for index, name, _ in self.sets for measure in auc_measures(index, name, draws)]
        if self.task is not None:
            name = outlined(self.task.index.root, self.config.data, self.sets[0][1])
            measures.append(dice_measure(self.task, name, max(self.sizes.segment_fractions), draws))
        arrays = {
            title: {seed: files.arrays for seed, files in kept[name].items()}
            for name, title in shown.items()
            if name in kept
        }
        if alone := arrays.get(shown.get(SUP2, "")):
            arrays[shown[SUP2]] = dict.fromkeys(self.config.seeds, next(iter(alone.values())))
        return difference_table(shown[RECOMMENDED], arrays, measures), verdicts(shown[SUP1], arrays, measures[0])


def compare(config: CompareConfig, console: Console | None = None) -> Path:
    """All rows; returns the report."""
    console = console or Console()
    comparison = Comparison(config, console)
    records, kept, failed = comparison.all()
    if not records:
        raise SystemExit(f"nothing to report: {', '.join(failed) or 'no row'} was made")
    console.rule("report")
    table, lines = comparison.differences(kept)
    lines += "\n" + _how(config, comparison.sets[0][0], records, kept)
    out, final = config.out / f"report-{config.rows}", config.results / config.rows
    curves = {r.shown: [f.curves for f in kept[r.name].values() if f.curves] for r in comparison.rows if r.name in kept}
    if curves := {name: runs for name, runs in curves.items() if runs}:
        out.mkdir(parents=True, exist_ok=True)
        draw_curves(curves, out / "curves.png")
        lines = f"## Pretraining\n\n![Loss and deviation of embeddings](curves.png)\n\n{lines}"
    path = report(records, out, console, (table,), lines)
    shutil.copytree(out, final, dirs_exist_ok=True, ignore=shutil.ignore_patterns(RECORDS))
    readme = config.readme or (HERE / "README.md" if config.results.resolve().is_relative_to(HERE) else None)
    if readme is not None:
        ran = [markdown(only_ran(t)) for t in [*build(records), table] if only_ran(t).sections]
        body = "\n".join([*ran, f"![{table.title}](differences.png)\n", lines]).replace(
            "](", f"]({os.path.relpath(final, readme.parent)}/"
        )
        write_between(readme, config.rows, re.sub("^#", "###", body, flags=re.MULTILINE))
    console.print(f"Copied to {final}")
    if failed:
        raise SystemExit(f"not in the report: {', '.join(failed)}")
    return path


def _how(config: CompareConfig, index: ChestIndex, records: list[Record], kept: dict[str, dict[int, Kept]]) -> str:
    """The command, the sizes, where and how long."""
    named = ("data", "dataset", "rsna_data", "segment_data", "label", "rows", "budget", "seeds")
    settings = {**{name: getattr(config, name) for name in named}, **vars(config.sizes)}
    given = [
        f"--{name.replace('_', '-')} {' '.join(map(str, x)) if isinstance(x, tuple) else x}"
        for name, x in settings.items()
        if x is not None
    ]
    machines = sorted(
        {f"{r['made']['device']} ({r['made']['machine']}, {r['made']['threads']} threads)" for r in records}
    )
    hours = sum(files.seconds for seeds in kept.values() for files in seeds.values()) / 3600
    commits = sorted({str(r["made"]["commit"])[:10] for r in records})
    return (
        f"Made by `python -m examples.optiml compare {' '.join(given)}` in {hours:.1f} h on {', '.join(machines)} at "
        f"commit {', '.join(commits)}: {len(index.split('train'))} training and {len(index.split('test'))} test films. "
        "Differences are paired: same seeds, same resampled test patients.\n"
    )


def markers(kind: Kind) -> tuple[str, str]:
    """Lines of a file between which a comparison's tables stand."""
    return f"<!-- compare --rows {kind}: written by that command, do not edit -->", f"<!-- end of {kind} -->"


def write_between(path: Path, kind: Kind, body: str) -> None:
    """Replace what stands between the markers."""
    text, (begin, end) = path.read_text(), markers(kind)
    if begin not in text or end not in text:
        raise SystemExit(f"{path} lacks the lines {begin!r} and {end!r}")
    before, _, rest = text.partition(begin)
    path.write_text(f"{before}{begin}\n\n{body}\n{end}{rest.partition(end)[2]}")


def main(config: CompareConfig) -> None:
    """The ``compare`` command."""
    console, started = Console(), time.monotonic()
    path = compare(config, console)
    console.print(f"{(time.monotonic() - started) / 60:.0f} min. {path}")
