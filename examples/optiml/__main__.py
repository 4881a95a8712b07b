"""``python -m examples.optiml COMMAND --help``."""

from __future__ import annotations

import importlib
import sys

import tyro

from .compare import CompareConfig
from .config import PretrainConfig
from .data import UnreadableImage
from .evaluate import EvaluateConfig
from .example import ExampleConfig
from .heatmap import HeatmapConfig
from .prepare.config import PrepareConfig
from .pretrain import INTERRUPTED
from .report import ReportConfig
from .segment import SegmentConfig
from .xray import XrayConfig

COMMANDS = {
    "example": (ExampleConfig, "example"),
    "xray": (XrayConfig, "xray"),
    "prepare": (PrepareConfig, "prepare.command"),
    "pretrain": (PretrainConfig, "pretrain"),
    "evaluate": (EvaluateConfig, "evaluate"),
    "segment": (SegmentConfig, "segment"),
    "heatmap": (HeatmapConfig, "heatmap"),
    "report": (ReportConfig, "report"),
    "compare": (CompareConfig, "compare"),
}


def cli(args: list[str] | None = None) -> None:
    """Parse the command line and run the command it names."""
    config = tyro.extras.subcommand_cli_from_dict(
        {name: config for name, (config, _) in COMMANDS.items()},
        prog="python -m examples.optiml",
        description="OPTiML on chest X-rays: pretrain a ResNet18 with optimal transport, then see what it has learnt.",
        args=args,
    )
    for kind, module in COMMANDS.values():
        if isinstance(config, kind):
            try:
                importlib.import_module(f"{__package__}.{module}").main(config)
            except UnreadableImage as error:
                raise SystemExit(str(error)) from error
            except KeyboardInterrupt:
                print("Interrupted. The same command goes on from here.", file=sys.stderr)
                raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    cli()
