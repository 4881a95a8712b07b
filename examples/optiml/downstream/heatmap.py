"""Where a fine-tuned network looks: Grad-CAM beside ground-truth boxes (the paper's Fig. 2), and how often it is right.

The paper names no method; this is Grad-CAM (Selvaraju 2017) by captum, on the deepest stage whose map still has
:data:`MIN_SIDE` positions a side (``layer4`` from 128 px on; under the small stem from 32 px on). Two figures per image
and boxed finding:

* pointing game: the centre of the map's largest position lies in a box of that finding;
* IoU of the boxes' union with the tenth of the image where the enlarged map is largest.

Beside them stand what maps of random values would get, and how many maps are zero everywhere, which hit nothing.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch.nn.functional import interpolate

from ..data.batches import grey_batch
from ..data.images import ImageStore
from ..data.index import Box, ChestIndex
from ..errors import CommandError
from ..metrics import Estimate, Floats, patient_draws
from ..pretraining.network import device
from .finetune import Classifier, load_classifier
from .result_files import Record, read_if_current, write_record
from .settings import HeatmapConfig
from .starting_weights import Start, default_out, resolve

MIN_SIDE, TOP, RANDOM_MAPS = 4, 0.1, 1000


@dataclass(frozen=True)
class BoxedFinding:
    """One boxed finding of one film."""

    row: int
    label: str
    boxes: list[Box]


def targets(index: ChestIndex) -> list[BoxedFinding]:
    """Every (film, finding) with a box, in the index's order."""
    boxes = [index.boxes.get(str(name), []) for name in index.names]
    return [
        BoxedFinding(row, label, [box for box in here if box.label == label])
        for row, here in enumerate(boxes)
        for label in sorted({box.label for box in here} & set(index.classes))
    ]


def box_mask(boxes: list[Box], size: int) -> NDArray[np.bool_]:
    """Pixels whose centre lies in a box; at least the one at each box's centre."""
    centres = (np.arange(size) + 0.5) / size
    mask = np.zeros((size, size), bool)
    for box in boxes:
        across = (centres >= box.x) & (centres < box.x + box.width)
        down = (centres >= box.y) & (centres < box.y + box.height)
        mask |= down[:, None] & across[None]
        middle = (np.array([box.y + box.height / 2, box.x + box.width / 2]) * size).astype(int).clip(0, size - 1)
        mask[tuple(middle)] = True
    return mask


