"""Settings of the example's stages that take seconds."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from examples.optiml.config import ExpanderConfig, MonitorConfig, PretrainConfig
from examples.optiml.training import TrainConfig

QUIET = Console(quiet=True)
#: Of fine-tuning and segmentation.
SHORT = TrainConfig(lr=1e-3, epochs=1, batch_size=16, min_steps=2, max_steps=2, checks=1)


def small(data: Path, out: Path, method: str = "vicreg", **changes: object) -> PretrainConfig:
    settings: dict[str, object] = {
        "epochs": 2, "batch_size": 8, "image_size": 32, "expander": ExpanderConfig(dim=32), "accelerator": "cpu",
        "monitor": MonitorConfig(every=0),
    }  # fmt: skip
    return PretrainConfig(data, out, method, **{**settings, **changes})  # type: ignore[arg-type]
