"""What happens around the steps: the log file, progress without a terminal, an early stop."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich.console import Console

from .augment import EpochSampler
from .methods import Method


class CsvLog(Callback):
    """One row per step: every part of the loss and every diagnostic.

    Lightning's own CSV logger empties its file when a run goes on; this one keeps the rows of finished epochs
    and drops those of the epoch that is repeated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.path.exists():
            head, *rows = self.path.read_text().splitlines(keepends=True)
            kept = [row for row in rows if int(row.split(",", 1)[0]) <= trainer.current_epoch]
            self.path.write_text("".join([head, *kept]))

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Method)
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
        }
        self.rows.append({**row, **pl_module.last_log, "seconds": time.perf_counter() - self.started})

    def on_train_epoch_end(self, *_: Any) -> None:
        self._append(self.rows)
        self.rows = []

    def _append(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a run's log."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def epoch_means(rows: list[dict[str, float]], epoch: int) -> dict[str, float]:
    """Mean of every column over the steps of an epoch."""
    of_epoch = [row for row in rows if row["epoch"] == epoch]
    return {name: sum(row[name] for row in of_epoch) / len(of_epoch) for name in of_epoch[0]} if of_epoch else {}


class PlainProgress(Callback):
    """A line per epoch, and one every half minute inside long epochs, for logs and pipes."""

    def __init__(self, console: Console, every: float = 30.0) -> None:
        self.console, self.every, self.last = console, every, time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.is_last_batch or time.monotonic() - self.last > self.every:
            self.last = time.monotonic()
            assert isinstance(pl_module, Method)
            shown = "  ".join(f"{k} {v:.4g}" for k, v in pl_module.last_log.items() if not k.startswith("grad_"))
            batch = trainer.fit_loop.epoch_loop.batch_idx + 1
            where = (
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} step {batch}/{trainer.num_training_batches}"
            )
            self.console.print(f"  {where}  {shown}", highlight=False, soft_wrap=True)


class ResumeOrder(Callback):
    """Tell the sampler where a resumed run is before worker processes fetch their first batches.

    Lightning announces the epoch too, but after it has started the workers: they would begin with the order
    and the views of the first epoch.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.sampler.set_epoch(checkpoint["epoch"] + 1)  # checkpoints are made at the ends of epochs


class StopAfter(Callback):
    """End after an epoch before the run's last, as an interruption would."""

    def __init__(self, epoch: int | None) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.epoch is not None and trainer.current_epoch + 1 >= self.epoch:
            trainer.should_stop = True
