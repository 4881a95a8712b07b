"""Options of the downstream commands. This module imports neither PyTorch nor anything else that takes long."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..data.fractions import check_fractions, check_seeds, default_seeds
from ..pretraining.settings import Stem

#: Smallest batch: fewer images are repeated (each differently augmented), as batch norm wants several.
MIN_BATCH = 16
Protocol = Literal["linear", "neighbours", "finetune"]


@dataclass(frozen=True)
class TrainConfig:
    """AdamW, a tenth of the steps to warm up, a cosine to zero; the best of ``checks`` looks at validation is kept."""

    lr: float = 1e-4
    weight_decay: float = 1e-2
    batch_size: int = 64
    epochs: int = 30
    """Passes over the labelled images ..."""
    min_steps: int = 300
    """... but at least so many steps, as a small label fraction has one per epoch ..."""
    max_steps: int | None = None
    """... and at most so many, to bound the time."""
    checks: int = 10

    def batch(self, count: int) -> int:
        return min(self.batch_size, max(count, MIN_BATCH))

    def steps(self, count: int) -> int:
        steps = max(self.epochs * math.ceil(count / self.batch(count)), self.min_steps)
        return steps if self.max_steps is None else min(steps, self.max_steps)


@dataclass(frozen=True)
class StartConfig:
    """What every downstream command is told about its data and its backbone."""

    data: Path
    """Prepared data set, or a folder in the layout of NIH ChestX-ray14."""
    run: Path | None = None
    """Run folder of ``pretrain`` (or the ``backbone.pth`` in it), or a ResNet18 weights file under torchvision's
    names."""
    untrained: bool = False
    """Start from random weights instead: the paper's Sup.1, and the floor. The seed draws them."""
    imagenet: bool = False
    """Start from torchvision's ImageNet weights instead (downloaded once): the paper's Sup.2."""
    imagenet_weights: Path | None = None
    """File with these weights, for --imagenet without a download."""
    arm: str | None = None
    """Row of the report; unset: the run's method (and what OPTiML went without), or sup1, sup2."""
    dataset: str | None = None
    """Column of the report; one that begins with nih, vinbig, rsna or siim (``nih``, ``nih-cxr-dev``) stands beside
    the paper's. Unset: the folder's name."""
    image_size: int | None = None
    """Unset: the run's; 224 where there is none."""
    stem: Stem | None = None
    """First layers of the network, see ``pretrain``. Unset: the run's; what the first convolution of a weights file
    shows ("no-pool" does not show there); else "standard"."""
    val_fraction: float = 0.14
    """Must be the pretraining's, else it may have seen validation images; read from the run when there is one that
    held patients out."""
    split_seed: int = 0


@dataclass(frozen=True)
class EvaluateConfig(StartConfig):
    """Score a backbone by test AUC: frozen with a linear probe, or fine-tuned. What is there is not made again."""

    protocol: Protocol = "linear"
    """linear: frozen features, logistic regression. neighbours: frozen features, a vote of the nearest labelled films.
    finetune: backbone and classifier together."""
    fractions: tuple[float, ...] = (1.0,)
    """Shares of the training images whose labels may be used, e.g. 0.01 0.1 1.0."""
    seeds: tuple[int, ...] | None = None
    """Each draws its own patients; with --untrained also its own weights. Unset: 0 to 4 for fractions below a tenth,
    where a few patients decide, 0 to 2 for others."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How to fine-tune."""
    keep: tuple[float, ...] | None = None
    """Fractions whose fine-tuned networks are kept for the heatmaps (45 MB each). Unset: 0.01 where the data set has
    boxes, which heatmaps need, else none."""
    draws: int = 1000
    """Bootstrap replicates."""
    out: Path | None = None
    """Folder of records, scores and ids; unset: ``evaluate`` in the run folder, else ``runs/ARM-DATASET`` (of weights
    from elsewhere with a digest)."""
    json: Path | None = None
    """Also write all figures here, ``macro_auc`` (of the largest fraction, mean over seeds) among them."""

    def __post_init__(self) -> None:
        check_fractions("fractions", self.fractions)
        if self.seeds is not None:
            check_seeds("seeds", self.seeds)

    def seeds_of(self, fraction: float) -> tuple[int, ...]:
        """The seeds that were named, or the usual ones."""
        return default_seeds(fraction) if self.seeds is None else self.seeds


@dataclass(frozen=True)
class SegmentConfig(StartConfig):
    """Train a U-Net on a finding's outlines, or on lung masks, from a backbone; Dice in three conventions."""

    label: str = "Pneumothorax"
    """What to outline: a finding, or whatever else the data set has masks of, such as Lung."""
    fractions: tuple[float, ...] = (1.0,)
    """Shares of the training images whose outlines may be used."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Decoder's weights, order and patients; with --untrained also the encoder's weights."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=1e-3, batch_size=16))
    draws: int = 1000
    """Bootstrap replicates."""
    out: Path | None = None
    """Folder of records; unset: as for ``evaluate``."""

    def __post_init__(self) -> None:
        check_fractions("fractions", self.fractions)
        check_seeds("seeds", self.seeds)


@dataclass(frozen=True)
class HeatmapConfig(StartConfig):
    """Grad-CAM of the networks that ``evaluate --protocol finetune`` kept, against the data set's boxes."""

    fraction: float = 0.01
    """Label fraction of the fine-tuned networks; the paper's figure has 1 %."""
    seeds: tuple[int, ...] = (0,)
    split: Literal["train", "val", "test"] = "test"
    """Only films of this split: no network has seen them."""
    figure_images: int = 6
    """Films kept for the report's figure."""
    draws: int = 1000
    out: Path | None = None
    """Folder of ``evaluate``'s records, where the networks are; unset: as for ``evaluate``."""

    def __post_init__(self) -> None:
        check_fractions("fraction", (self.fraction,))
        check_seeds("seeds", self.seeds)
