"""All stages on one prepared data set, from pretraining to the report; every step goes on where it was stopped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data.fractions import SMALL
from ..data.index import ChestIndex, open_index, with_all_splits, with_findings
from ..data.masks import has_outlines, mask_set
from ..data.subsets import label_fraction
from ..downstream.arms import SUP1
from ..downstream.evaluate import Evaluation, FrozenFeatures, evaluate, source_record
from ..downstream.finetune import usable_classes
from ..downstream.heatmap import heatmap, heatmap_record, targets
from ..downstream.result_files import Record
from ..downstream.segment import segment
from ..downstream.settings import EvaluateConfig, HeatmapConfig, SegmentConfig, StartConfig
from ..downstream.starting_weights import Start, resolve, run_folder
from ..errors import CommandError
from ..pretraining.callbacks import duration
from ..pretraining.log import log_frame
from ..pretraining.settings import AugmentConfig, PretrainConfig
from ..pretraining.trainer import LOG, pretrain
from ..reporting.report import report
from ..reporting.summary import Gain, Training, gains, gains_section, summary_lines
from .settings import XrayConfig
from .sizes import Sizes

UNTRAINED = "untrained"


@dataclass(frozen=True)
class Outcome:
    """What all stages together came to."""

    report: Path
    gains: list[Gain]
    """Over the untrained network; empty where several networks were evaluated."""
    lines: list[str]
    """The summary for the screen; none without gains."""
    training: Training | None
    """Of the pretraining, where it is this command's own and the only one."""


def xray(config: XrayConfig, console: Console | None = None, films: str = "films") -> Outcome:
    """All stages. ``films`` is what the summary calls them."""
    console = console or Console()
    common = _common(config)
    config = replace(config, sizes=replace(config.sizes, image_size=common["image_size"], stem=common["stem"]))
    held_out = common["val_fraction"], common["split_seed"]
    index = with_findings(with_all_splits(open_index(config.data, *held_out)))
    outlines = None
    if config.segment_data is not None:  # a wrong --label is worth knowing before hours of pretraining
        outlines = mask_set(with_all_splits(open_index(config.segment_data, *held_out)), config.label)
    elif has_outlines(index, config.label):
        config, outlines = replace(config, segment_data=config.data), mask_set(index, config.label)
    config = replace(config, sizes=_learnable(config.sizes, index.split("train"), console))
    console.rule("pretrain")
    runs = config.run or tuple(_pretrained(config, seed, console) for seed in config.pretrain_seeds)
    dataset = config.dataset or config.data.resolve().name
    downstream = config.out / "downstream"
    records: list[Record] = []
    if alone := source_record(index, dataset, downstream / dataset, config.sizes.draws):
        records.append(alone)
    for run in (None, *runs):
        start = resolve(StartConfig(config.data, run=run, untrained=run is None, dataset=dataset, **common))
        name = UNTRAINED if run is None else _name(run)
        records += stages(config.sizes, start, name, downstream, console, config.segment_data, config.label)
    console.rule("report")
    arms = {record["arm"] for record in records} - {SUP1}
    one = len(runs) == len(arms) == 1  # of several networks the report shows means
    found = gains(records, index, arms.pop(), config.sizes.draws, outlines) if one else []
    path = report(records, config.out / "report", console, opening=gains_section(found))
    if config.results:
        shutil.copytree(path.parent, config.results, dirs_exist_ok=True)
        console.print(f"Copied to {config.results}")
    training = None if config.run or not one else _training(config, runs[0], index, films)
    lines = summary_lines(training, index, found, records) if found else []
    return Outcome(path, found, lines, training)


def _learnable(sizes: Sizes, train: ChestIndex, console: Console) -> Sizes:
    """Without the fractions whose labels teach no class, whichever subset is drawn; says so of each."""
    taught = []
    for fraction in sizes.fractions:
        seeds = sizes.small_seeds if fraction < SMALL else sizes.large_seeds
        subsets = [label_fraction(train, fraction, seed) for seed in seeds]
        if any(usable_classes(subset).any() for subset in subsets):
            taught.append(fraction)
        else:
            films = "1 film" if len(subsets[0]) == 1 else f"{len(subsets[0])} films"
            console.print(
                f"Left out: {fraction:.0%} of the labels, which is {films} and teaches nothing", highlight=False
            )
    if not taught:
        raise CommandError(f"the {len(train)} training films have no finding that some have and others have not")
    return replace(sizes, fractions=tuple(taught))


def _name(run: Path) -> str:
    """What the results of a run stand under."""
    return (run_folder(run) or run).name


def _common(config: XrayConfig) -> dict[str, Any]:
    """What all rows share: the size and the validation patients of the runs, or else the usual ones.

    Ends the command where two runs would have one folder or one row, or cannot be compared.
    """
    starts = [resolve(StartConfig(config.data, run=run)) for run in config.run]
    names = [UNTRAINED, *map(_name, config.run)]
    rows = [f"{start.arm}, seed {start.pretraining.get('seed')}" for start in starts]
    for what, keys in (("name", names), ("row of the report", rows)):
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise CommandError(f"--run: two networks have the {what} {twice!r}; run xray for each, under its own --out")
    if len(splits := {(start.val_fraction, start.split_seed) for start in starts}) > 1:
        shown = " and ".join(f"val_fraction {share}, split_seed {seed}" for share, seed in sorted(splits))
        raise CommandError(f"--run: the networks held out different validation patients ({shown}); run xray for each")
    like = starts[0] if starts else PretrainConfig(config.data, config.out, image_size=64)
    size, stem = config.sizes.image_size or like.image_size, config.sizes.stem or like.stem
    return {"image_size": size, "stem": stem, "val_fraction": like.val_fraction, "split_seed": like.split_seed}


