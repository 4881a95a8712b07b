"""Stems for small images: more positions, the same for every method and stage, and runs from before there were any."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("segmentation_models_pytorch", reason="the example needs otloss[examples]")
pytest.importorskip("captum", reason="the example needs otloss[examples]")

from small_methods import batch_of, tiny
from torchvision.models import resnet18
from xray_runs import QUIET, SHORT, small

from examples.optiml.commands.settings import XrayConfig
from examples.optiml.commands.sizes import Sizes
from examples.optiml.commands.xray import _common, run_name
from examples.optiml.downstream.evaluate import evaluate
from examples.optiml.downstream.finetune import Classifier, load_classifier
from examples.optiml.downstream.heatmap import cam_layer, heatmap
from examples.optiml.downstream.segment import segment, unet
from examples.optiml.downstream.settings import EvaluateConfig, HeatmapConfig, SegmentConfig, StartConfig
from examples.optiml.downstream.starting_weights import resolve
from examples.optiml.errors import CommandError
from examples.optiml.pretraining.methods import METHODS
from examples.optiml.pretraining.methods.pcrlv2 import PCRLv2
from examples.optiml.pretraining.network import STRIDES, Backbone, load_backbone
from examples.optiml.pretraining.settings import PretrainConfig, Stem
from examples.optiml.pretraining.trainer import build, pretrain

STEMS: tuple[Stem, ...] = ("standard", "no-pool", "small")
RESULTS = Path(__file__).parents[1] / "examples" / "optiml" / "results"


@pytest.mark.parametrize(("stem", "sides"), [("standard", (2, 4)), ("no-pool", (4, 8)), ("small", (8, 16))])
def test_positions_at_64_px(stem: Stem, sides: tuple[int, int]) -> None:
    third, maps, pooled = Backbone(stem).stages(torch.rand(2, 3, 64, 64))
    assert maps.shape == (2, 512, sides[0], sides[0]) and third.shape == (2, 256, sides[1], sides[1])
    assert pooled.shape == (2, 512) and 64 // Backbone(stem).stride == sides[0]


def test_the_standard_stem_is_torchvisions() -> None:
    torch.manual_seed(3)
    theirs = resnet18(weights=None)
    theirs.fc = torch.nn.Identity()
    ours, x = load_backbone(None, 3), torch.rand(2, 3, 64, 64)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert torch.allclose(ours(x)[1], theirs.eval()(x), rtol=1e-5, atol=1e-6)
    # The stages draw the same first weights under every stem.
    for stem in STEMS:
        other = load_backbone(None, 3, stem)
        assert torch.equal(other.layer4[1].conv2.weight, ours.layer4[1].conv2.weight)
    spread = float(load_backbone(None, 3, "small").conv1.weight.detach().std())
    assert spread == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)  # He's; of 1,728 draws, so to 1.7 %


@pytest.mark.parametrize("stem", ["no-pool", "small"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_step(method: str, stem: Stem) -> None:
    model = build(dataclasses.replace(tiny(Path(), Path(), method), stem=stem).resolve()).train()
    assert model.backbone.stem == stem
    for module in model.modules():
        if isinstance(module, Backbone):  # a momentum encoder too
            assert module.stem == stem and isinstance(module.maxpool, torch.nn.Identity)
    model.step(*batch_of(method))  # fills queues, which a loss of keys needs
    model.step(*batch_of(method, 1)).loss.backward()
    gradient = model.backbone.conv1.weight.grad
    assert gradient is not None and gradient.isfinite().all() and gradient.abs().sum() > 0
    assert gradient.shape[-1] == (3 if stem == "small" else 7)


@pytest.mark.parametrize("stem", STEMS)
def test_pcrlv2_draws_images_of_the_films_size(stem: Stem) -> None:
    model = build(dataclasses.replace(tiny(Path(), Path(), "pcrlv2"), stem=stem).resolve())
    assert isinstance(model, PCRLv2)
    maps = model.decoder(model.backbone(torch.rand(2, 3, 64, 64))[0])
    assert maps[-1].shape[-2:] == (64, 64) and len(maps) == 5
    sides = [z.shape[-1] for z in maps]
    assert sides == sorted(sides)


def assert_the_card_loads_it(run: Path, stem: Stem) -> None:
    """The code in the model card makes a network of torchvision's that computes what the run's backbone does."""
    code = re.findall(r"```python\n(.*?)```", (run / "MODEL_CARD.md").read_text(), re.DOTALL)[0]
    found: dict[str, Any] = {}
    exec(code.replace('"backbone.pth"', repr(str(run / "backbone.pth"))), found)
    network, x = found["network"].eval(), torch.rand(2, 3, 64, 64)
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        expected = load_backbone(run / "backbone.pth", stem=stem)(x)[1]
        assert torch.allclose(network(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stem", ["no-pool", "small"])
def test_every_stage_takes_the_stem_of_the_run(phantoms: Path, tmp_path: Path, stem: Stem) -> None:
    run = tmp_path / "run"
    assert pretrain(small(phantoms, run, "optiml", stem=stem, epochs=1, batch_size=16), QUIET)
    assert json.loads((run / "config.json").read_text())["stem"] == stem
    assert_the_card_loads_it(run, stem)
    with pytest.raises(CommandError, match=f"holds a different run .stem: {stem} there, None now"):
        pretrain(small(phantoms, run, "optiml", epochs=1, batch_size=16), QUIET)
    start: dict[str, Any] = {"run": run, "draws": 20}
    tuned: dict[str, Any] = {"protocol": "finetune", "fractions": (0.1,), "keep": (0.1,), "seeds": (0,), "train": SHORT}
    records = [r for more in ({}, tuned) for r in evaluate(EvaluateConfig(phantoms, **start, **more), QUIET)]
    model, _ = load_classifier(next(run.rglob("finetune-0.1-seed0.pth")))
    assert model.backbone.stem == stem and model.backbone.stride == STRIDES[stem]
    records += heatmap(HeatmapConfig(phantoms, **start, fraction=0.1, figure_images=2), QUIET)
    records += segment(SegmentConfig(phantoms, **start, label="Effusion", seeds=(0,), train=SHORT), QUIET)
    assert len(records) == 4 and {record["identity"]["stem"] for record in records} == {stem}
    with pytest.raises(CommandError, match=f"--stem standard: .*backbone.pth has the stem '{stem}'"):
        resolve(StartConfig(phantoms, run=run, stem="standard"))
    shared = _common(XrayConfig(phantoms, run=(run,)))
    assert (shared["stem"], shared["image_size"]) == (stem, 32)  # of the untrained row too
    # The weights alone, in another place, show a 3 x 3 convolution but no pooling.
    (run / "backbone.pth").rename(tmp_path / "weights.pth")
    alone = resolve(StartConfig(phantoms, run=tmp_path / "weights.pth", stem="no-pool" if stem == "no-pool" else None))
    assert alone.backbone(0).stem == stem


@pytest.mark.parametrize("stem", STEMS)
def test_a_unet_joins_maps_of_one_size(stem: Stem) -> None:
    backbone = load_backbone(None, 0, stem)
    network, x = unet(backbone, seed=0).eval(), torch.rand(1, 3, 64, 64)
    assert network(x).shape == (1, 1, 64, 64)
    encoded = network.get_submodule("encoder")(x)
    assert torch.allclose(encoded[-1], backbone(x)[0], rtol=1e-4, atol=1e-5)
    factor = backbone.stride // 8
    assert [z.shape[-1] for z in encoded[2:]] == [side // factor for side in (64, 32, 16, 8)]


def test_heatmaps_are_of_the_deepest_stage_with_enough_positions() -> None:
    numbers: dict[Stem, tuple[int, ...]] = {"standard": (2, 3, 4), "no-pool": (3, 4, 4), "small": (4, 4, 4)}
    for stem, stages in numbers.items():
        model = Classifier(Backbone(stem), 2)
        for size, name in zip((32, 64, 128), (f"layer{number}" for number in stages), strict=True):
            assert cam_layer(model, size) is model.backbone.get_submodule(name), (stem, size)


def test_the_card_of_a_usual_run_says_how_to_load_it(few_phantoms: Path, tmp_path: Path) -> None:
    assert pretrain(small(few_phantoms, tmp_path, epochs=1), QUIET)
    assert_the_card_loads_it(tmp_path, "standard")


def test_runs_from_before_there_were_stems_are_the_standard_ones() -> None:
    known = json.loads((RESULTS / "compare-phantoms" / "runs" / "vicreg-seed0.json").read_text())["pretraining"]
    now = PretrainConfig(Path(), Path(), "vicreg").identity()
    assert now.keys() == known.keys() - {"data_fingerprint"}
    assert PretrainConfig(Path(), Path(), "vicreg", stem="small").identity().keys() - now.keys() == {"stem"}
    untrained = [resolve(StartConfig(Path(), untrained=True, stem=stem)).identity() for stem in (None, *STEMS)]
    assert untrained[0] == untrained[1] == {"start": "untrained", "image_size": 224}
    assert len({str(identity) for identity in untrained}) == 3


def test_a_network_kept_before_there_were_stems(tmp_path: Path) -> None:
    state = {"weights": Classifier(Backbone(), 2).state_dict(), "classes": ["a", "b"], "usable": [True, True]}
    torch.save({**state, "image_size": 32}, tmp_path / "x.pth")
    assert load_classifier(tmp_path / "x.pth")[0].backbone.stem == "standard"


def test_runs_of_two_stems_have_two_folders() -> None:
    names = {run_name(XrayConfig(Path(), sizes=Sizes(image_size=64, stem=stem)), 0) for stem in (None, *STEMS)}
    assert names == {f"optiml{stem}-64px-10epochs-seed0" for stem in ("", "-no-pool", "-small")}
