"""Pretraining: many processes as one, norms, presets, initialisation, export, precision."""

from __future__ import annotations

import functools
import json
import re
import warnings
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pytorch_lightning", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from torchvision.models import resnet18
from xray_runs import in_two_processes, small

import otloss
from examples.optiml.__main__ import cli
from examples.optiml.errors import CommandError
from examples.optiml.pretraining import trainer as pretrain_module
from examples.optiml.pretraining.distributed import World
from examples.optiml.pretraining.log import read_log
from examples.optiml.pretraining.methods.options import OPTiMLOptions
from examples.optiml.pretraining.network import Backbone, imagenet_weights, load_backbone, set_norm
from examples.optiml.pretraining.settings import (
    ExpanderConfig,
    MethodOptions,
    MonitorConfig,
    OptimConfig,
    PretrainConfig,
)
from examples.optiml.pretraining.trainer import build, pretrain
from examples.optiml.pretraining.views import EpochSampler

SMALL = ["--epochs", "2", "--batch-size", "8", "--image-size", "32", "--accelerator", "cpu", "--expander.dim", "32"]


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
    with pytest.raises(CommandError, match=r"--batch-size 9 .* does not divide by 2"):
        EpochSampler(50, 0, 9, World(0, 2, 2))


def test_torchrun_gives_the_curve_of_one_process(few_phantoms: Path, tmp_path: Path) -> None:
    """OPTiML in two processes on CPU against one with the same batches: transport, gathered variance, covariance."""
    command = ["-m", "examples.optiml", "pretrain", "--data", str(few_phantoms), *SMALL, "--norm", "group"]
    # AdamW takes a step of full length also where the gradient is nothing but rounding; and at a rate ten times as high
    # units switch on and off between the two curves, which then part a hundredfold with every step.
    command += ["--optim.optimizer", "lars", "--optim.lr", "0.001"]
    command += ["--optiml.tokens", "channel", "--monitor.every", "2"]
    assert "in 2 processes" in in_two_processes(*command, "--out", str(tmp_path / "two"))
    alone = small(
        few_phantoms, tmp_path / "one", "optiml", norm="group", optim=OptimConfig("lars", lr=0.001),
        monitor=MonitorConfig(every=2), options=MethodOptions(optiml=OPTiMLOptions(tokens="channel")),
    )  # fmt: skip
    assert pretrain(alone)
    one, two = (read_log(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 6
    for mine, other in zip(one, two, strict=True):
        for name in ("loss", "ot", "variance", "covariance", "invariance", "map_std", "std_q", "perplexity", "lr"):
            # Sums in another order: float32 rounding (1e-6), which five more steps of training amplify a little.
            assert mine[name] == pytest.approx(other[name], rel=1e-4), (name, mine["step"])
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
    # Where the input of a unit is 0 up to rounding, the unit has a gradient in one curve and none in the other. That
    # happens in a step at most. An error would show in every step.
    gradients = [mine["grad_backbone"] / other["grad_backbone"] - 1 for mine, other in zip(one, two, strict=True)]
    assert sum(abs(apart) > 1e-4 for apart in gradients) <= 1 and max(map(abs, gradients)) < 0.02, gradients
    a, b = (torch.load(tmp_path / name / "backbone.pth", weights_only=True) for name in ("one", "two"))
    start = build(alone.resolve()).backbone.state_dict()
    moved = sum((a[name] - start[name]).square().sum() for name in a).sqrt()
    apart = sum((a[name] - b[name]).square().sum() for name in a).sqrt()
    # A part at right angles to the rest, which makes a gradient longer by the share s, is sqrt(2 s) of it.
    assert apart < (1e-3 + (2 * max(map(abs, gradients))) ** 0.5) * moved
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")]
    assert configs[0] == configs[1]  # one run, whatever it ran on


def test_batch_norm_is_not_split_between_cpus(
    few_phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "of_environment", classmethod(lambda cls: cls(0, 2, 2)))
    with pytest.raises(CommandError, match="take --norm group or --norm frozen"):
        pretrain(small(few_phantoms, tmp_path / "run"))


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


# --- configuration, initialisation, export -------------------------------------------------------------------


def test_presets_fill_only_what_is_unset(tmp_path: Path) -> None:
    paper = PretrainConfig(tmp_path, tmp_path, preset="paper", batch_size=64).resolve()
    assert (paper.optim.lr, paper.optim.weight_decay, paper.epochs, paper.image_size) == (3e-4, 1e-4, 300, 224)
    assert paper.options.optiml.marginals == "learned" and paper.expander == ExpanderConfig(2048, 3, True)
    assert (paper.options.optiml.alpha, paper.options.optiml.beta, paper.options.optiml.eta) == (0.6, 25.0, 1.0)
    assert (paper.optim.optimizer, paper.augment.min_scale, paper.options.optiml.invariance) == ("lars", 0.08, 0.0)
    usual = PretrainConfig(tmp_path, tmp_path).resolve()
    assert (usual.optim.optimizer, usual.augment.min_scale, usual.options.optiml.invariance) == ("adamw", 0.6, 25.0)
    with pytest.raises(CommandError, match=r"--optim.optimizer sgd needs --optim.lr; the preset's is for adamw"):
        PretrainConfig(tmp_path, tmp_path, optim=OptimConfig("sgd")).resolve()
    mine = PretrainConfig(tmp_path, tmp_path, batch_size=128, optim=OptimConfig(trust=0.5)).resolve()
    assert (mine.optim.lr, mine.optim.trust, mine.options.optiml.marginals) == (2e-3, 0.5, "perplexity")
    assert PretrainConfig(tmp_path, tmp_path, optim=OptimConfig(lr=0.0)).resolve().optim.lr == 0.0
    assert mine.resolve() == mine


def test_every_flag_that_the_page_on_faithfulness_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(pretrain_module.__file__).parents[1] / "FAITHFULNESS.md").read_text()
    flags = set(re.findall(r"`(--[a-z.-]+)", page.split("## Scoring")[0]))
    with pytest.raises(SystemExit):
        cli(["pretrain", "--help"])
    assert len(flags) > 25
    assert flags <= set(re.findall(r"--[a-z.-]+", capsys.readouterr().out))


def test_all_images_and_imagenet_weights(few_phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    imagenet, urls = resnet18(weights=None).state_dict(), []

    def download(url: str, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        urls.append(url)
        return imagenet

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    config = small(few_phantoms, tmp_path / "run", init="imagenet", all_images=True, epochs=1, norm="frozen")
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
    advice = r"no route to host.*put https://.*resnet18-f37072fd\.pth into .*checkpoints"
    with pytest.raises(CommandError, match=advice):
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


def test_half_precision_on_a_cpu_is_refused(few_phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="--precision 16-mixed needs a GPU; take bf16-mixed"):
        pretrain(small(few_phantoms, tmp_path / "run", precision="16-mixed"))


def test_a_damaged_checkpoint_is_named(few_phantoms: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretrain(small(few_phantoms, run, stop_after=1)) is None
    (run / "last.ckpt").write_bytes(b"half of it")
    with pytest.raises(CommandError, match=r"last\.ckpt is damaged"):
        pretrain(small(few_phantoms, run))
