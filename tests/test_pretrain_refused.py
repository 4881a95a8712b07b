"""A run that cannot start says so in one line and leaves nothing behind; short and diverging ones say what they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pytorch_lightning", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from xray_runs import QUIET, small

from examples.optiml.data.index import read_index
from examples.optiml.errors import CommandError
from examples.optiml.pretraining import trainer as pretrain_module
from examples.optiml.pretraining.distributed import World
from examples.optiml.pretraining.log import read_log
from examples.optiml.pretraining.methods.options import MoCoOptions, OPTiMLOptions
from examples.optiml.pretraining.settings import (
    AugmentConfig,
    ExpanderConfig,
    MonitorConfig,
    OptimConfig,
)
from examples.optiml.pretraining.settings import MethodOptions as Options
from examples.optiml.pretraining.trainer import pretrain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 64}, "training images are fewer than one batch of 64; say --batch-size 30 or less"),
        ({"batch_size": 1}, "--batch-size 1: the losses compare films, so a batch needs 2 at least"),
        ({"workers": -1}, "--workers -1: 0 or more processes"),
        ({"seed": -1}, "--seed -1: a whole number from 0 up"),
        ({"val_fraction": 1.0}, "--val-fraction 1.0: a share"),
        ({"stop_after": 0}, "--stop-after 0: an epoch, 1 or later"),
        ({"augment": AugmentConfig(min_scale=2.0)}, "--augment.min-scale 2.0: a share, above 0"),
        ({"augment": AugmentConfig(hflip=-0.5)}, "--augment.hflip -0.5: a probability"),
        ({"expander": ExpanderConfig(dim=0)}, "--expander.dim 0, --expander.layers 3: 1 or more of each"),
        ({"optim": OptimConfig(lr=-1.0)}, "--optim.lr -1.0: a number from 0 up"),
        ({"optim": OptimConfig(lr=float("nan"))}, "--optim.lr nan: a number from 0 up"),
        ({"optim": OptimConfig(weight_decay=float("inf"))}, "--optim.weight-decay inf"),
        ({"optim": OptimConfig(momentum=1.0)}, "--optim.momentum 1.0: from 0 to below 1"),
        ({"accelerator": "abacus"}, "these settings cannot work: .*abacus"),
        ({"precision": "16-mixed"}, "--precision 16-mixed needs a GPU; take bf16-mixed"),
        ({"method": "optiml", "options": Options(optiml=OPTiMLOptions(eps=-1.0))}, "cannot work: eps must be positive"),
        ({"method": "optiml", "options": Options(optiml=OPTiMLOptions(heads=7))}, "these settings cannot work: .*7"),
        ({"method": "moco", "options": Options(moco=MoCoOptions(queue=12))}, "queue of 12 keys does not divide by"),
    ],
)  # fmt: skip
def test_nothing_is_written_before_a_step_can_work(
    few_phantoms: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    method = changes.pop("method", "vicreg")
    with pytest.raises(CommandError, match=message) as caught:
        pretrain(small(few_phantoms, tmp_path / "runs" / "a", method, **changes), QUIET)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_same_folder_after_a_refusal(few_phantoms: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(CommandError, match="fewer than one batch"):
        pretrain(small(few_phantoms, run, batch_size=64), QUIET)
    run.mkdir()
    (run / "config.json.part").write_text("{")  # of a process that was killed while it claimed the folder
    assert pretrain(small(few_phantoms, run, epochs=1), QUIET)
    assert {path.name for path in run.iterdir()} >= {"config.json", "metrics.csv", "backbone.pth", "MODEL_CARD.md"}
    assert not (run / "last.ckpt").exists()  # 130 MB, and nothing needs it
    other = tmp_path / "other"
    assert pretrain(small(few_phantoms, other, epochs=1, keep_checkpoint=True), QUIET)
    assert (other / "last.ckpt").exists()


def test_a_folder_that_cannot_be_written_is_named(few_phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match=r"cannot write to .*file/run \(Not a directory\); choose another --out"):
        pretrain(small(few_phantoms, tmp_path / "file" / "run"), QUIET)


def test_a_rehearsed_run_is_the_run(few_phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that is tried first leaves no trace in the weights or in the random numbers."""
    outcomes = []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(pretrain_module, "rehearse", lambda *_: None)
        assert pretrain(small(few_phantoms, tmp_path / name, "optiml", epochs=1), QUIET)
        outcomes.append([{**row, "seconds": 0} for row in read_log(tmp_path / name / "metrics.csv")])
    assert outcomes[0] == outcomes[1]
    a, b = (torch.load(tmp_path / name / "backbone.pth", weights_only=True) for name in ("with", "without"))
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_a_short_run_is_called_short(
    few_phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(width=400)
    pretrain(small(few_phantoms, tmp_path / "run"), console)
    text = capsys.readouterr().out
    films = len(read_index(few_phantoms).split("train"))
    assert f"vicreg: {films} images, 2 epochs of {films // 8} steps ({films // 8 * 2} in all), 32 px" in text
    assert f"{films // 8 * 2} steps teach a network next to nothing" in text and "smaller --batch-size" in text
    monkeypatch.setattr(pretrain_module, "SHORT", 2)
    pretrain(small(few_phantoms, tmp_path / "long", epochs=1), console)
    assert "next to nothing" not in capsys.readouterr().out


@pytest.mark.parametrize("method", ["optiml", "vicreg", "simclr"])
@pytest.mark.parametrize("monitor", [0, 1])
def test_a_rate_that_diverges_ends_in_one_line(few_phantoms: Path, tmp_path: Path, method: str, monitor: int) -> None:
    """Wherever it is first seen: in the loss, in the solver, in the monitor, or after the last step."""
    run = tmp_path / "run"
    config = small(
        few_phantoms, run, method, optim=OptimConfig(lr=1e12, warmup_epochs=0), monitor=MonitorConfig(every=monitor)
    )
    with pytest.raises(CommandError, match=r"^Stopped: .*in epoch \d, step \d.*A smaller --optim\.lr or") as caught:
        pretrain(config, QUIET)
    assert "\n" not in str(caught.value) and not (run / "backbone.pth").exists()


def test_weights_that_are_lost_in_the_last_step_are_not_saved(
    few_phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = pretrain_module.make_trainer

    def poisoned(*args: Any) -> Any:
        trainer = make(*args)

        class Poison(pretrain_module.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
                if trainer.is_last_batch:
                    module.backbone.conv1.weight.data[0] = float("nan")

        trainer.callbacks.insert(0, Poison())
        return trainer

    monkeypatch.setattr(pretrain_module, "make_trainer", poisoned)
    with pytest.raises(CommandError, match="weights are no longer finite in epoch 1, step 3"):
        pretrain(small(few_phantoms, tmp_path / "run", epochs=1), QUIET)
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_the_command_prints_one_line(few_phantoms: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.optiml", "pretrain", "--data", str(few_phantoms), "--batch-size", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout and not (tmp_path / "run").exists()
    assert done.stderr == "--batch-size 1: the losses compare films, so a batch needs 2 at least\n"


def test_a_batch_that_two_processes_cannot_share(
    few_phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "of_environment", classmethod(lambda cls: cls(0, 2, 2)))
    with pytest.raises(CommandError, match=r"--batch-size 9 .* does not divide by 2"):
        pretrain(small(few_phantoms, tmp_path / "run", batch_size=9, norm="group"), QUIET)
    assert not (tmp_path / "run").exists()
