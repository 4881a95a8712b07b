"""Weights of other programs: a prefix or a checkpoint around them is no obstacle, anything else is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pytorch_lightning", reason="the example needs otloss[examples]")

from small_methods import tiny
from torchvision.models import resnet18, resnet34, resnet50

from examples.optiml.errors import CommandError
from examples.optiml.pretraining.network import load_backbone
from examples.optiml.pretraining.trainer import pretrain

THEIRS = resnet18(weights=None).state_dict()


def under(prefix: str, weights: dict[str, Tensor] = THEIRS) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def stale() -> dict[str, Tensor]:
    """Another network of the same names, which must not be taken."""
    return {name: torch.zeros_like(value) for name, value in THEIRS.items()}


@pytest.mark.parametrize(
    "content",
    [
        THEIRS,
        under("module."),
        under("backbone."),
        under("encoder."),
        {"epoch": 3, "state_dict": THEIRS},
        {"model": under("module."), "optimizer": {}},
        # MoCo v2's own file: two networks and a queue.
        {"arch": "resnet18", "state_dict": {
            **under("module.encoder_q."), **under("module.encoder_k.", stale()), "module.queue": torch.ones(2, 3),
        }},
        {**under("student.backbone."), **under("teacher.network.", stale()), "student.head.weight": torch.ones(3)},
        {name: value for name, value in THEIRS.items() if "num_batches_tracked" not in name},
    ],
)  # fmt: skip
def test_prefixes_and_checkpoints(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pth")
    backbone = load_backbone(tmp_path / "x.pth").state_dict()
    assert all(torch.equal(value, THEIRS[name]) for name, value in backbone.items() if "num_batches" not in name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (under("backbone.", resnet50(weights=None).state_dict()), "it has 'layer1.0.bn3.bias', so it is a ResNet of"),
        (resnet34(weights=None).state_dict(), "it has 'layer1.2.bn1.bias', so it is a ResNet of another kind"),
        ({"0.weight": torch.ones(2)}, "no conv1.weight and layer4.1.conv2.weight under any prefix; its names are as"),
        ({**under("a.net."), **under("b.net.")}, "several networks, under 'a.net.', 'b.net.': save the"),
        ({**under("s.backbone."), **under("t.backbone.")}, "several networks, under 's.backbone.', 't.backbone.'"),
        ([1, 2], "it is a list, not a state_dict"),
        ({name: value for name, value in THEIRS.items() if name != "layer2.0.bn1.bias"}, "'layer2.0.bn1.bias' is mis"),
        ({**THEIRS, "bn1.bias": torch.ones(32), "bn1.weight": torch.ones(7, 2)}, "'bn1.weight' is 7 x 2, and"),
    ],
)  # fmt: skip
def test_what_is_in_the_way_is_said_in_one_line(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CommandError) as caught:
        load_backbone(tmp_path / "x.pth")
    assert message in str(caught.value) and str(tmp_path / "x.pth") in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("method", ["moco", "byol"])
def test_our_own_checkpoint(few_phantoms: Path, tmp_path: Path, method: str) -> None:
    """With a momentum encoder beside the backbone; the weights are those that the run exports."""
    exported = pretrain(tiny(few_phantoms, tmp_path / "run", method))
    ours, theirs = (load_backbone(path).state_dict() for path in (exported, tmp_path / "run" / "last.ckpt"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
