"""``python tests/training_soak.py --minutes 60``: OPTiML trains on phantoms for so long, and its memory stays flat.

It writes ``benchmarks/results/training_soak.*``: the resident memory at the end of every epoch, and how fast it grows.
The first quarter of the time is left out of that, since allocators and caches fill.

The bound follows from what a step makes. The smallest of its tensors that has a row for each film is the pooled
features, 512 numbers of 4 bytes. A step that kept them for good would add them, at every step, to the memory. The
memory must grow by less than half of that for each step, by the slope of a straight line and twice its standard error.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytorch_lightning as pl
import torch
from processors import ROOT
from pytorch_lightning.callbacks import Callback

sys.path.insert(0, str(ROOT))
from benchmarks import results
from benchmarks.machine import environment
from examples.optiml.data.nih_writer import PhantomConfig, write_phantoms
from examples.optiml.pretraining import trainer as pretrain_module
from examples.optiml.pretraining.settings import MonitorConfig, PretrainConfig
from examples.optiml.pretraining.trainer import pretrain

RESULTS, PAGE = (results.FOLDER / f"training_soak.{ending}" for ending in ("json", "md"))
BATCH, SIZE, FILMS = 16, 32, 64
#: Bytes for each step: half of the pooled features of a batch.
BOUND = BATCH * 512 * 4 / 2
#: Rows of the page's table.
SHOWN = 12


def resident() -> int:
    """Bytes of this process that are in memory, without what was freed and the allocator still holds."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of the GNU C library
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Recorder(Callback):
    """Notes seconds, steps and memory at the end of every epoch, and ends the training when the time is over."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.begun = seconds, time.monotonic()
        self.epochs: list[tuple[float, int, int]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        passed = time.monotonic() - self.begun
        self.epochs.append((round(passed, 1), trainer.global_step, resident()))
        if passed > self.seconds:
            trainer.should_stop = True


def train(folder: Path, minutes: float) -> list[tuple[float, int, int]]:
    """Seconds, steps and bytes of every epoch of a training that takes so long; it has no end of its own."""
    data = write_phantoms(PhantomConfig(folder / "data", FILMS, 40, SIZE))
    config = PretrainConfig(
        data, folder / "run", "optiml", epochs=100_000, batch_size=BATCH, image_size=SIZE, accelerator="cpu",
        monitor=MonitorConfig(every=5),
    )  # fmt: skip
    recorder, make = Recorder(60 * minutes), pretrain_module.make_trainer

    def with_recorder(*arguments: Any) -> pl.Trainer:
        trainer = make(*arguments)
        trainer.callbacks.append(recorder)
        return trainer

    with mock.patch.object(pretrain_module, "make_trainer", with_recorder):
        assert pretrain(config) is None  # stopped, not finished
    return recorder.epochs


@dataclass(frozen=True)
class Growth:
    """A straight line through the memory of all epochs but those of the first quarter, in bytes for each step.

    What the epochs scatter about the line counts for fewer of them where neighbours are alike. How many is taken from
    the correlation of the residuals, at distances up to that where it is first below 0.
    """

    slope: float
    deviation: float

    @classmethod
    def of(cls, epochs: list[tuple[float, int, int]]) -> Growth:
        late = np.array([epoch for epoch in epochs if epoch[0] >= epochs[-1][0] / 4], dtype=np.float64)
        if len(late) < 30:
            raise ValueError(f"{len(late)} epochs after the first quarter of the time are too few for a slope; 30 do")
        steps, memory = late[:, 1] - late[:, 1].mean(), late[:, 2] - late[:, 2].mean()
        slope = float(steps @ memory / (steps @ steps))
        rest = memory - slope * steps
        alike = 1.0
        for distance in range(1, len(late) // 4):
            correlation = float(rest[:-distance] @ rest[distance:]) / max(float(rest @ rest), 1.0)
            if correlation < 0:
                break
            alike += 2 * correlation
        scatter = alike * float(rest @ rest) / (len(late) - 2)
        return cls(slope, float(np.sqrt(scatter / (steps @ steps))))

    @property
    def verdict(self) -> str:
        if self.slope + 2 * self.deviation < BOUND:
            return "flat"
        return "not flat" if self.slope - 2 * self.deviation > 0 else "undecided, since the time was too short"


def page(found: dict[str, Any]) -> str:
    """The report."""
    machine, epochs = found["environment"], found["epochs"]
    growth, (seconds, steps, _) = Growth.of(epochs), epochs[-1]
    shown = [epochs[round(k * (len(epochs) - 1) / (SHOWN - 1))] for k in range(SHOWN)]
    lines = [
        "# Training soak",
        "",
        f"Written by `python tests/training_soak.py --minutes {found['minutes']:g}`: OPTiML, with the recommended "
        f"preset, pretrains a ResNet18 on {FILMS} phantoms of {SIZE} px in batches of {BATCH}, on one thread, and its "
        f"monitor measures after every fifth epoch. {machine['cpu']}, torch {machine['versions']['torch']}, commit "
        f"{machine['commit']}, {machine['date'][:10]}.",
        "",
        f"It ran for {seconds / 60:.1f} minutes: {len(epochs):,} epochs, {steps:,} steps. After the first quarter of "
        f"the time the memory grew by **{growth.slope:.0f} ± {2 * growth.deviation:.0f} bytes a step**. The bound is "
        f"{BOUND:,.0f}, half of the pooled features of a batch: **{growth.verdict}**.",
        "",
        "The ± is twice the standard error. Before a reading, garbage is collected and the allocator gives back what "
        "is free. A step that kept less than the bound, such as some numbers of the log, would not be noticed.",
        "",
        "| minutes | steps | resident memory, MiB |",
        "|---|---|---|",
        *(f"| {passed / 60:.1f} | {step:,} | {memory / 2**20:.1f} |" for passed, step, memory in shown),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = environment()
    with tempfile.TemporaryDirectory() as folder:
        epochs = train(Path(folder), options.minutes)
    results.save(RESULTS, {"environment": machine, "minutes": options.minutes, "epochs": epochs})
    PAGE.write_text(page(results.load(RESULTS)))
    print(f"{Growth.of(epochs)}, bound {BOUND:.0f}; wrote {PAGE}")
    return 0 if Growth.of(epochs).verdict == "flat" else 1


if __name__ == "__main__":
    sys.exit(main())
