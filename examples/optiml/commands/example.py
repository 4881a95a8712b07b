"""The whole story in a few minutes on a laptop: every stage on drawn phantoms, ending with the report."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markdown import Markdown

from ..data.prepare.command import main as prepare
from ..data.prepare.settings import PrepareConfig
from ..downstream.settings import TrainConfig
from .settings import ExampleConfig, XrayConfig
from .sizes import Sizes
from .xray import xray

TRAIN, TEST, SIZE = 600, 300, 64


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
    path = xray(
        XrayConfig(
            data, config.out, dataset="phantoms", results=config.results, method=config.method,
            pretrain_seeds=(config.seed,), label="Effusion",
            sizes=Sizes(
                epochs=config.epochs, image_size=SIZE, small_seeds=(0, 1, 2), large_seeds=(0,),
                segment_fractions=(1.0,), segment_seeds=(0,),
                finetune=TrainConfig(lr=1e-3, epochs=4, min_steps=16, checks=2),
                unet=TrainConfig(lr=1e-3, batch_size=16, epochs=1, min_steps=40, checks=2),
            ),
        ),
        console,
    )  # fmt: skip
    console.print(Markdown(path.read_text()))
    console.print(f"{time.monotonic() - started:.0f} s. Report with its figures: {path}")
