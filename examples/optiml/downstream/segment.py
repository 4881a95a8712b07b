"""Segmentation: a U-Net whose encoder starts from the pretrained backbone (the paper's Fig. 3)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from ..data.batches import grey_batches
from ..data.masks import MaskSet, MaskTask, fingerprint, mask_set
from ..data.subsets import label_fraction, write_ids
from ..pretraining.network import Backbone, device
from .dice import Overlap, dice_figures
from .result_files import Record, read_if_current, write_record
from .settings import SegmentConfig, TrainConfig
from .starting_weights import Start, default_out, resolve
from .training import fit, jitter


def unet(backbone: Backbone, seed: int) -> nn.Module:
    """A U-Net with ResNet18 encoder; the decoder's weights follow ``seed``, the encoder is the backbone."""
    import segmentation_models_pytorch as smp  # seconds to import: not at the start of every command

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = smp.Unet("resnet18", encoder_weights=None, in_channels=3, classes=1)
    encoder = network.get_submodule("encoder")  # a ResNet18 too: its stages are exchanged, whatever norm and stem
    for name in ("conv1", "bn1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        encoder.add_module(name, backbone.get_submodule(name))
    return network


@torch.no_grad()
def predict_masks(model: nn.Module, task: MaskTask) -> NDArray[np.bool_]:
    """Where the network's probability is above a half, (n, H, W)."""
    model.eval()
    found = [(model(x.to(device()))[:, 0] > 0).cpu() for x in grey_batches(task.images, task.size, 32)]
    return torch.cat(found).numpy()


def train_unet(
    model: nn.Module, train: MaskSet, val: MaskSet, size: int, config: TrainConfig, seed: int, checkpoint: Path,
    identity: Record,
) -> dict[str, float]:  # fmt: skip
    """Cross-entropy plus soft Dice over the batch; kept: the best Dice of all validation pixels."""
    from segmentation_models_pytorch.losses import DiceLoss

    task, held = MaskTask(train, size), MaskTask(val, size)
    soft_dice = DiceLoss("binary", from_logits=True)

    def loss_of(x: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        both = jitter(torch.cat([x, mask], 1), generator)  # the outline moves with its image
        logits, target = model(both[:, :3]), (both[:, 3:] > 0.5).float()
        loss: Tensor = bce(logits, target) + soft_dice(logits, target)
        return loss

    def score_of() -> float:
        return float(Overlap.of(predict_masks(model, held), held.masks).overall(np.ones((1, len(val))))[0])

    return dataclasses.asdict(fit(model, len(train), task.load, loss_of, score_of, config, seed, checkpoint, identity))


def segment(config: SegmentConfig, console: Console | None = None, start: Start | None = None) -> list[Record]:
    """Every fraction and seed that is asked for; those that are there are read. ``start``: as for ``evaluate``."""
    start, console = start or resolve(config), console or Console()
    task, out = mask_set(start.index(), config.label), config.out or default_out(config.run, start)
    return [
        _one(config, start, task, out, fraction, seed, console)
        for seed in config.seeds
        for fraction in config.fractions
    ]


def _one(
    config: SegmentConfig, start: Start, task: MaskSet, out: Path, fraction: float, seed: int, console: Console
) -> Record:
    path = out / f"segment-{task.label}-{fraction:g}-seed{seed}.json"
    identity = {
        **start.identity(), "label": task.label, "fraction": fraction, "seed": seed, "data": fingerprint(task),
        "train": dataclasses.asdict(config.train), "draws": config.draws,
    }  # fmt: skip
    known = read_if_current(path, identity)
    if known is not None:
        return known
    start.ensure_weights()
    train = dataclasses.replace(task, index=label_fraction(task.index.split("train"), fraction, seed))
    write_ids(train.index, out / "subsets-segment", fraction, seed)
    model = unet(start.backbone(seed), seed).to(device())
    with console.status(f"U-Net, {start.shown}, with {len(train)} outlined films, seed {seed}"):
        fitted = train_unet(
            model, train, task.split("val"), start.image_size, config.train, seed, path.with_suffix(".ckpt"), identity
        )
    test = MaskTask(task.split("test"), start.image_size)
    overlap = Overlap.of(predict_masks(model, test), test.masks)
    figures = dice_figures(overlap, test.patients, config.draws)
    found = np.where(overlap.true > 0, overlap.each(), np.nan)  # of films that have something to find
    np.savez_compressed(path.with_suffix(".npz"), dice=found.astype(np.float32), names=task.split("test").index.names)
    record = {
        "stage": "segment", **start.labels(), "label": task.label, "fraction": fraction, "seed": seed,
        "identity": identity, "train_images": len(train), **fitted, **figures,
    }  # fmt: skip
    dice = _text(figures["positives"]["value"])
    console.print(f"{start.shown}, {task.label}, {len(train)} outlines, seed {seed}: Dice {dice}", highlight=False)
    record = write_record(path, record)
    path.with_suffix(".ckpt").unlink(missing_ok=True)
    return record


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def main(config: SegmentConfig) -> None:
    """The ``segment`` command."""
    segment(config)
