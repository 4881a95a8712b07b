"""Pretraining: many processes as one, every way to stop and go on, monitors, initialisation, the card."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pytorch_lightning", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torchvision.models import resnet18

import otloss
from examples.optiml import pretrain as pretrain_module
from examples.optiml.__main__ import cli
from examples.optiml.augment import EpochSampler
from examples.optiml.callbacks import CsvTable, read_log
from examples.optiml.config import ExpanderConfig, MonitorConfig, OptimConfig, PretrainConfig
from examples.optiml.data import ImageStore, read_index
from examples.optiml.distributed import World
from examples.optiml.files import save_whole
from examples.optiml.layout import PhantomConfig, write_phantoms
from examples.optiml.methods.base import Method
from examples.optiml.model import Backbone, imagenet_weights, load_backbone, set_norm
from examples.optiml.monitor import effective_rank, knn_scores
from examples.optiml.pretrain import build, pretrain

SMALL = ["--epochs", "2", "--batch-size", "8", "--image-size", "32", "--accelerator", "cpu", "--expander.dim", "32"]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(PhantomConfig(tmp_path_factory.mktemp("data") / "phantoms", train=32, test=10, size=40))


def small(data: Path, out: Path, method: str = "vicreg", **changes: object) -> PretrainConfig:
    settings: dict[str, object] = {
        "epochs": 2, "batch_size": 8, "image_size": 32, "expander": ExpanderConfig(dim=32), "accelerator": "cpu",
        "monitor": MonitorConfig(every=0),
    }  # fmt: skip
    return PretrainConfig(data, out, method, **{**settings, **changes})  # type: ignore[arg-type]


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
def whole(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted; the others must end where it does."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert pretrain(small(phantoms, out)) == out / "backbone.pth"
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


# --- many processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_share_every_batch(size: int) -> None:
    alone = EpochSampler(50, seed=1, batch_size=8)
    alone.set_epoch(3)
    shares = [EpochSampler(50, 1, 8, World(rank, size, size)) for rank in range(size)]
    for share in shares:
        share.set_epoch(3)
        assert len(share) == 48 // size
    stretches = [np.array(list(share)).reshape(6, 8 // size, 2) for share in shares]
    assert np.array_equal(np.concatenate(stretches, axis=1).reshape(-1, 2), list(alone))
    for share in shares:
        share.go_to(3, 4)
    later = np.concatenate([np.array(list(share)).reshape(2, 8 // size, 2) for share in shares], axis=1)
    assert np.array_equal(later.reshape(-1, 2), list(alone)[32:])
    shares[0].set_epoch(4)
    assert len(list(shares[0])) == 48 // size  # only the epoch that was interrupted starts in the middle


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"--batch-size 9 .* does not divide by 2"):
        EpochSampler(50, 0, 9, World(0, 2, 2))


def test_torchrun_gives_the_curve_of_one_process(phantoms: Path, tmp_path: Path) -> None:
    """OPTiML in two processes on CPU against one with the same batches: transport, gathered variance, covariance."""
    command = ["-m", "examples.optiml", "pretrain", "--data", str(phantoms), *SMALL, "--norm", "group"]
    command += ["--optim.lr", "0.01"]  # rounding grows tenfold per step at the usual rate, as under any perturbation
    command += ["--optiml.tokens", "channel", "--monitor.every", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    several = subprocess.run(
        [sys.executable, *torchrun, *command, "--out", str(tmp_path / "two")], env=env, capture_output=True, text=True
    )
    assert several.returncode == 0, several.stdout + several.stderr
    assert "in 2 processes" in several.stdout
    optim = OptimConfig(lr=0.01)
    alone = small(phantoms, tmp_path / "one", "optiml", norm="group", optim=optim, monitor=MonitorConfig(every=2))
    assert pretrain(alone)
    one, two = (read_log(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 6
    for mine, other in zip(one, two, strict=True):
        for name in ("loss", "ot", "variance", "covariance", "std_q", "grad_backbone", "perplexity", "lr"):
            # Sums in another order: float32 rounding (1e-6), which five more steps of training may amplify.
            assert mine[name] == pytest.approx(other[name], rel=1e-4), (name, mine["step"])
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
    a, b = (torch.load(tmp_path / name / "backbone.pth", weights_only=True) for name in ("one", "two"))
    start = build(alone.resolve()).backbone.state_dict()
    moved = sum((a[name] - start[name]).square().sum() for name in a).sqrt()
    apart = sum((a[name] - b[name]).square().sum() for name in a).sqrt()
    assert apart < 1e-3 * moved
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")]
    assert configs[0] == configs[1]  # one run, whatever it ran on


def test_batch_norm_is_not_split_between_cpus(phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "of_environment", classmethod(lambda cls: cls(0, 2, 2)))
    with pytest.raises(SystemExit, match="take --norm group or --norm frozen"):
        pretrain(small(phantoms, tmp_path / "run"))


@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_other_norms_treat_every_image_by_itself(norm: str) -> None:
    torch.manual_seed(0)
    usual, other = Backbone(), Backbone()
    other.load_state_dict(usual.state_dict())
    set_norm(other, norm)  # type: ignore[arg-type]
    other.train()
    x = torch.randn(4, 3, 32, 32)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    whole, single = other(x)[1], other(x[:1])[1]
    assert torch.allclose(whole[:1], single, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(usual(x)[1][:1], usual(x[:2])[1][:1], rtol=1e-2)  # unlike the usual one
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    if norm == "frozen":
        assert torch.allclose(whole, usual.eval()(x)[1]) is False  # usual has moved its statistics meanwhile
        assert list(other.state_dict()) == list(usual.state_dict())


# --- stopping and going on -----------------------------------------------------------------------------------


class At(Callback):
    """Does something after a step."""

    def __init__(self, step: int, action: object) -> None:
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step + 1 == self.step:
            self.action()  # type: ignore[operator]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, action: object) -> None:
    make = pretrain_module.make_trainer

    def with_interrupt(*args: object) -> pl.Trainer:
        trainer = make(*args)  # type: ignore[arg-type]
        trainer.callbacks.insert(0, At(step, action))
        return trainer

    monkeypatch.setattr(pretrain_module, "make_trainer", with_interrupt)


def interrupt_workers() -> None:
    """As a terminal does; the trainer hears of it a step later, and must not have lost its workers meanwhile."""
    for process in multiprocessing.active_children():
        os.kill(process.pid or 0, signal.SIGINT)
        time.sleep(0.2)


def test_ctrl_c_saves_the_step_and_the_run_ends_the_same(
    phantoms: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an epoch, then at the end of one; gone on without and with a worker process."""
    for step, number, workers in ((2, signal.SIGINT, 0), (3, signal.SIGTERM, 0), (5, signal.SIGINT, 1)):
        before = signal.getsignal(number)
        with monkeypatch.context() as patch:
            interrupt_at(patch, step, functools.partial(signal.raise_signal, number))
            interrupt_at(patch, step - 1, interrupt_workers)
            with pytest.raises(SystemExit) as stop:
                pretrain(small(phantoms, tmp_path / "run", workers=workers))
        assert stop.value.code == 130 and signal.getsignal(number) == before
        assert len(read_log(tmp_path / "run" / "metrics.csv")) == step
        torch.rand(3)
    assert pretrain(small(phantoms, tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole)


def test_a_full_disk_leaves_the_last_checkpoint_whole(phantoms: Path, tmp_path: Path, whole: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full, the device that is always out of space")
    run = tmp_path / "run"
    assert pretrain(small(phantoms, run, stop_after=1)) is None
    saved = (run / "last.ckpt").read_bytes()
    (run / "last.ckpt.part").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match=r"no space left on the disk of .*last\.ckpt holds the run"):
        pretrain(small(phantoms, run))
    assert (run / "last.ckpt").read_bytes() == saved
    assert not (run / "last.ckpt.part").exists() and not (run / "backbone.pth").exists()
    assert pretrain(small(phantoms, run))
    assert_same_run(run, whole)


def test_a_damaged_image_is_named_and_nothing_is_lost(
    phantoms: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where images are read while training goes on, as with large sets; small ones are read before it starts."""
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", str(phantoms), str(data)], check=True)
    config = small(data, tmp_path / "run")
    train = read_index(data, config.val_fraction, config.split_seed).split("train")
    order = list(EpochSampler(len(train), config.seed, config.batch_size))
    victim = train.paths[order[2 * 8 + 5][1]]  # in the third batch
    intact = victim.read_bytes()
    victim.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(SystemExit, match=f"Stopped: cannot read image {victim}.*Nothing was saved yet"):
        pretrain(config)
    monkeypatch.setattr(pretrain_module, "ImageStore", functools.partial(ImageStore, limit_mb=0))
    with pytest.raises(SystemExit, match=rf"Stopped: cannot read image {victim}.*last\.ckpt holds"):
        pretrain(config)
    assert len(read_log(tmp_path / "run" / "metrics.csv")) == 2
    with pytest.raises(SystemExit, match=f"cannot read image {victim}"):  # still the same
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
    save_whole({"a": torch.ones(2)}, path)
    with pytest.raises(Exception, match="pickle"):
        save_whole({"a": lambda: 0}, path)
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


# --- monitors ------------------------------------------------------------------------------------------------


def test_knn_equals_a_loop_over_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 5, generator=generator) for n in (30, 7))
    labels = (torch.rand(30, 3, generator=generator) < 0.4).to(torch.uint8)
    scores = knn_scores(bank, labels, queries, neighbours=4, temperature=0.1)
    for q in range(7):
        cosines = [
            float(queries[q].double() @ row.double() / (queries[q].double().norm() * row.double().norm()))
            for row in bank
        ]
        nearest = sorted(range(30), key=lambda i: -cosines[i])[:4]
        weights = {i: np.exp(cosines[i] / 0.1) for i in nearest}
        for c in range(3):
            expected = sum(weights[i] * int(labels[i, c]) for i in nearest) / sum(weights.values())
            assert float(scores[q, c]) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert knn_scores(bank[:2], labels[:2], queries, 20, 0.1).shape == (7, 3)  # fewer images than neighbours


def test_effective_rank_counts_the_dimensions_in_use() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator)
    assert effective_rank(x) == pytest.approx(8, rel=0.01)
    x[:, 3:] = 7.0
    assert effective_rank(x) == pytest.approx(3, rel=0.01)
    assert effective_rank(torch.ones(5, 4)) == 1.0


def test_monitors_are_logged_and_change_nothing(phantoms: Path, tmp_path: Path, whole: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    config = small(phantoms, run, val_fraction=0.14, monitor=MonitorConfig(every=1, images=30), tensorboard=True)
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
    index = read_index(phantoms)
    for text in (index.fingerprint(), "Not a medical device", '"preset": "recommended"', "knn_auc", f"{losses[0]:.2g}"):
        assert text in card, text


# --- configuration, initialisation, export -------------------------------------------------------------------


def test_presets_fill_only_what_is_unset(tmp_path: Path) -> None:
    paper = PretrainConfig(tmp_path, tmp_path, preset="paper", batch_size=64).resolve()
    assert (paper.optim.lr, paper.optim.weight_decay, paper.epochs, paper.image_size) == (3e-4, 1e-4, 300, 224)
    assert paper.options.optiml.marginals == "learned" and paper.expander == ExpanderConfig(2048, 3, True)
    assert (paper.options.optiml.alpha, paper.options.optiml.beta, paper.options.optiml.eta) == (0.6, 25.0, 1.0)
    mine = PretrainConfig(tmp_path, tmp_path, batch_size=128, optim=OptimConfig(trust=0.5)).resolve()
    assert (mine.optim.lr, mine.optim.trust, mine.options.optiml.marginals) == (0.6, 0.5, "perplexity")
    assert PretrainConfig(tmp_path, tmp_path, optim=OptimConfig(lr=0.0)).resolve().optim.lr == 0.0
    assert mine.resolve() == mine


def test_every_flag_that_the_page_on_faithfulness_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(pretrain_module.__file__).parent / "FAITHFULNESS.md").read_text()
    flags = set(re.findall(r"`(--[a-z.-]+)", page.split("## Scoring")[0]))
    with pytest.raises(SystemExit):
        cli(["pretrain", "--help"])
    assert len(flags) > 25
    assert flags <= set(re.findall(r"--[a-z.-]+", capsys.readouterr().out))


def test_all_images_and_imagenet_weights(phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    imagenet, urls = resnet18(weights=None).state_dict(), []

    def download(url: str, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        urls.append(url)
        return imagenet

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    config = small(phantoms, tmp_path / "run", init="imagenet", all_images=True, epochs=1, norm="frozen")
    model = build(config.resolve())
    assert urls == ["https://download.pytorch.org/models/resnet18-f37072fd.pth"]
    assert all(torch.equal(value, imagenet[name]) for name, value in model.backbone.state_dict().items())
    backbone = pretrain(config)
    assert backbone is not None
    assert len(read_log(tmp_path / "run" / "metrics.csv")) == 42 // 8
    trained = torch.load(backbone, weights_only=True)
    result = resnet18(weights=None).load_state_dict(trained, strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"] and not result.unexpected_keys
    assert torch.equal(trained["bn1.running_mean"], imagenet["bn1.running_mean"])  # frozen
    assert not torch.equal(trained["conv1.weight"], imagenet["conv1.weight"])
    assert "transductive" in (tmp_path / "run" / "MODEL_CARD.md").read_text()


def test_weights_that_cannot_be_downloaded_say_where_to_put_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(SystemExit, match=r"no route to host.*put https://.*resnet18-f37072fd\.pth into .*checkpoints"):
        imagenet_weights()


def test_a_group_norm_backbone_is_read_back(tmp_path: Path) -> None:
    torch.manual_seed(3)
    backbone = Backbone()
    set_norm(backbone, "group")
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_backbone(tmp_path / "backbone.pth")(x)[1], backbone.eval()(x)[1])
    same = resnet18(norm_layer=functools.partial(torch.nn.GroupNorm, 32))
    assert same.load_state_dict(backbone.state_dict(), strict=False).missing_keys == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("method", ["vicreg", "optiml"])
def test_losses_are_computed_in_float32_under_mixed_precision(tmp_path: Path, method: str) -> None:
    """Networks run in half precision; transport, variance and covariance do not, and gradients reach the weights."""
    warnings.filterwarnings("ignore", category=otloss.ConvergenceWarning)
    model = build(small(tmp_path, tmp_path, method, precision="bf16-mixed").resolve())
    first, second = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = model.step(first, second)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.step(first, second)
    assert half.loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for name, value in half.log.items())
    assert half.loss.item() == pytest.approx(exact.loss.item(), rel=0.05) and half.loss.item() != exact.loss.item()
    half.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_half_precision_on_a_cpu_is_refused(phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--precision 16-mixed needs a GPU; take bf16-mixed"):
        pretrain(small(phantoms, tmp_path / "run", precision="16-mixed"))


def test_a_damaged_checkpoint_is_named(phantoms: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        pretrain(small(phantoms, run, precision="16-mixed"))  # leaves the folder claimed
    (run / "last.ckpt").write_bytes(b"half of it")
    with pytest.raises(SystemExit, match=r"last\.ckpt is damaged"):
        pretrain(small(phantoms, run, precision="16-mixed"))
