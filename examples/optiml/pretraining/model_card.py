"""``MODEL_CARD.md``: what a finished run made, from what, how, and what it is not for. Written, never typed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from ..data.index import SPLITS, ChestIndex, read_index
from ..markdown import markdown_table
from ..provenance import provenance
from .distributed import World
from .log import epoch_means, log_frame, read_log
from .settings import CONFIG, PretrainConfig, Stem

LOADING = """import torch, torchvision
network = torchvision.models.resnet18({norm})
{stem}network.load_state_dict(torch.load("backbone.pth", weights_only=True), strict=False)  # only fc is missing"""
NO_POOL = "network.maxpool = torch.nn.Identity()\n"
STEMS: dict[Stem, str] = {
    "standard": "",
    "no-pool": NO_POOL,
    "small": NO_POOL + "network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)\n",
}
GROUP_NORM = "norm_layer=lambda channels: torch.nn.GroupNorm(32, channels)"


def write_model_card(config: PretrainConfig, index: ChestIndex, train: ChestIndex, world: World, path: Path) -> None:
    """Write the card of the run in ``path.parent``, from its configuration, index and logs."""
    path.write_text(_card(config, index, train, world, path.parent), encoding="utf-8")


def _card(config: PretrainConfig, index: ChestIndex, train: ChestIndex, world: World, run: Path) -> str:
    made = provenance()["made"]
    identity = json.loads((run / CONFIG).read_text())
    log = log_frame(run / "metrics.csv")
    means = epoch_means(log).set_index("epoch").drop(columns="step", errors="ignore").to_dict("index")
    first, last = (means.get(epoch, {}) for epoch in (1, config.epochs))
    monitor = read_log(run / "monitor.csv")
    hours = log["seconds"].sum() / 3600
    seen = (
        "Validation and test images of this data set were among them (without their labels): scores on those "
        "are transductive and no estimate for new patients."
        if config.all_images
        else "No validation or test image of this data set was among them."
    )
    if config.init == "imagenet":
        digest = identity.get("imagenet_sha256")
        which = f"a file of them (SHA-256 {digest})" if digest else "torchvision's (IMAGENET1K_V1)"
        seen += f" Training started from ImageNet weights: {which}."
    if config.norm == "frozen":
        seen += " Batch norms were frozen as they were at the start; in training mode the network above thaws them."
    if "val" in read_index(config.data, val_fraction=0.0, quiet=True).splits:
        validation = "the validation set is the data set's own"
    else:
        validation = f"validation share {config.val_fraction}, split seed {config.split_seed}"
    lines = [
        f"# ResNet18, pretrained by {config.method} on {len(train):,} films",
        "",
        f"`backbone.pth`: the weights of a ResNet18 without classifier under torchvision's names, from {config.init} "
        f"initialisation, pretrained without labels at {config.image_size} px. Input: grey images repeated over three "
        "channels, scaled to [0, 1], normalised by ImageNet's means and deviations.",
        "",
        "```python",
        LOADING.format(norm=GROUP_NORM if config.norm == "group" else "", stem=STEMS[config.stem]),
        "```",
        "",
        "## Data",
        f"`{config.data}` (fingerprint {index.fingerprint()}): {len(index):,} images, of which {len(train):,} of "
        f"{len(np.unique(train.patients)):,} patients were trained on. {seen} Splits: "
        + ", ".join(f"{name} {int((index.splits == name).sum()):,}" for name in SPLITS)
        + f" ({validation}).",
        "",
        "## Training",
        f"{config.epochs} epochs of {len(train) // config.batch_size:,} steps of {config.batch_size} images in "
        f"{world.size} process{'es' if world.size > 1 else ''}; {hours:.2f} hours in steps; preset `{config.preset}`, "
        f"seed {config.seed}, precision {config.precision}. Means over the first and the last epoch:",
        "",
        *markdown_table(
            ["", "first epoch", "last epoch"], [[name, _cell(first.get(name)), _cell(last[name])] for name in last]
        ),
        "",
    ]  # fmt: skip
    if monitor:
        names = [name for name in monitor[-1] if name != "step"]
        lines += [
            f"Monitored on validation images (`knn_auc`: macro AUC of {config.monitor.neighbours} neighbours' labels; "
            "labels served for measuring only):",
            "",
            *markdown_table(names, [[_cell(row[name]) for name in names] for row in monitor[-10:]]),
            "",
        ]
    lines += [
        "## Configuration",
        "```json",
        json.dumps({**identity, "monitor": dataclasses.asdict(config.monitor)}, indent=1),
        "```",
        "",
        "## Made",
        *(f"* {name}: {value}" for name, value in made.items()),
        "",
        "## Use and limits",
        "For research on representation learning. Not a medical device, and not validated for any clinical use: the "
        "features have been scored, if at all, on the splits named above. Collections of chest X-rays carry the "
        "habits of their hospitals, devices and labellers, their labels are partly read from reports by machine, and "
        "features can encode age, sex and the source of an image. The terms of use of the data set apply to these "
        "weights too where its owner says so.",
        "",
    ]
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.5g}"