def run_name(config: XrayConfig, seed: int) -> str:
    """Folder of the pretraining of a seed, in ``config.out``."""
    stem = "" if config.sizes.stem in (None, "standard") else f"-{config.sizes.stem}"
    return f"{config.method}{stem}-{config.sizes.image_size}px-{config.sizes.epochs}epochs-seed{seed}"


def _pretrained(config: XrayConfig, seed: int, console: Console) -> Path:
    sizes = config.sizes
    assert sizes.image_size is not None and sizes.stem is not None  # xray has filled them in
    out = config.out / run_name(config, seed)
    run = PretrainConfig(
        config.data, out, config.method, epochs=sizes.epochs, batch_size=sizes.batch_size,
        image_size=sizes.image_size, stem=sizes.stem, seed=seed, augment=AugmentConfig(min_scale=sizes.min_scale),
        workers=config.workers, precision=config.precision,
    )  # fmt: skip
    if pretrain(run, console) is None:
        raise CommandError(f"{out} did not finish; the same command goes on")
    return out


def outlined(segment_data: Path, data: Path, dataset: str) -> str:
    """Column of the report that segmentation is in: that of the evaluation where it is on the same films."""
    return dataset if segment_data.resolve() == data.resolve() else segment_data.resolve().name


def stages(
    sizes: Sizes, start: Start, name: str, folder: Path, console: Console, segment_data: Path | None = None,
    label: str = "",
) -> Iterator[Record]:  # fmt: skip
    """Evaluate, segment and draw heatmaps from one start: each record as it is made or found.

    Records lie in ``folder`` / DATASET / ``name``. ``start`` says which data set is evaluated on; ``label`` is
    segmented on ``segment_data``, unless that is None.
    """
    index, out = start.index(), folder / start.dataset / name
    boxed = bool(sizes.heatmap_fractions and targets(index.split("test")))
    small, large = sizes.split_fractions()
    plan = [(fractions, s) for fractions, s in ((small, sizes.small_seeds), (large, sizes.large_seeds)) if fractions]
    console.rule(f"evaluate, frozen: {name}")
    features = FrozenFeatures(start, index)
    for fractions, seeds in plan:
        frozen = EvaluateConfig(start.data, fractions=fractions, seeds=seeds, draws=sizes.draws, out=out)
        yield from evaluate(frozen, console, start, features)
    if sizes.neighbours:
        seeds = sizes.large_seeds[:1]  # with all labels, seeds differ in random weights alone
        vote = EvaluateConfig(start.data, protocol="neighbours", seeds=seeds, draws=sizes.draws, out=out)
        yield from evaluate(vote, console, start, features)
    if large and sizes.finetune_seeds is not None:
        plan[-1] = (large, sizes.finetune_seeds)
    plan = [(kept, seeds) for fractions, seeds in plan if (kept := tuple(filter(sizes.tuned, fractions)))]
    if plan:
        console.rule(f"evaluate, finetune: {name}")
    for fractions, seeds in plan:
        tuned = EvaluateConfig(
            start.data, protocol="finetune", fractions=fractions, seeds=seeds, train=sizes.finetune, draws=sizes.draws,
            out=out,
        )  # fmt: skip
        evaluation = Evaluation(tuned, console, start)
        for fraction, seed in evaluation.plan():
            if not (boxed and fraction in sizes.heatmap_fractions):
                yield evaluation.one(fraction, seed, keep=False)
                continue
            maps = HeatmapConfig(
                start.data, fraction=fraction, seeds=(seed,), figure_images=sizes.figure_images, draws=sizes.draws,
                out=out,
            )  # fmt: skip
            *_, known = heatmap_record(maps, start, index.split("test"), out, seed, evaluation.identity(fraction, seed))
            yield evaluation.one(fraction, seed, keep=known is None)
            yield from heatmap(maps, console, start)
    if segment_data is not None:
        console.rule(f"segment: {name}")
        column = outlined(segment_data, start.data, start.dataset)
        size = sizes.segment_size or start.image_size
        task = replace(start, data=segment_data, dataset=column, image_size=size)
        for seed in sizes.segment_seeds:
            unet = SegmentConfig(
                segment_data, label=label, fractions=sizes.segment_fractions, seeds=(seed,), train=sizes.unet,
                draws=sizes.draws, out=folder / column / name,
            )  # fmt: skip
            yield from segment(unet, console, task)


def _training(config: XrayConfig, run: Path, index: ChestIndex, kind: str) -> Training:
    log, sizes = log_frame(run / LOG), config.sizes
    assert sizes.image_size is not None  # xray has filled it in
    films, seconds = len(index.split("train")), float(log["seconds"].sum())
    return Training(
        config.method, films, sizes.epochs, len(log), sizes.batch_size, sizes.image_size, seconds, kind
    )  # fmt: skip


def close(console: Console, outcome: Outcome, started: float, following: Sequence[str] = ()) -> list[str]:
    """Print the last screen, with what may follow, and return its lines. ``started`` is a time of `time.monotonic`."""
    lines = [*outcome.lines, ""] if outcome.lines else []
    lines += [f"Report with its figures   {outcome.report}", *following]
    console.rule()
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nThis call took {duration(time.monotonic() - started)}.", highlight=False)
    return lines


def main(config: XrayConfig) -> None:
    """The ``xray`` command."""
    console, started = Console(), time.monotonic()
    close(console, xray(config, console), started)
