"""What happens around the steps: progress on the screen, events for TensorBoard, an early stop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .log import CsvLog
from .methods.base import Method


class TensorBoard(Callback):
    """The log's figures as events for TensorBoard, in the run folder's ``tensorboard/``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.writer = folder, None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=trainer.global_step + 1)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Method)
        self.add("train", pl_module.last_log, trainer.global_step)

    def add(self, group: str, values: dict[str, float], step: int) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)
            self.writer.flush()


class EpochLines(Callback):
    """One line per epoch: loss, images per second, time left. A live bar of the steps on a terminal.

    Without a terminal a long epoch gets a line every ``every`` seconds too. All other figures stand in the log.
    """

    def __init__(self, console: Console, log: CsvLog, batch_size: int, every: float = 30.0) -> None:
        self.console, self.metrics, self.batch_size, self.every = console, log, batch_size, every
        self.bar: Progress | None = None
        self.steps, self.started, self.last = 0, 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps, self.started, self.last = 0, time.monotonic(), time.monotonic()
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.bar.add_task("steps", total=_total(trainer), completed=trainer.global_step)
            self.bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.steps += 1
        if self.bar:
            self.bar.advance(self.bar.task_ids[0])
        inside = not self.bar and time.monotonic() - self.last > self.every
        if trainer.is_last_batch or inside:
            self.last = time.monotonic()
            self.console.print(self._line(trainer), highlight=False, no_wrap=True, overflow="ellipsis")

    def _line(self, trainer: pl.Trainer) -> str:
        per_step = (time.monotonic() - self.started) / self.steps
        left = (_total(trainer) - trainer.global_step) * per_step
        batch = trainer.fit_loop.epoch_loop.batch_idx + 1
        within = "" if trainer.is_last_batch else f" step {batch}/{trainer.num_training_batches}"
        return (
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}{within}  loss {self.metrics.mean('loss'):.4g}  "
            f"{self.batch_size / per_step:.0f} images/s  {duration(left)} left"
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_bar()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop_bar()

    def _stop_bar(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None


def _total(trainer: pl.Trainer) -> int:
    """Steps of the run in all."""
    assert trainer.max_epochs is not None
    return trainer.max_epochs * int(trainer.num_training_batches)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class StopAfter(Callback):
    """End after an epoch before the run's last, as an interruption would."""

    def __init__(self, epoch: int | None) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.epoch is not None and trainer.current_epoch + 1 == self.epoch:
            trainer.should_stop = True
