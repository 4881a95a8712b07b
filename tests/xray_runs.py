"""Settings of the example's stages that take seconds; a pretraining stopped at a step, and two processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich.console import Console

from examples.optiml.downstream.settings import TrainConfig
from examples.optiml.pretraining import trainer as pretrain_module
from examples.optiml.pretraining.settings import ExpanderConfig, MonitorConfig, PretrainConfig

QUIET = Console(quiet=True)
#: Of fine-tuning and segmentation.
SHORT = TrainConfig(lr=1e-3, epochs=1, batch_size=16, min_steps=2, max_steps=2, checks=1)


def small(data: Path, out: Path, method: str = "vicreg", **changes: object) -> PretrainConfig:
    settings: dict[str, object] = {
        "epochs": 2, "batch_size": 8, "image_size": 32, "expander": ExpanderConfig(dim=32), "accelerator": "cpu",
        "monitor": MonitorConfig(every=0),
    }  # fmt: skip
    return PretrainConfig(data, out, method, **{**settings, **changes})  # type: ignore[arg-type]


class At(Callback):
    """Does something after a step."""

    def __init__(self, step: int, action: object) -> None:
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step + 1 == self.step:
            self.action()  # type: ignore[operator]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, action: object) -> None:
    make = pretrain_module.make_trainer

    def with_interrupt(*args: object) -> pl.Trainer:
        trainer = make(*args)  # type: ignore[arg-type]
        trainer.callbacks.insert(0, At(step, action))
        return trainer

    monkeypatch.setattr(pretrain_module, "make_trainer", with_interrupt)


def in_two_processes(*command: str) -> str:
    """What torchrun prints of a script or module with its arguments, one thread in each process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run([sys.executable, *torchrun, *command], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
