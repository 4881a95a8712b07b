"""The whole story in a few minutes on a laptop: every stage on drawn phantoms, ending with the gain by pretraining."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..atomic import write_json
from ..data.index import open_index
from ..data.masks import mask_set
from ..data.prepare.command import main as prepare
from ..data.prepare.settings import PrepareConfig
from ..downstream.result_files import read_records
from ..downstream.settings import TrainConfig
from ..pretraining.callbacks import duration
from ..pretraining.log import log_frame
from ..pretraining.precision import fast_precision
from ..pretraining.trainer import LOG
from ..provenance import provenance
from ..reporting.report import RECORDS
from ..reporting.summary import FRACTION, Training, gain_record, gains, summary_lines
from .settings import ExampleConfig, XrayConfig
from .sizes import Sizes
from .xray import run_name, xray

TRAIN, TEST, SIZE = 2000, 600, 64
#: The finding that the U-Net outlines.
LABEL = "Effusion"
#: Most of the minutes belong to the pretraining. Both networks get the same short fine-tuning.
SIZES = Sizes(
    epochs=8, image_size=SIZE, fractions=(FRACTION,), large_seeds=(0, 1), finetune_seeds=(0,),
    finetune=TrainConfig(lr=1e-3, epochs=5, min_steps=30, checks=3), heatmap_fractions=(FRACTION,),
    segment_fractions=(1.0,), segment_seeds=(0,),
    unet=TrainConfig(lr=1e-3, batch_size=16, epochs=1, min_steps=100, max_steps=100, checks=2),
)  # fmt: skip


def main(config: ExampleConfig) -> None:
    """The ``example`` command."""
    console, started = Console(), time.monotonic()
    console.rule("prepare")
    data = config.out / f"phantoms-{config.seed}"
    prepare(
        PrepareConfig(
            "phantom", data, phantom_train=TRAIN, phantom_test=TEST, phantom_size=SIZE, phantom_seed=config.seed
        )
    )
    stages = XrayConfig(
        data, config.out, dataset="phantoms", method=config.method, pretrain_seeds=(config.seed,),
        precision=fast_precision(), label=LABEL, sizes=replace(SIZES, epochs=config.epochs),
    )  # fmt: skip
    report = xray(stages, console)
    index = open_index(data)
    found = gains(
        read_records([report.parent / RECORDS]), index, config.method, SIZES.draws, mask_set(index, LABEL)
    )  # fmt: skip
    log = log_frame(config.out / run_name(stages, config.seed) / LOG)
    training = Training(
        config.method,
        len(index.split("train")),
        config.epochs,
        len(log),
        SIZES.batch_size,
        SIZE,
        float(log["seconds"].sum()),
    )
    lines = summary_lines(training, index, found, report)
    console.rule()
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nThis call took {duration(time.monotonic() - started)}.", highlight=False)
    if config.results:
        write_results(config.results, config.seed, training, [gain_record(gain) for gain in found], lines)


def write_results(path: Path, seed: int, training: Training, found: list[dict[str, object]], lines: list[str]) -> None:
    """The figures of the last screen, and the screen, for pages that quote them."""
    content = {
        "seed": seed, "pretraining": vars(training), "gains": found, "screen": lines,
        **provenance(),
    }  # fmt: skip
    write_json(path, content)
