"""ImageNet's weights from a file: no download, a run known by the file's bytes, or one line that says what is wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pytorch_lightning", reason="the example needs otloss[examples]")

from torch import Tensor
from torchvision.models import resnet18
from xray_runs import QUIET, interrupt_at, small

from examples.optiml.downstream.evaluate import evaluate
from examples.optiml.downstream.settings import EvaluateConfig, StartConfig
from examples.optiml.downstream.starting_weights import resolve
from examples.optiml.errors import CommandError
from examples.optiml.pretraining.network import Backbone
from examples.optiml.pretraining.trainer import build, pretrain


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing is to be downloaded")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)


def made_up(seed: int) -> dict[str, Tensor]:
    """Weights with a classifier, as torchvision's file has them. The statistics are none that a new network has."""
    torch.manual_seed(seed)
    weights = resnet18(weights=None).state_dict()
    return {name: value + 0.01 if "running" in name else value for name, value in weights.items()}


def saved(path: Path, seed: int = 1) -> Path:
    torch.save(made_up(seed), path)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "encoder.", "model."])
@pytest.mark.parametrize("head", [True, False])
def test_both_stages_start_from_the_file(few_phantoms: Path, tmp_path: Path, prefix: str, head: bool) -> None:
    weights = {name: value for name, value in made_up(1).items() if head or not name.startswith("fc.")}
    torch.save({f"{prefix}{name}": value for name, value in weights.items()}, tmp_path / "w.pth")
    config = small(few_phantoms, tmp_path / "run", init="imagenet", imagenet_weights=tmp_path / "w.pth")
    start = resolve(StartConfig(few_phantoms, imagenet=True, imagenet_weights=tmp_path / "w.pth"))
    for backbone in (build(config.resolve()).backbone, start.backbone(0)):
        assert set(backbone.state_dict()) == {name for name in weights if not name.startswith("fc.")}
        assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())


def test_a_run_is_known_by_the_bytes_of_its_first_weights(few_phantoms: Path, tmp_path: Path) -> None:
    one, other = saved(tmp_path / "one.pth", 1), saved(tmp_path / "other.pth", 2)
    run = small(few_phantoms, tmp_path / "run", epochs=1, init="imagenet", imagenet_weights=one)
    exported = pretrain(run, QUIET)
    known = json.loads((run.out / "config.json").read_text())
    assert known["imagenet_sha256"] == digest(one) != digest(other) and "imagenet_weights" not in known
    assert f"a file of them (SHA-256 {digest(one)})" in (run.out / "MODEL_CARD.md").read_text()
    moved = one.rename(tmp_path / "moved.pth")
    assert pretrain(dataclasses.replace(run, imagenet_weights=moved), QUIET) == exported  # the same run
    for changed in ({"imagenet_weights": other}, {"imagenet_weights": None}):
        with pytest.raises(CommandError, match=f"holds a different run .*imagenet_sha256: {digest(moved)} there"):
            pretrain(dataclasses.replace(run, **changed), QUIET)  # type: ignore[arg-type]
    keys = {dataclasses.replace(run, imagenet_weights=file).key() for file in (moved, other, None)}
    assert len(keys) == 3


def test_the_file_may_go_once_it_is_read(few_phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(tmp_path / "w.pth")
    was = digest(file)
    interrupt_at(monkeypatch, 3, file.unlink)
    run = small(few_phantoms, tmp_path / "run", epochs=1, init="imagenet", imagenet_weights=file)
    assert pretrain(run, QUIET) and was in (run.out / "MODEL_CARD.md").read_text()


def test_evaluations_of_two_files_are_two(phantoms: Path, tmp_path: Path) -> None:
    records = []
    for seed in (1, 2, 1):
        file = saved(tmp_path / f"{seed}.pth", seed)
        config = EvaluateConfig(
            phantoms, imagenet=True, imagenet_weights=file, image_size=32, draws=20, out=tmp_path / "out"
        )
        records += evaluate(config, QUIET)
        assert evaluate(config, QUIET)[0]["made"] == records[-1]["made"]  # found
        assert records[-1]["identity"]["start"] == f"imagenet, sha256 {digest(file)}" and records[-1]["arm"] == "sup2"
    first, second, again = ((r["identity"]["start"], r["macro_auc"]) for r in records)
    assert first == again != second and first[1] != second[1]


def test_a_download_is_what_it_was() -> None:
    start = resolve(StartConfig(Path(), imagenet=True, image_size=64))
    assert start.identity() == {"start": "imagenet", "image_size": 64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv1.weight": torch.ones(64, 3, 3, 3)}, "'conv1.weight' is 64 x 3 x 3 x 3, and should be 64 x 3 x 7 x 7"),
        ({"layer3.0.bn1.running_var": None}, "'layer3.0.bn1.running_var' is missing"),
        ({"layer1.0.conv3.weight": torch.ones(1)}, "it has 'layer1.0.conv3.weight', so it is a ResNet of another kind"),
        ({"conv1.weight": None}, "no conv1.weight and layer4.1.conv2.weight under any prefix"),
    ],
)
def test_what_does_not_fit_is_one_line(
    few_phantoms: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    weights = {name: value for name, value in {**made_up(1), **change}.items() if value is not None}
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(CommandError) as caught:
        pretrain(small(few_phantoms, tmp_path / "run", init="imagenet", imagenet_weights=tmp_path / "w.pth"), QUIET)
    assert message in str(caught.value) and str(tmp_path / "w.pth") in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    config = EvaluateConfig(few_phantoms, imagenet=True, imagenet_weights=tmp_path / "w.pth", image_size=32)
    with pytest.raises(CommandError) as same:
        evaluate(dataclasses.replace(config, out=tmp_path / "out"), QUIET)
    assert str(same.value) == str(caught.value)


def test_a_file_that_would_execute_something_is_refused(few_phantoms: Path, tmp_path: Path) -> None:
    torch.save(Backbone(), tmp_path / "w.pth")  # a pickled module names classes to build
    with pytest.raises(CommandError, match=r"w\.pth holds no ResNet18 weights"):
        pretrain(small(few_phantoms, tmp_path / "run", init="imagenet", imagenet_weights=tmp_path / "w.pth"), QUIET)


def test_flags_that_do_not_go_together(few_phantoms: Path, tmp_path: Path) -> None:
    file, gone = saved(tmp_path / "w.pth"), tmp_path / "gone.pth"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"imagenet_weights": file}, f"--imagenet-weights {file}: only with --init imagenet"),
        ({"init": "imagenet", "imagenet_weights": gone}, f"--imagenet-weights {gone}: there is no such file"),
        ({"init": "imagenet", "imagenet_weights": file, "stem": "small"}, "--init imagenet, --stem small: ImageNet's"),
        ({"init": "imagenet", "stem": "small"}, "--init imagenet, --stem small: ImageNet's first convolution is 7 x 7"),
    ]
    for options, message in cases:
        with pytest.raises(CommandError) as caught:
            small(few_phantoms, tmp_path / "run", **options).resolve()
        assert str(caught.value).startswith(message)
        imagenet = options.pop("init", None) is not None
        with pytest.raises(CommandError) as caught:
            resolve(StartConfig(few_phantoms, imagenet=imagenet, untrained=not imagenet, **options))
        assert str(caught.value).startswith(message.replace("--init imagenet", "--imagenet"))
