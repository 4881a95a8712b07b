"""Segmentation and heatmaps of the OPTiML example: Dice, outlines, Grad-CAM against boxes."""

from __future__ import annotations

import dataclasses
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("segmentation_models_pytorch", reason="the example needs otloss[examples]")
pytest.importorskip("captum", reason="the example needs otloss[examples]")

from PIL import Image
from xray_runs import QUIET, SHORT

from examples.optiml.data.index import Box, read_index
from examples.optiml.data.masks import mask_set
from examples.optiml.data.prepare.command import prepare
from examples.optiml.data.prepare.settings import PrepareConfig
from examples.optiml.downstream.dice import Overlap, dice_figures
from examples.optiml.downstream.evaluate import evaluate
from examples.optiml.downstream.finetune import Classifier, load_classifier, predict
from examples.optiml.downstream.heatmap import box_mask, chance, grad_cam, heatmap, hits
from examples.optiml.downstream.segment import segment, unet
from examples.optiml.downstream.settings import EvaluateConfig, HeatmapConfig, SegmentConfig
from examples.optiml.errors import CommandError
from examples.optiml.pretraining.network import Backbone, load_backbone, set_norm

# --- segmentation --------------------------------------------------------------------------------------------


def test_three_dice_conventions_on_a_toy() -> None:
    true, predicted = np.zeros((4, 2, 4), bool), np.zeros((4, 2, 4), bool)
    true[0, 0, :4], predicted[0, 0, 2:4] = True, True  # 2 of 4 found: 2 * 2 / (4 + 2)
    true[1, 0, 0] = True  # missed: 0
    predicted[2, 1, 1] = True  # nothing there: 0
    overlap = Overlap.of(predicted, true)  # the fourth is empty in both
    once = np.ones((1, 4))
    assert overlap.positives(once)[0] == pytest.approx((2 / 3 + 0) / 2)
    assert overlap.kaggle(once)[0] == pytest.approx((2 / 3 + 0 + 0 + 1) / 4)
    assert overlap.overall(once)[0] == pytest.approx(2 * 2 / (5 + 3))
    silent = dice_figures(Overlap.of(np.zeros_like(true), true), np.arange(4), draws=50)
    assert silent["positives"]["value"] == 0 and silent["kaggle"]["value"] == 0.5 and silent["positive_images"] == 2
    nothing = dice_figures(Overlap.of(np.zeros((3, 2, 2), bool), np.zeros((3, 2, 2), bool)), np.arange(3), draws=10)
    assert nothing["kaggle"]["value"] == 1 and nothing["positives"]["value"] is None
    assert nothing["global"]["value"] is None


def test_a_unet_starts_from_the_backbone() -> None:
    backbone = load_backbone(None, 5)
    network = unet(backbone, seed=0)
    weights = dict(network.named_parameters())
    assert torch.equal(weights["encoder.layer4.1.conv2.weight"], backbone.layer4[1].conv2.weight)
    other = dict(unet(load_backbone(None, 6), seed=0).named_parameters())
    decoder = [name for name in weights if name.startswith("decoder.")]
    assert decoder and all(torch.equal(weights[name], other[name]) for name in decoder)  # compared encoders share it


