"""What ``tests/interrupt_soak.py`` interrupts: three commands of the example at tiny size, and what each promises.

A command runs in a forked process that has imported everything, since each import takes seconds. What it promises is in
three functions: ``end`` is what has to be the same however often it was interrupted, ``kept`` what must not be made
again once it is there, and ``half_written`` names files that a reader would take for whole and that are not.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from processors import ROOT

sys.path.insert(0, str(ROOT))
import examples.optiml.commands.compare
import examples.optiml.data.prepare.command
import examples.optiml.pretraining.trainer  # noqa: F401
from examples.optiml.__main__ import cli
from examples.optiml.data.nih_format import ENTRY_FILE
from examples.optiml.data.nih_writer import PhantomConfig, write_phantoms
from examples.optiml.data.prepare.convert import PROGRESS_FILE, read_progress
from examples.optiml.locking import LOCK

#: Figures by name; two that are equal say the same.
State = dict[str, Any]


@dataclass(frozen=True)
class Command:
    """A command, and how to read what it has written into a folder."""

    name: str
    words: str
    """``{data}`` is a folder of phantoms, ``{out}`` the folder to write."""
    end: Callable[[Path], State]
    kept: Callable[[Path], State]

    def line(self, data: Path, out: Path) -> list[str]:
        return [word.format(data=data, out=out) for word in self.words.split()]


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names and files, without locks and what is not finished."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != LOCK and path.suffix != ".part":
            yield str(path.relative_to(folder)), path


def end_of_prepare(out: Path) -> State:
    """Every byte, but for the order in which films were done."""
    return {name: path.read_bytes() for name, path in _files(out) if path.name != PROGRESS_FILE}


def kept_of_prepare(out: Path) -> State:
    """When each film was written that is noted as done."""
    images = out / "images"
    if not images.is_dir():
        return {}
    return {
        name: (images / name).stat().st_mtime_ns
        for name, done in read_progress(out).items()
        if not done.error and (images / name).exists()
    }


def end_of_pretrain(out: Path) -> State:
    """The weights, every step once in the log, and which files there are."""
    weights = torch.load(out / "backbone.pth", weights_only=True)
    return {
        "weights": {name: value.numpy().tobytes() for name, value in weights.items()},
        "log": _without_seconds(_rows(out / "metrics.csv")),
        "monitor": _without_seconds(_rows(out / "monitor.csv")),
        "config": json.loads((out / "config.json").read_text()),
        # A run that was killed between its last two actions keeps its checkpoint.
        "files": [name for name, path in _files(out) if path.name != "last.ckpt"],
    }


def kept_of_pretrain(out: Path) -> State:
    """The rows of the log up to the checkpoint, with the seconds that each step took."""
    steps = 0
    if (out / "backbone.pth").exists():
        steps = sys.maxsize
    elif (out / "last.ckpt").exists():
        # The command's own, of a moment ago; it holds the state of the loop beside the weights.
        steps = torch.load(out / "last.ckpt", weights_only=False)["global_step"]
    return {f"{out.name} {row['step']}": row for row in _rows(out / "metrics.csv") if int(row["step"]) <= steps}


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a log that are whole."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and row["step"].isdecimal()]


def _without_seconds(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def end_of_compare(out: Path) -> State:
    """Records without when and where they were made, their arrays, curves, the report's tables, names of the rest."""
    found: State = {}
    for name, path in _files(out / "results"):
        if path.suffix == ".json":
            records = json.loads(path.read_text())["records"]
            found[name] = {key: {**record, "made": ""} for key, record in records.items()}
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                found[name] = {key: (x.dtype, x.shape, x.tobytes()) for key, x in arrays.items()}
        elif name.startswith("runs/"):
            found[name] = _without_seconds(_rows(path))
        else:
            found[name] = path.read_bytes() if path.suffix == ".csv" else ""
    return found


def kept_of_compare(out: Path) -> State:
    """Every record, with when it was made, and what the pretrainings that go on have kept."""
    found: State = {}
    for path in (out / "results" / "runs").glob("*.json"):
        found |= {f"{path.name} {key}": record for key, record in json.loads(path.read_text())["records"].items()}
    for log in out.glob("*-seed*/metrics.csv"):
        found |= kept_of_pretrain(log.parent)
    return found


_PREPARE = "prepare --dataset nih --root {data} --out {out} --size 24"
_DRAW = (
    "prepare --dataset phantom --out {out} --size 24 --workers 1 --phantom-train 40 --phantom-test 20 --phantom-size 48"
)
_PRETRAIN = (
    "pretrain --data {data} --out {out} --epochs 3 --batch-size 8 --image-size 32 --expander.dim 32 --accelerator cpu "
    "--monitor.every 1 --monitor.images 32 --method"
)
_COMPARE = (
    "compare --data {data} --out {out} --results {out}/results --segment-data {data} --label Effusion "
    "--only sup1 vicreg --seeds 0 --image-size 32 --epochs 2 --batch-size 16 --fractions 0.1 1.0 --large-seeds 0 "
    "--heatmap-fractions 0.1 --draws 30 --finetune-epochs 1 --finetune-steps 2 --finetune-max-steps 2 --unet-epochs 1 "
    "--unet-steps 2 --unet-max-steps 2 --checks 1 --precision 32-true"
)
COMMANDS = {
    command.name: command
    for command in (
        Command("prepare", f"{_PREPARE} --workers 1", end_of_prepare, kept_of_prepare),
        Command("prepare in two processes", f"{_PREPARE} --workers 2", end_of_prepare, kept_of_prepare),
        Command("prepare phantoms", _DRAW, end_of_prepare, kept_of_prepare),
        Command("pretrain", f"{_PRETRAIN} optiml", end_of_pretrain, kept_of_pretrain),
        Command(
            "pretrain with a worker", f"{_PRETRAIN} moco --moco.queue 32 --workers 1", end_of_pretrain, kept_of_pretrain
        ),
        Command("compare", _COMPARE, end_of_compare, kept_of_compare),
    )
}


def half_written(out: Path) -> list[str]:
    """Files that cannot be read to their end, although nothing in their name says so."""
    found = []
    for name, path in _files(out):
        if name.startswith("drawn/") and not (out / "drawn" / ENTRY_FILE).exists():
            continue  # their table comes last and says that the others are whole
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".png":
                with Image.open(path) as image:
                    image.load()
            elif path.suffix in (".npz", ".pth", ".ckpt"):
                with zipfile.ZipFile(path) as archive:
                    assert archive.testzip() is None
        except (OSError, ValueError, SyntaxError, AssertionError, zipfile.BadZipFile) as error:
            found.append(f"{name}: {type(error).__name__}: {error}")
    return found


def draw_data(folder: Path) -> Path:
    """The films that all commands read."""
    return write_phantoms(PhantomConfig(folder, train=80, test=40, size=40))


def _run(arguments: list[str], said: Path, ready: Event) -> None:
    """In a process group of its own, as in a terminal, whose Ctrl-C reaches the processes that a command starts."""
    os.setpgid(0, 0)
    for number in (1, 2):
        os.dup2(os.open(f"{said}.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of one that comes before the command begins it knows nothing
    ready.set()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli(arguments)


def start(arguments: list[str], said: Path) -> BaseProcess:
    """The command in a fork of this process, about to begin; what it prints goes to ``said``.1 and ``said``.2."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_run, args=(arguments, said, ready))
    process.start()
    ready.wait()
    return process


def printed(said: Path) -> tuple[str, str]:
    """Standard output and standard error of the last run."""
    out, err = (Path(f"{said}.{number}").read_text(errors="replace") for number in (1, 2))
    return out, err
