"""Whatever happens to a run, stops, full disks, damaged images, monitors: it ends where an undisturbed one does."""

from __future__ import annotations

import csv
import dataclasses
import functools
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pytorch_lightning", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from xray_runs import interrupt_at, small

from examples.optiml.atomic import torch_save_atomic
from examples.optiml.data.images import ImageStore
from examples.optiml.data.index import read_index
from examples.optiml.errors import CommandError
from examples.optiml.pretraining import trainer as pretrain_module
from examples.optiml.pretraining.callbacks import StopAfter
from examples.optiml.pretraining.log import CsvTable, read_log
from examples.optiml.pretraining.methods.base import Method
from examples.optiml.pretraining.settings import MonitorConfig
from examples.optiml.pretraining.trainer import pretrain
from examples.optiml.pretraining.views import EpochSampler


@pytest.fixture(autouse=True, scope="module")
def a_method_that_draws() -> Iterator[None]:
    """Every step also logs numbers from the global generators: a resumed run must draw what it would have drawn."""
    original = Method.training_step

    def drawing(self: Method, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = original(self, batch, batch_idx)
        self.last_log["drawn"] = float(torch.rand(())) + float(np.random.random()) + random.random()  # noqa: NPY002
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Method, "training_step", drawing)
        yield


@pytest.fixture(scope="module")
def whole(few_phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted; the others must end where it does."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert pretrain(small(few_phantoms, out)) == out / "backbone.pth"
    return out


def assert_same_run(run: Path, whole: Path) -> None:
    """Bit for bit: the weights, and every logged figure but the time."""
    a, b = (torch.load(folder / "backbone.pth", weights_only=True) for folder in (run, whole))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    rows = [read_log(folder / "metrics.csv") for folder in (run, whole)]
    assert len({row["drawn"] for row in rows[0]}) == 6
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4, 5, 6]
    for mine, other in zip(*rows, strict=True):
        assert {**mine, "seconds": 0} == {**other, "seconds": 0}


def interrupt_workers() -> None:
    """As a terminal does; the trainer hears of it a step later, and must not have lost its workers meanwhile."""
    for process in multiprocessing.active_children():
        os.kill(process.pid or 0, signal.SIGINT)
        time.sleep(0.2)


def test_ctrl_c_saves_the_step_and_the_run_ends_the_same(
    few_phantoms: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an epoch, then at the end of one; gone on without and with a worker process."""
    for step, number, workers in ((2, signal.SIGINT, 0), (3, signal.SIGTERM, 0), (5, signal.SIGINT, 1)):
        before = signal.getsignal(number)
        with monkeypatch.context() as patch:
            interrupt_at(patch, step, functools.partial(signal.raise_signal, number))
            interrupt_at(patch, step - 1, interrupt_workers)
            with pytest.raises(SystemExit) as stop:
                pretrain(small(few_phantoms, tmp_path / "run", workers=workers))
        assert stop.value.code == 130 and signal.getsignal(number) == before
        assert len(read_log(tmp_path / "run" / "metrics.csv")) == step
        torch.rand(3)
    assert pretrain(small(few_phantoms, tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole)


def test_a_full_disk_leaves_the_last_checkpoint_whole(few_phantoms: Path, tmp_path: Path, whole: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full, the device that is always out of space")
    run = tmp_path / "run"
    assert pretrain(small(few_phantoms, run, stop_after=1)) is None
    saved = (run / "last.ckpt").read_bytes()
    (run / "last.ckpt.part").symlink_to("/dev/full")
    with pytest.raises(CommandError, match=r"no space left on the disk of .*last\.ckpt holds the run"):
        pretrain(small(few_phantoms, run))
    assert (run / "last.ckpt").read_bytes() == saved
    assert not (run / "last.ckpt.part").exists() and not (run / "backbone.pth").exists()
    assert pretrain(small(few_phantoms, run))
    assert_same_run(run, whole)


def test_a_damaged_image_is_named_and_nothing_is_lost(
    few_phantoms: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where images are read while training goes on, as with large sets; small ones are read before it starts."""
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", str(few_phantoms), str(data)], check=True)
    config = small(data, tmp_path / "run")
    train = read_index(data, config.val_fraction, config.split_seed).split("train")
    order = list(EpochSampler(len(train), config.seed, config.batch_size))
    victim = train.paths[order[2 * 8 + 5][1]]  # in the third batch
    intact = victim.read_bytes()
    victim.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(CommandError, match=f"Stopped: cannot read image {victim}.*Nothing was saved yet"):
        pretrain(config)
    monkeypatch.setattr(pretrain_module, "ImageStore", functools.partial(ImageStore, limit_mb=0))
    with pytest.raises(CommandError, match=rf"Stopped: cannot read image {victim}.*last\.ckpt holds"):
        pretrain(config)
    assert len(read_log(tmp_path / "run" / "metrics.csv")) == 2
    with pytest.raises(CommandError, match=f"cannot read image {victim}"):  # still the same
        pretrain(dataclasses.replace(config, workers=1))
    victim.write_bytes(intact)
    assert pretrain(config)
    assert_same_run(tmp_path / "run", whole)


def test_a_table_goes_on_after_a_row_that_was_cut_off(tmp_path: Path) -> None:
    table = CsvTable(tmp_path / "t.csv", "step")
    for step in (1, 2, 3):
        table.append({"epoch": 1, "step": step, "loss": 0.1 * step})
    with table.path.open("a") as file:
        file.write("1,4")
    table.keep(2)
    table.append({"epoch": 1, "step": 3, "loss": 9.0})
    assert [(row["step"], row["loss"]) for row in read_log(table.path)] == [(1, 0.1), (2, 0.2), (3, 9.0)]
    table.keep(0)
    table.append({"step": 1, "other": 5.0})
    with table.path.open() as file:
        assert list(csv.reader(file)) == [["step", "other"], ["1", "5.0"]]


def test_a_failed_save_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch_save_atomic({"a": torch.ones(2)}, path)
    with pytest.raises(Exception, match="pickle"):
        torch_save_atomic({"a": lambda: 0}, path)
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


def test_a_run_that_stopped_after_an_epoch_goes_on_by_the_same_command() -> None:
    stopped = []
    for epoch in range(5):
        trainer = MagicMock(current_epoch=epoch, should_stop=False)
        StopAfter(2).on_train_epoch_end(trainer, MagicMock())
        stopped.append(trainer.should_stop)
    assert stopped == [False, True, False, False, False]


def test_monitors_are_logged_and_change_nothing(few_phantoms: Path, tmp_path: Path, whole: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    config = small(few_phantoms, run, val_fraction=0.14, monitor=MonitorConfig(every=1, images=30), tensorboard=True)
    assert pretrain(dataclasses.replace(config, stop_after=1)) is None
    assert pretrain(config)
    assert_same_run(run, whole)
    rows = read_log(run / "monitor.csv")
    assert [row["epoch"] for row in rows] == [1, 2]
    losses = [row["loss"] for row in read_log(run / "metrics.csv")]
    assert rows[1]["loss"] == pytest.approx(np.mean(losses[3:]), rel=1e-12)
    assert all(0 <= row["knn_auc"] <= 1 and 1 <= row["effective_rank"] <= 30 for row in rows)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)
    card = (run / "MODEL_CARD.md").read_text()
    index = read_index(few_phantoms)
    for text in (index.fingerprint(), "Not a medical device", '"preset": "recommended"', "knn_auc", f"{losses[0]:.2g}"):
        assert text in card, text
