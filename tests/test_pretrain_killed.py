"""A run that is killed goes on to the same end, and a folder has one process at a time: with processes, not mocks."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pytorch_lightning", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from killed_runs import MOMENTS, held, killed
from xray_runs import QUIET, small

from examples.optiml.errors import CommandError
from examples.optiml.pretraining.log import read_log
from examples.optiml.pretraining.trainer import pretrain


@pytest.fixture(scope="module")
def whole(few_phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed: six steps."""
    out = tmp_path_factory.mktemp("killed") / "whole"
    assert pretrain(small(few_phantoms, out), QUIET)
    return out


def start(target: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_runs"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def assert_same_end(run: Path, whole: Path) -> None:
    """Bit for bit, with every step once in the log."""
    a, b = (torch.load(folder / "backbone.pth", weights_only=True) for folder in (run, whole))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    rows = [[{**row, "seconds": 0} for row in read_log(folder / "metrics.csv")] for folder in (run, whole)]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [1, 2, 3, 4, 5, 6]
    names = [{path.name for path in folder.iterdir()} for folder in (run, whole)]
    assert names[0] - {"last.ckpt"} == names[1]  # which a run keeps that was killed between its last two actions


@pytest.mark.parametrize(("moment", "numbers"), MOMENTS.items())
def test_killed_at_a_moment_again_and_again(
    few_phantoms: Path, tmp_path: Path, whole: Path, moment: str, numbers: tuple[int, ...]
) -> None:
    """In a new folder first, then in what is left of it; at last it is let alone."""
    for number in numbers:
        child = start(killed, few_phantoms, tmp_path / "run", moment, number)
        child.join()
        assert child.exitcode == -signal.SIGKILL
    assert pretrain(small(few_phantoms, tmp_path / "run"), QUIET)
    assert_same_end(tmp_path / "run", whole)


def test_killed_at_any_time(few_phantoms: Path, tmp_path: Path, whole: Path) -> None:
    """By another process, which knows nothing of what this one is doing."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    draw, deaths = random.Random(seed), 0
    for _ in range(2):
        child = start(killed, few_phantoms, tmp_path / "run", "before step", 0)  # which never comes
        time.sleep(draw.uniform(0.2, 3.0))
        child.kill()
        child.join()
        deaths += child.exitcode == -signal.SIGKILL
    assert deaths or (tmp_path / "run" / "backbone.pth").exists()
    assert pretrain(small(few_phantoms, tmp_path / "run"), QUIET)
    assert_same_end(tmp_path / "run", whole)


def test_the_second_of_two_at_once_is_refused(few_phantoms: Path, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    first = start(held, few_phantoms, run, 3)
    deadline = time.monotonic() + 120
    while not (tmp_path / "waiting").exists():
        assert time.monotonic() < deadline and first.is_alive()
        time.sleep(0.05)
    assert len(read_log(run / "metrics.csv")) == 2
    with pytest.raises(CommandError, match=rf"^{run} is in use: another command is at work there\. Let it end, or"):
        pretrain(small(few_phantoms, run), QUIET)
    assert len(read_log(run / "metrics.csv")) == 2
    (tmp_path / "go").touch()
    first.join()
    assert first.exitcode == 0
    assert pretrain(small(few_phantoms, run), QUIET) == run / "backbone.pth"  # finished: nothing to do
    assert_same_end(run, whole)
