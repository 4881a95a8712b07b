"""The whole story in a few minutes on a laptop: every stage on drawn phantoms, ending with the gain by pretraining."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..atomic import write_json
from ..data.prepare.command import main as prepare
from ..data.prepare.settings import PrepareConfig
from ..downstream.settings import TrainConfig
from ..pretraining.precision import fast_precision
from ..provenance import provenance
from ..reporting.summary import FRACTION, gain_record
from .settings import ExampleConfig, XrayConfig
from .sizes import Sizes
from .xray import Outcome, close, xray

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


#: What the last screen ends with.
NEXT = """
Next, on real films: NIH's 112,120 in one file, or a folder of your own. Where to
get the first, and what to do with the second: examples/optiml/README.md
  python -m examples.optiml prepare --dataset medmnist \\
      --root chestmnist_64.npz --out data/chestmnist
  make example-xray DATA=data/chestmnist""".splitlines()


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
    outcome = xray(stages, console, films="drawn films")
    lines = close(console, outcome, started, NEXT)
    if config.results:
        write_results(config.results, config.seed, outcome, lines)


def write_results(path: Path, seed: int, outcome: Outcome, lines: list[str]) -> None:
    """The figures of the last screen, and the screen, for pages that quote them."""
    content = {
        "seed": seed, "pretraining": vars(outcome.training), "gains": [gain_record(gain) for gain in outcome.gains],
        "screen": lines, **provenance(),
    }  # fmt: skip
    write_json(path, content)
