"""``python -m examples.optiml COMMAND --help``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import tyro

from .commands.settings import CompareConfig, ExampleConfig, ReckonConfig, XrayConfig
from .data.prepare.settings import PrepareConfig
from .downstream.settings import EvaluateConfig, HeatmapConfig, SegmentConfig
from .errors import CommandError, DiskError
from .pretraining.settings import INTERRUPTED, PretrainConfig
from .reporting.settings import ChooseConfig, ReportConfig

#: The options of each command, and the module whose ``main`` runs it. It is imported when the command runs, not before.
COMMANDS: dict[str, tuple[type, str]] = {
    "example": (ExampleConfig, "commands.example"),
    "xray": (XrayConfig, "commands.xray"),
    "prepare": (PrepareConfig, "data.prepare.command"),
    "pretrain": (PretrainConfig, "pretraining.trainer"),
    "reckon": (ReckonConfig, "commands.reckon"),
    "evaluate": (EvaluateConfig, "downstream.evaluate"),
    "segment": (SegmentConfig, "downstream.segment"),
    "heatmap": (HeatmapConfig, "downstream.heatmap"),
    "report": (ReportConfig, "reporting.report"),
    "compare": (CompareConfig, "commands.compare"),
    "choose": (ChooseConfig, "reporting.rates"),
}


def cli(args: list[str] | None = None) -> None:
    """Parse the command line and run the command it names."""
    try:
        _run(_parse(args))
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _parse(args: list[str] | None) -> Any:
    """The configuration of the command that the line names."""
    return tyro.extras.subcommand_cli_from_dict(
        {name: config for name, (config, _) in COMMANDS.items()},
        prog="python -m examples.optiml",
        description="OPTiML on chest X-rays: pretrain a ResNet18 with optimal transport, then see what it has learnt.",
        args=args,
    )


def _run(config: Any) -> None:
    module = next(module for kind, module in COMMANDS.values() if isinstance(config, kind))
    command = importlib.import_module(f"{__package__}.{module}")
    from .data.images import UnreadableImage  # its libraries are loaded by now

    try:
        command.main(config)
    except (CommandError, UnreadableImage) as error:
        raise SystemExit(str(error)) from error
    except OSError as error:
        stopped = DiskError.of(error, config.out or Path())
        if stopped is None:
            raise
        raise SystemExit(str(stopped)) from error


if __name__ == "__main__":
    cli()