def test_segmentation_of_a_finding_and_of_lungs(phantoms: Path, tmp_path: Path) -> None:
    config = SegmentConfig(
        phantoms, untrained=True, image_size=32, label="Effusion", seeds=(0,), train=SHORT, draws=20, out=tmp_path / "a"
    )
    (record,) = segment(config, QUIET)
    assert record["positive_images"] > 0 and 0 <= record["positives"]["value"] <= 1
    assert segment(config, QUIET)[0]["made"] == record["made"]  # not made again
    with pytest.raises(CommandError, match="has no outlines of Hernia; it has those of Cardiomegaly, "):
        mask_set(read_index(phantoms), "Hernia")

    root = tmp_path / "own"
    root.mkdir()
    rows = ["image,mask,split,patient,label"]
    for number, split in enumerate(["train"] * 6 + ["val"] * 2 + ["test"] * 3):
        mask = np.zeros((40, 50), np.uint8)
        mask[10 : 20 + number, 5:30] = 255
        Image.fromarray(mask // 2 + 20).save(root / f"{number:02}.jpg")
        Image.fromarray(mask).save(root / f"{number:02}-mask.png")
        rows.append(f"{number:02}.jpg,{number:02}-mask.png,{split},p{number},viral")
    for number, label in ((11, "normal"), (12, "viral")):  # without an outline
        Image.fromarray(mask).save(root / f"{number}.jpg")
        rows.append(f"{number}.jpg,,train,p{number},{label}")
    (root / "T.csv").write_text("\n".join(rows) + "\n")
    options: dict[str, Any] = {
        "table": root / "T.csv", "mask_column": "mask", "split_column": "split", "patient_column": "patient",
        "label_columns": ("label",), "size": 0, "workers": 1,
    }  # fmt: skip
    index = prepare(PrepareConfig("csv", tmp_path / "lungs", root, **options, mask_label="Lung")).index
    task = mask_set(index, "Lung")  # no finding: only films with an outline
    assert len(task) == 11 and task.split("test").masks(40)[0].sum() == pytest.approx(40 / 50 * 25 * 18, abs=40)
    index = prepare(PrepareConfig("csv", tmp_path / "viral", root, **options, mask_label="viral")).index
    task = mask_set(index, "viral")  # a finding: the normal film has an empty outline, of one film it is unknown
    assert len(task) == 12 and "12.png" not in task.index.names
    assert [mask.any() for mask in task.split("train").masks(40)] == [True] * 6 + [False]
    config = dataclasses.replace(config, data=tmp_path / "lungs", label="Lung", out=tmp_path / "b")
    (lungs,) = segment(config, QUIET)
    assert lungs["images"] == lungs["positive_images"] == 3
    assert lungs["positives"]["value"] == pytest.approx(lungs["kaggle"]["value"])


def test_an_outline_does_not_vanish_at_the_networks_size(phantoms: Path) -> None:
    task = mask_set(read_index(phantoms), "Effusion")
    rows = [row for row in range(len(task)) if task.index.mask(row, "Effusion") is not None]
    for size in (1, 2, 3, 5, 8):
        assert all(task.masks(size)[row].any() for row in rows)


# --- heatmaps ------------------------------------------------------------------------------------------------


def test_boxes_hits_and_chance_by_hand() -> None:
    mask = box_mask([Box("c0", 0.5, 0.0, 0.5, 0.2)], 10)
    assert mask.sum() == 10 and mask[:2, 5:].all()
    assert box_mask([Box("c0", 0.501, 0.501, 0.01, 0.01)], 10).sum() == 1  # smaller than a pixel
    maps = np.zeros((3, 10, 10))
    maps[0, 0, 5:] = 2.0
    maps[0, 1, :5] = 1.0  # the top tenth: half inside the box
    maps[1, 9, 0] = 1.0
    pointing, iou = hits(maps, np.stack([mask] * 3))
    assert pointing.tolist() == [1, 0, 0] and iou[0] == pytest.approx(5 / 15) and iou[2] == 0
    point, overlap = chance(mask[None], 10, 10)
    shared = [comb(10, k) * comb(90, 10 - k) / comb(100, 10) * k / (20 - k) for k in range(11)]
    assert point == pytest.approx(0.1) and overlap == pytest.approx(sum(shared), abs=0.002)


def test_a_position_at_the_edge_can_hit() -> None:
    maps = np.zeros((2, 4, 4))
    maps[0, 0, 0] = maps[1, 3, 2] = 1.0
    masks = np.stack([box_mask([Box("c0", x, y, 0.1, 0.1)], 64) for x, y in ((0.08, 0.08), (0.58, 0.83))])
    assert hits(maps, masks)[0].tolist() == [1, 1] and hits(maps[::-1].copy(), masks)[0].tolist() == [0, 0]


def test_grad_cam_finds_a_planted_spot() -> None:
    """A network whose one channel lights up where the image is bright, and whose class reads that channel."""
    size, model = 64, Classifier(Backbone(), 2)

    class Images:
        def __getitem__(self, row: int) -> Image.Image:
            return Image.fromarray(pictures[row])

    torch.manual_seed(0)
    pictures = np.full((4, size, size), 20, np.uint8)
    corners = [(0, 0), (0, 28), (28, 0), (28, 28)]  # where the strided stages look
    for picture, (y, x) in zip(pictures, corners, strict=True):
        picture[y : y + 16, x : x + 16] = 255
    model.eval()
    plant(model)
    maps = grad_cam(model, Images(), size, np.arange(4), np.zeros(4, int))  # type: ignore[arg-type]
    boxes = [Box("c0", x / size, y / size, 16 / size, 16 / size) for y, x in corners]
    masks = np.stack([box_mask([box], size) for box in boxes])
    pointing, iou = hits(maps, masks)
    assert pointing.tolist() == [1, 1, 1, 1] and (iou > 0.3).all()
    other = grad_cam(model, Images(), size, np.arange(4), np.ones(4, int))  # type: ignore[arg-type]
    assert not other.any()  # the other class is lowered by brightness: nothing speaks for it


def plant(model: Classifier) -> None:
    """Make every stage pass the mean brightness on in channel 0, and the head read it: + for class 0, - for class 1."""
    with torch.no_grad():
        for module in model.backbone.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.zero_()
                middle = module.kernel_size[0] // 2
                if module is model.backbone.conv1:
                    module.weight[0] = 1 / (3 * 49)
                elif middle == 0:  # where a stage shrinks the map
                    module.weight[0, 0, 0, 0] = 1.0
        model.head.weight.zero_()
        model.head.weight[0, 0], model.head.weight[1, 0] = 1.0, -1.0
        model.head.bias.zero_()


def test_a_group_norm_backbone_goes_through_every_stage(phantoms: Path, tmp_path: Path) -> None:
    backbone, path = Backbone(), tmp_path / "group.pth"
    set_norm(backbone, "group")
    torch.save(backbone.state_dict(), path)
    start: dict[str, Any] = {"run": path, "image_size": 32, "draws": 20, "out": tmp_path / "out"}
    evaluate(EvaluateConfig(phantoms, **start, protocol="finetune", fractions=(0.1,), keep=(0.1,), train=SHORT), QUIET)
    model, _ = load_classifier(tmp_path / "out" / "finetune-0.1-seed0.pth")
    written = np.load(tmp_path / "out" / "finetune-0.1-seed0.npz")["scores"]
    assert np.allclose(predict(model, read_index(phantoms).split("test"), 32), written, atol=1e-5)
    (record,) = heatmap(HeatmapConfig(phantoms, **start, fraction=0.1, figure_images=2), QUIET)
    assert record["boxed_findings"] > 0
    network = unet(load_backbone(path), seed=0).eval()
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 1, 32, 32)
    for module in (*model.modules(), *network.get_submodule("encoder").modules()):
        assert not isinstance(module, torch.nn.BatchNorm2d)
