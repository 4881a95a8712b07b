"""Pretraining in processes that are killed at a moment or held at a step; test_pretrain_killed.py starts them.

They are forked by a server that has imported everything and run nothing, since each import takes seconds, and since
PyTorch's gradients do not survive a fork of a process that has computed some.
"""

from __future__ import annotations

import csv
import os
import signal
import time
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from xray_runs import QUIET, At, small

from examples.optiml.pretraining import trainer as pretrain_module
from examples.optiml.pretraining.log import CsvTable
from examples.optiml.pretraining.trainer import pretrain

#: Where a child dies: no handler runs, nothing is flushed or closed. And in which such moment of each process.
MOMENTS = {
    "before step": (1, 5),
    "in a row of the log": (2, 3),
    "in a checkpoint": (1, 2, 1),
    "before a rename": (1, 2, 2, 2),  # config.json, last.ckpt twice, the export
    "after a rename": (1, 1, 1),
}


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL cannot be survived")


def killed(data: Path, out: Path, moment: str, number: int) -> None:
    """Run until the ``number``-th such moment, and die in it; exit code 0 where the run ends before."""
    torch.set_num_threads(1)
    left = number

    def now() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    replace, save, append = Path.replace, torch.save, CsvTable.append

    def renaming(self: Path, target: Path) -> Path:
        hit = now()
        if hit and moment == "before a rename":
            die()
        result = replace(self, target)
        if hit:
            die()
        return result

    def saving(content: Any, file: Any) -> None:
        save(content, file)
        if now():  # half of it is on the disk, under the name that it has while it is written
            content = bytes(file.getbuffer())
            (out / "last.ckpt.part").write_bytes(content[: len(content) // 2])
            die()

    def appending(self: CsvTable, row: dict[str, Any]) -> None:
        if now():
            with self.path.open("a", newline="") as file:
                csv.writer(file).writerow(list(row.values())[:3])
            with self.path.open("rb+") as file:
                file.truncate(file.seek(0, 2) - 3)
            die()
        append(self, row)

    patches = {
        "in a row of the log": mock.patch.object(CsvTable, "append", appending),
        "in a checkpoint": mock.patch.object(torch, "save", saving),
        "before a rename": mock.patch.object(Path, "replace", renaming),
        "after a rename": mock.patch.object(Path, "replace", renaming),
        "before step": _at_step(number, die),
    }
    with patches[moment]:
        pretrain(small(data, out), QUIET)


def held(data: Path, out: Path, step: int) -> None:
    """Stop before a step until the file ``go`` appears beside the run folder."""
    torch.set_num_threads(1)

    def wait() -> None:
        (out.parent / "waiting").touch()
        while not (out.parent / "go").exists():
            time.sleep(0.05)

    with _at_step(step, wait):
        pretrain(small(data, out), QUIET)


def _at_step(step: int, action: Any) -> Any:
    """Do something in each process's ``step``-th step of all steps of the run."""
    make = pretrain_module.make_trainer

    def with_callback(*args: Any) -> Any:
        trainer = make(*args)
        trainer.callbacks.insert(0, At(step, action))
        return trainer

    return mock.patch.object(pretrain_module, "make_trainer", with_callback)
