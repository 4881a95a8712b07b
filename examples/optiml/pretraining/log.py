"""The log of a run: ``metrics.csv`` with a row per step, written by a callback and read back by pandas."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ..atomic import atomic_path
from .methods.base import Method


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
        with atomic_path(self.path) as part, part.open("w", newline="") as file:
            csv.writer(file).writerows([head, *kept] if kept else [])

    def append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)


class CsvLog(Callback):
    """Writes a row per step: every part of the loss and every diagnostic. Holds the rows of the current epoch."""

    def __init__(self, path: Path) -> None:
        self.table = CsvTable(path, "step")
        self.epoch_rows: list[dict[str, float]] = []
        self.started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.table.keep(trainer.global_step)
        self.epoch_rows = [row for row in read_log(self.table.path) if row["epoch"] == trainer.current_epoch + 1]

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Method)
        scheduled = next(group for group in trainer.optimizers[0].param_groups if not group["constant"])
        row = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, "lr": scheduled["lr"]}
        row = {**row, **pl_module.last_log, "seconds": time.perf_counter() - self.started}
        self.table.append(row)
        if self.epoch_rows and self.epoch_rows[-1]["epoch"] != row["epoch"]:
            self.epoch_rows = []
        self.epoch_rows.append(row)

    def mean(self, name: str) -> float | None:
        """Mean of a column over the current epoch's steps so far; ``None`` where the method logs no such column."""
        values = [row[name] for row in self.epoch_rows if name in row]
        return sum(values) / len(values) if values else None


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log, digit for digit; what is blank in a row is not in it. An absent file has none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def log_frame(path: Path) -> pd.DataFrame:
    """A log as a data frame, for figures about all of it; NaN where a cell is blank. Empty for an absent file."""
    return pd.read_csv(path) if path.exists() and path.stat().st_size else pd.DataFrame({"epoch": [], "seconds": []})


def epoch_means(log: pd.DataFrame) -> pd.DataFrame:
    """Mean of every column over the steps of each epoch, a row per epoch."""
    return log.groupby("epoch", as_index=False).mean()
