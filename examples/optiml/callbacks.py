"""What happens around the steps: the log file, progress without a terminal, an early stop."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich.console import Console

from .files import whole
from .methods import Method


class CsvTable:
    """A CSV file that grows by a row at a time, each on disk at once, so that no way to stop loses one.

    Lightning's own CSV logger empties its file when a run goes on; this one keeps the rows up to where it goes on.
    """

    def __init__(self, path: Path, key: str) -> None:
        """``key`` is the column by which rows are dropped that a resumed run will write again."""
        self.path, self.key = path, key

    def keep(self, last: int) -> None:
        """Drop rows after ``last``, and a row that was cut off in the middle."""
        if not self.path.exists():
            return
        with self.path.open(newline="") as file:
            head, *rows = list(csv.reader(file)) or [[]]
        column = head.index(self.key) if self.key in head else 0
        kept = [row for row in rows if len(row) == len(head) and int(row[column]) <= last]
        with whole(self.path) as part, part.open("w", newline="") as file:
            csv.writer(file).writerows([head, *kept] if kept else [])

    def append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)


class CsvLog(Callback):
    """One row per step: every part of the loss and every diagnostic."""

    def __init__(self, path: Path) -> None:
        self.table = CsvTable(path, "step")
        self.started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.table.keep(trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Method)
        scheduled = next(group for group in trainer.optimizers[0].param_groups if not group["constant"])
        row = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, "lr": scheduled["lr"]}
        self.table.append({**row, **pl_module.last_log, "seconds": time.perf_counter() - self.started})


class TensorBoard(Callback):
    """The same figures as events for TensorBoard, in the run folder's ``tensorboard/``."""

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


def log_rows(path: Path) -> Iterator[dict[str, float]]:
    """The rows of a run's log, one at a time, as there may be a million; what is blank in a row is not in it."""
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                yield {name: float(value) for name, value in row.items() if value}


def read_log(path: Path) -> list[dict[str, float]]:
    """All rows of a short log."""
    return list(log_rows(path))


def epoch_means(rows: Iterable[dict[str, float]], epoch: int) -> dict[str, float]:
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


class StopAfter(Callback):
    """End after an epoch before the run's last, as an interruption would."""

    def __init__(self, epoch: int | None) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.epoch is not None and trainer.current_epoch + 1 == self.epoch:
            trainer.should_stop = True