def cam_layer(model: Classifier, image_size: int) -> torch.nn.Module:
    """The deepest stage whose map has at least MIN_SIDE positions a side."""
    for name, factor in (("layer4", 1), ("layer3", 2), ("layer2", 4)):
        if -(-image_size * factor // model.backbone.stride) >= MIN_SIDE:
            return model.get_submodule(f"backbone.{name}")
    return model.get_submodule("backbone.layer1")


def grad_cam(
    model: Classifier, images: ImageStore, size: int, rows: NDArray[np.intp], classes: NDArray[np.intp]
) -> Floats:
    """Maps (n, h, w) as coarse as the layer, non-negative, of one class per film."""
    from captum.attr import LayerGradCam  # seconds to import: not at the start of every command

    model = model.to(device())
    cam = LayerGradCam(model, cam_layer(model, size))
    maps = []
    for part in np.array_split(np.arange(len(rows)), max(1, -(-len(rows) // 32))):
        x = grey_batch(images, rows[part], size)
        target = torch.from_numpy(classes[part])
        maps.append(cam.attribute(x.to(device()), target=target.to(device()), relu_attributions=True).detach().cpu())
    return torch.cat(maps)[:, 0].double().numpy()


def enlarged(maps: Floats, size: int) -> Floats:
    """Maps (n, h, w) as large as the films, (n, size, size)."""
    large = interpolate(torch.from_numpy(maps)[:, None], (size, size), mode="bilinear", align_corners=False)
    return large[:, 0].numpy()


def at_centres(masks: NDArray[np.bool_], h: int, w: int) -> NDArray[np.bool_]:
    """Masks (n, size, size) at the centres of h x w positions: (n, h w)."""
    down, across = (((np.arange(k) + 0.5) * masks.shape[-1] / k).astype(int) for k in (h, w))
    return masks[:, down[:, None], across].reshape(len(masks), -1)


def hits(maps: Floats, masks: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Pointing game (0 or 1) and IoU per map; a map that is zero everywhere points nowhere and overlaps nothing.

    It is the position of the coarse map that points: enlarged, one at the edge is largest on the image's outline,
    which no box holds.
    """
    alive = maps.any(axis=(1, 2))
    largest = maps.reshape(len(maps), -1).argmax(axis=1)
    pointing = at_centres(masks, *maps.shape[1:])[np.arange(len(maps)), largest] & alive
    flat, inside = enlarged(maps, masks.shape[-1]).reshape(len(maps), -1), masks.reshape(len(masks), -1)
    top = np.zeros_like(inside)
    count = max(1, round(TOP * flat.shape[1]))
    np.put_along_axis(top, np.argsort(-flat, axis=1, kind="stable")[:, :count], True, axis=1)
    top &= alive[:, None]
    iou = (top & inside).sum(axis=1) / (top | inside).sum(axis=1)
    return pointing.astype(np.float64), iou


def chance(masks: NDArray[np.bool_], h: int, w: int) -> tuple[float, float]:
    """Means of the same two over h x w maps of independent uniform values; the first is exact."""
    rng, rounds = np.random.default_rng(0), -(-RANDOM_MAPS // len(masks))
    overlaps = [hits(rng.random((len(masks), h, w)), masks)[1].mean() for _ in range(rounds)]
    return float(at_centres(masks, h, w).mean()), float(np.mean(overlaps))


def heatmap(config: HeatmapConfig, console: Console | None = None, start: Start | None = None) -> list[Record]:
    """Every seed that is asked for; those that are there are read. ``start``: what ``config`` would be resolved to."""
    start, console = start or resolve(config), console or Console()
    index, out = start.index().split(config.split), config.out or default_out(config.run, start)
    if not targets(index):
        raise CommandError(f"{start.data} has no box on a film of split {config.split!r}")
    return [_one(config, start, index, out, seed, console) for seed in config.seeds]


def heatmap_record(
    config: HeatmapConfig, start: Start, index: ChestIndex, out: Path, seed: int, network: Record
) -> tuple[Path, Record, Record | None]:
    """Where the record of a network's maps belongs, its identity, and the record, if it is there.

    ``network`` is the identity of the fine-tuning, which is known without the network; ``index`` holds the split.
    """
    path = out / f"heatmap-{config.fraction:g}-seed{seed}.json"
    identity = {
        **start.identity(), "data": index.fingerprint(), "split": config.split, "fraction": config.fraction,
        "seed": seed, "draws": config.draws, "figure_images": config.figure_images, "network": network,
    }  # fmt: skip
    return path, identity, read_if_current(path, identity)


def _one(config: HeatmapConfig, start: Start, index: ChestIndex, out: Path, seed: int, console: Console) -> Record:
    network = out / f"finetune-{config.fraction:g}-seed{seed}.pth"
    tuned = network.with_suffix(".json")
    path, identity, known = heatmap_record(
        config, start, index, out, seed, json.loads(tuned.read_text())["identity"] if tuned.exists() else {}
    )
    if known is not None:
        return known
    if not network.is_file():
        first = f"evaluate --protocol finetune --fractions {config.fraction:g}"
        raise CommandError(f"{network} is missing: run {first} first")
    model, facts = load_classifier(network)
    size, usable = facts["image_size"], dict(zip(facts["classes"], facts["usable"], strict=True))
    index = index.take(np.unique([target.row for target in targets(index)]))  # few films have boxes
    known_targets = targets(index)
    learnt = [target for target in known_targets if usable[target.label]]
    record: Record = {
        "stage": "heatmap", **start.labels(), "fraction": config.fraction, "seed": seed, "identity": identity,
        "boxed_findings": len(known_targets), "scored_findings": len(learnt),
    }  # fmt: skip
    images = ImageStore(index.paths, size)
    if learnt:
        record |= _score(model, images, size, index, learnt, config.draws)
    shown = _for_figure(known_targets, config.figure_images)
    _save_figure_maps(path.with_suffix(".npz"), model, images, size, index, shown)
    figures = "no boxed finding could be learnt"
    if learnt:
        pointing, iou, chance = record["pointing"]["value"], record["iou"]["value"], record["chance"]
        figures = f"pointing {pointing:.2f} (chance {chance['pointing']:.2f}), IoU {iou:.2f} ({chance['iou']:.2f})"
    console.print(f"{start.shown}, Grad-CAM, seed {seed}: {figures}", highlight=False)
    return write_record(path, record)


def _cams(model: Classifier, images: ImageStore, size: int, index: ChestIndex, which: list[BoxedFinding]) -> Floats:
    rows = np.array([target.row for target in which])
    classes = np.array([index.classes.index(target.label) for target in which])
    return grad_cam(model, images, size, rows, classes)


def _score(
    model: Classifier, images: ImageStore, size: int, index: ChestIndex, which: list[BoxedFinding], draws: int
) -> dict[str, Any]:
    maps = _cams(model, images, size, index, which)
    masks = np.stack([box_mask(target.boxes, size) for target in which])
    patients = index.patients[[target.row for target in which]]
    weights = patient_draws(patients, draws)
    empty = (~maps.any(axis=(1, 2))).astype(np.float64)
    scored = dict(zip(("pointing", "iou", "empty"), (*hits(maps, masks), empty), strict=True))
    labels = np.array([target.label for target in which])
    figures: dict[str, Any] = {
        name: dataclasses.asdict(Estimate.of(values.mean(), weights @ values / weights.sum(axis=1)))
        for name, values in scored.items()
    }
    figures["chance"] = dict(zip(("pointing", "iou"), chance(masks, *maps.shape[1:]), strict=True))
    figures["per_class"] = {
        str(label): {
            "findings": int((labels == label).sum()),
            **{name: round(float(values[labels == label].mean()), 4) for name, values in scored.items()},
        }
        for label in np.unique(labels)
    }
    return figures


def _for_figure(found: list[BoxedFinding], count: int) -> list[BoxedFinding]:
    """The first film of each finding, most frequent finding first, then the second of each ...: not picked by looks."""
    by_label: dict[str, list[BoxedFinding]] = {}
    for target in found:
        by_label.setdefault(target.label, []).append(target)
    queues = sorted(by_label.values(), key=len, reverse=True)
    longest, shown = max(map(len, queues)), dict[int, BoxedFinding]()
    for target in (queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)):
        shown.setdefault(target.row, target)  # no film twice
    return list(shown.values())[:count]


def _save_figure_maps(
    path: Path, model: Classifier, images: ImageStore, size: int, index: ChestIndex, shown: list[BoxedFinding]
) -> None:
    """Films, boxes and maps (255 where each is largest) for the report, which draws all arms side by side."""
    maps = enlarged(_cams(model, images, size, index, shown), size)
    top = maps.max(axis=(1, 2), keepdims=True)
    pixels = [np.asarray(images[t.row].resize((size, size), resample=2)) for t in shown]
    np.savez_compressed(
        path,
        images=np.stack(pixels),
        maps=np.round(255 * maps / np.where(top > 0, top, 1)).astype(np.uint8),
        names=np.array([str(index.names[t.row]) for t in shown]),
        labels=np.array([t.label for t in shown]),
        boxes=np.array([[i, b.x, b.y, b.width, b.height] for i, t in enumerate(shown) for b in t.boxes]),
    )


def main(config: HeatmapConfig) -> None:
    """The ``heatmap`` command."""
    heatmap(config)
