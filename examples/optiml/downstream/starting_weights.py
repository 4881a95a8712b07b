"""Where a downstream task starts from: a pretraining run, an untrained network, or ImageNet's weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.index import ChestIndex, open_index, with_all_splits
from ..pretraining.network import Backbone, imagenet_weights, load_backbone
from ..pretraining.settings import CONFIG
from ..pretraining.trainer import BACKBONE
from .arms import SUP1, SUP2, arm_of
from .settings import StartConfig

#: Size of a view where no run says otherwise.
IMAGE_SIZE = 224


@dataclass(frozen=True)
class Start:
    """A resolved :class:`StartConfig`: the index, and how to make the backbone."""

    arm: str
    dataset: str
    image_size: int
    val_fraction: float
    split_seed: int
    data: Path
    weights: Path | None = None
    imagenet: bool = False
    pretraining: dict[str, Any] = field(default_factory=dict)
    """The run's config.json; empty where there is none."""
    seed: int | None = None
    """Draws random weights; unset: the seed of each task does."""
    make: Callable[[], object] | None = None
    """Called before the weights are used for the first time, to see to it that they are there."""
    title: str = ""
    """The row's name in the report, where the paper has none."""

    def index(self) -> ChestIndex:
        return with_all_splits(open_index(self.data, self.val_fraction, self.split_seed))

    def backbone(self, seed: int) -> Backbone:
        """A fresh backbone; ``seed`` matters only where the weights are random."""
        if self.make is not None:
            self.make()
        backbone = load_backbone(self.weights, seed if self.seed is None else self.seed)
        if self.imagenet:
            backbone.load_state_dict(imagenet_weights())
        return backbone

    @property
    def random(self) -> bool:
        """Whether each task's seed gives other weights."""
        return self.weights is None and not self.imagenet and self.seed is None

    def identity(self) -> dict[str, Any]:
        """What the start contributes to a result.

        A run counts by what it depends on, not by its weights, so that its results are known without them; a file
        from elsewhere by its bytes.
        """
        if self.weights is None:
            drawn = "untrained" if self.seed is None else f"untrained, seed {self.seed}"
            start = "imagenet" if self.imagenet else drawn
        elif self.pretraining:
            start = "run " + _digest(json.dumps(self.pretraining, sort_keys=True).encode())
        else:
            start = _digest(self.weights.read_bytes())
        return {"start": start, "image_size": self.image_size}

    def labels(self) -> dict[str, Any]:
        """How the report finds a record of this start, and what it compares before it averages over several."""
        known = {"arm": self.arm, "dataset": self.dataset, "pretraining": self.pretraining}
        return {**known, "title": self.title} if self.title else known


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def run_folder(run: Path | None) -> Path | None:
    """The run folder that is meant: given as such, or by the backbone in it."""
    if run is not None and run.name == BACKBONE and (run.parent / CONFIG).is_file():
        return run.parent
    return run if run is not None and run.is_dir() else None


def default_out(run: Path | None, start: Start) -> Path:
    """Beside the run where there is a run folder; the data set's name keeps several sets apart.

    Weights from elsewhere by their bytes too, as many a file has the same name.
    """
    if folder := run_folder(run):
        return folder / "evaluate" / start.dataset
    arm = start.arm if start.weights is None else f"{start.arm}-{start.identity()['start'][:8]}"
    return Path("runs") / f"{arm}-{start.dataset}"


def resolve(config: StartConfig) -> Start:
    """Check what was asked for and fill in what the run knows."""
    if (config.run is not None) + config.untrained + config.imagenet != 1:
        raise SystemExit("give one of --run FOLDER, --untrained and --imagenet")
    weights, saved = config.run, {}
    if folder := run_folder(config.run):
        if not (folder / CONFIG).is_file():
            raise SystemExit(f"{folder} is no run folder: it holds no {CONFIG}")
        saved = json.loads((folder / CONFIG).read_text())
        weights = folder / BACKBONE
    if weights is not None and not weights.is_file():
        raise SystemExit(f"{weights} does not exist: has the run finished?")
    default = SUP1 if config.untrained else SUP2
    if weights is not None:
        default = arm_of(saved) if saved else weights.stem
    return Start(
        arm=config.arm or default,
        dataset=config.dataset or config.data.resolve().name,
        image_size=config.image_size or saved.get("image_size", IMAGE_SIZE),
        val_fraction=saved.get("val_fraction") or config.val_fraction,  # something must choose the model
        split_seed=saved.get("split_seed", config.split_seed),
        data=config.data,
        weights=weights,
        imagenet=config.imagenet,
        pretraining=saved,
    )
