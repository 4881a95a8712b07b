"""A pretraining run, from order and views to the weights it ends with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pytorch_lightning", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from torchvision.models import resnet18

from examples.optiml.errors import CommandError
from examples.optiml.pretraining.log import read_log
from examples.optiml.pretraining.settings import ExpanderConfig, MethodOptions, PretrainConfig
from examples.optiml.pretraining.trainer import pretrain
from examples.optiml.pretraining.views import EpochSampler, seeded

# --- training ------------------------------------------------------------------------------------------------


def tiny(data: Path, out: Path, method: str = "vicreg", **changes: object) -> PretrainConfig:
    settings: dict[str, object] = {
        "epochs": 2, "batch_size": 16, "image_size": 40, "expander": ExpanderConfig(dim=32), "accelerator": "cpu",
    }  # fmt: skip
    return PretrainConfig(data, out, method, **{**settings, **changes})  # type: ignore[arg-type]


def test_order_and_views_follow_seed_epoch_and_image() -> None:
    sampler = EpochSampler(50, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert {row for _, row in first} == set(range(50)) and [r for _, r in first] != [r for _, r in second]
    assert {epoch for epoch, _ in second} == {1}
    state = torch.get_rng_state()
    with seeded(1, 2, 3):
        a = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    with seeded(1, 2, 3):
        b = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    assert torch.equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    assert torch.equal(state, torch.get_rng_state())


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(phantoms: Path, tmp_path: Path) -> None:
    whole = pretrain(tiny(phantoms, tmp_path / "whole", "optiml"))
    torch.rand(7)  # the state of the global generator must not matter
    assert pretrain(tiny(phantoms, tmp_path / "parts", "optiml", stop_after=1)) is None
    assert not (tmp_path / "parts" / "backbone.pth").exists()
    parts = pretrain(tiny(phantoms, tmp_path / "parts", "optiml", workers=1))
    assert whole is not None and parts is not None
    a, b = torch.load(whole, weights_only=True), torch.load(parts, weights_only=True)
    assert all(torch.equal(a[name], b[name]) for name in a)

    logs = [read_log(tmp_path / run / "metrics.csv") for run in ("whole", "parts")]
    assert [row["epoch"] for row in logs[0]] == [row["epoch"] for row in logs[1]] == [1, 1, 1, 2, 2, 2]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]
    for row in logs[0]:
        assert row["perplexity"] >= 0.25 * 512
        assert row["transport_cost"] < row["independent_cost"]
        assert row["grad_cvsim"] > 0 and row["grad_backbone"] > 0

    network = resnet18(weights=None)
    result = network.load_state_dict(a, strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"] and not result.unexpected_keys
    torch.manual_seed(0)
    untouched = resnet18(weights=None).conv1.weight
    assert not torch.allclose(network.conv1.weight, untouched, atol=1e-4)  # it has been trained


def test_a_run_folder_of_another_config_is_refused(phantoms: Path, tmp_path: Path) -> None:
    pretrain(tiny(phantoms, tmp_path / "run", epochs=1))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["method"] == "vicreg" and saved["options"] == {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}
    assert saved["optim"]["lr"] is not None  # presets are written out
    with pytest.raises(CommandError, match=r"holds a different run \(epochs: 1 there, 3 now\)"):
        pretrain(tiny(phantoms, tmp_path / "run", epochs=3))
    assert pretrain(tiny(phantoms, tmp_path / "run", epochs=1, workers=2)) == tmp_path / "run" / "backbone.pth"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(CommandError, match=r"is not empty and holds no config\.json"):
        pretrain(tiny(phantoms, tmp_path / "other"))


def test_a_loss_that_is_no_number_stops_with_a_reason(phantoms: Path, tmp_path: Path) -> None:
    options = MethodOptions()
    options = dataclasses.replace(options, vicreg=dataclasses.replace(options.vicreg, covariance=float("inf")))
    with pytest.raises(CommandError, match=r"the loss is (nan|inf) in epoch 1, step 1 \(.*invariance"):
        pretrain(tiny(phantoms, tmp_path / "run", options=options))
