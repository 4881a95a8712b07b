"""Frozen linear evaluation: features once, a logistic probe, and AUCs with intervals over test patients."""

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
from rich.table import Table
from torch import Tensor

from .data import ChestIndex, read_index
from .features import extract
from .metrics import Estimate, Floats, class_aucs, macro, patient_draws
from .model import load_backbone
from .pretrain import BACKBONE
from .probe import fit_probe

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a backbone's frozen features with a linear probe."""

    data: Path
    """Folder in the layout of NIH ChestX-ray14."""
    run: Path | None = None
    """Run folder of ``pretrain``, or a ResNet18 weights file under torchvision's names."""
    untrained: bool = False
    """Score the network as it is before training instead of a run."""
    image_size: int | None = None
    """Unset: the run's; 224 where there is none."""
    seed: int = 0
    """Initial weights, with ``--untrained``."""
    val_fraction: float = 0.14
    """Must be the pretraining's, else it may have seen validation images; read from the run when there is one."""
    split_seed: int = 0
    draws: int = 1000
    """Bootstrap replicates."""
    json: Path | None = None
    """Also write the figures here."""


@dataclass(frozen=True)
class Scored:
    """Test scores of one probe, with what belongs to them."""

    test: ChestIndex
    scores: Floats
    usable: NDArray[np.bool_]
    """Classes with positives and negatives in training; the others have no probe to speak of."""
    penalty: float

    def macro(self, within: bool, weights: Floats | None = None) -> Floats:
        """Macro AUC per row of ``weights``; ``within`` counts only pairs of one source."""
        groups = self.test.sources if within else None
        return macro(class_aucs(self.scores, self.test.labels, groups, weights), self.usable)

    def per_class(self, within: bool) -> dict[str, float]:
        aucs = class_aucs(self.scores, self.test.labels, self.test.sources if within else None)[0]
        kept = zip(self.test.classes, aucs, self.usable, strict=True)
        return {name: round(float(auc), 4) for name, auc, ok in kept if ok and not np.isnan(auc)}


def probe_scores(index: ChestIndex, x: dict[str, Tensor]) -> Scored:
    """Fit on train, choose on val, score test."""
    parts = {name: index.split(name) for name in SPLITS}
    y = {name: torch.from_numpy(part.labels) for name, part in parts.items()}
    probe = fit_probe(x["train"], y["train"], x["val"], y["val"])
    positives = parts["train"].labels.sum(axis=0)
    usable = (positives > 0) & (positives < len(parts["train"]))
    # Rounded, so that images with equal features tie, which the last bits of a matrix product may deny them.
    return Scored(parts["test"], probe.scores(x["test"]).numpy().round(9), usable, probe.penalty)


def score_backbone(index: ChestIndex, weights: Path | None, image_size: int, seed: int = 0) -> Scored:
    """Frozen features of a weights file (None: untrained, from ``seed``) through the probe."""
    backbone = load_backbone(weights, seed)
    return probe_scores(index, {name: extract(backbone, index.split(name), image_size).x for name in SPLITS})


def score_metadata(index: ChestIndex) -> Scored | None:
    """The same probe on the source of each image and no pixel: what confounding alone is worth."""
    if index.sources is None:
        return None
    names = np.unique(index.sources)
    columns: dict[str, Tensor] = {}
    for name in SPLITS:
        sources = index.split(name).sources
        assert sources is not None
        columns[name] = torch.from_numpy((sources[:, None] == names[None]).astype(np.float64))
    return probe_scores(index, columns)


def summarise(scored: Scored, draws: int) -> dict[str, Any]:
    """All figures of one probe, ready for JSON."""
    weights = patient_draws(scored.test.patients, draws)
    figures: dict[str, Any] = {"images": len(scored.test), "penalty": scored.penalty}
    for key, within in (("raw", False), ("within_source", True)):
        if within and scored.test.sources is None:
            continue
        estimate = Estimate.of(scored.macro(within)[0], scored.macro(within, weights))
        per_class = scored.per_class(within)
        figures[key] = {"macro": dataclasses.asdict(estimate), "classes": len(per_class), "per_class": per_class}
    return figures


def main(config: EvaluateConfig) -> None:
    """The ``evaluate`` command."""
    if (config.run is None) != config.untrained:
        raise SystemExit("give either --run FOLDER or --untrained")
    weights, image_size = config.run, config.image_size
    val_fraction, split_seed = config.val_fraction, config.split_seed
    if weights is not None and weights.is_dir():
        saved = json.loads((weights / "config.json").read_text())
        image_size = image_size or saved["image_size"]
        val_fraction, split_seed = saved["val_fraction"], saved["split_seed"]
        weights = weights / BACKBONE
    if weights is not None and not weights.is_file():
        raise SystemExit(f"{weights} does not exist: has the run finished?")
    console = Console()
    index = read_index(config.data, val_fraction, split_seed)
    image_size = image_size or 224
    with console.status("features and probe"):
        figures = summarise(score_backbone(index, weights, image_size, config.seed), config.draws)
        if metadata := score_metadata(index):
            figures["metadata_only"] = summarise(metadata, config.draws)
    console.print(figures_table(figures, f"Frozen linear evaluation, {figures['images']} test images"))
    if config.json:
        what = "untrained" if config.untrained else str(config.run)
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps({"weights": what, "image_size": image_size, **figures}, indent=2) + "\n")


def figures_table(figures: dict[str, Any], title: str) -> Table:
    """AUCs per class and on average; within-source figures beside the raw ones where sources are known."""
    kinds = [key for key in ("raw", "within_source") if key in figures]
    table = Table("class", *(f"AUC {kind.replace('_', '-')}" for kind in kinds), title=title)
    for name in figures["raw"]["per_class"]:
        table.add_row(name, *(f"{figures[k]['per_class'].get(name, float('nan')):.3f}" for k in kinds))
    table.add_section()

    def interval(part: dict[str, Any]) -> str:
        return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**part["macro"])

    table.add_row("macro", *(interval(figures[k]) for k in kinds))
    if meta := figures.get("metadata_only"):
        table.add_row("macro, source alone (no pixels)", *(interval(meta[k]) for k in kinds))
    return table
