"""The weights that a downstream task starts from: a pretraining run's, random ones, or ImageNet's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.index import ChestIndex, open_index, with_all_splits
from ..errors import CommandError
from ..pretraining.network import Backbone, load_backbone, read_weights, start_from_imagenet, stem_of
from ..pretraining.settings import CONFIG, Stem, check_imagenet, file_sha256
from ..pretraining.trainer import BACKBONE
from .arms import SUP1, SUP2, arm_of
from .settings import StartConfig

#: Size of an image if neither an option nor a run says another.
IMAGE_SIZE = 224


@dataclass(frozen=True)
class Start:
    """A resolved :class:`StartConfig`: the data set to work on, and the weights to start from."""

    arm: str
    """The row of the report, as records name it."""
    dataset: str
    image_size: int
    val_fraction: float
    split_seed: int
    data: Path
    weights: Path | None = None
    imagenet: bool = False
    imagenet_weights: Path | None = None
    """File of ImageNet's weights. Unset: they are downloaded."""
    stem: Stem = "standard"
    pretraining: dict[str, Any] = field(default_factory=dict)
    """The run's config.json; empty where there is none."""
    seed: int | None = None
    """Seed of random weights. Unset: each task draws weights from its own seed."""
    make_weights: Callable[[], object] | None = None
    """What :meth:`ensure_weights` calls. Unset: the weights are there."""
    title: str = ""
    """How the report prints the arm, where the paper has no name for it."""

    def index(self) -> ChestIndex:
        """The data set, with all three splits."""
        return with_all_splits(open_index(self.data, self.val_fraction, self.split_seed))

    def ensure_weights(self) -> None:
        """Make the weights if they are not there, which in a comparison may be hours of pretraining.

        A stage calls this once it knows that its record has to be made, before the first call of :meth:`backbone`.
        """
        if self.make_weights is not None:
            self.make_weights()

    def backbone(self, seed: int) -> Backbone:
        """A new backbone with the starting weights; ``seed`` draws them if they are random."""
        backbone = load_backbone(self.weights, seed if self.seed is None else self.seed, self.stem)
        if self.imagenet:
            start_from_imagenet(backbone, self.imagenet_weights)
        return backbone

    @property
    def random(self) -> bool:
        """Whether the weights differ between the seeds of tasks."""
        return self.weights is None and not self.imagenet and self.seed is None

    @property
    def shown(self) -> str:
        """What lines on the screen call it."""
        return "untrained" if self.arm == SUP1 else self.arm

    def identity(self) -> dict[str, Any]:
        """The part of a record's identity that the start decides.

        A pretraining run is identified by its configuration, so that its records stay current when its weights are
        deleted. A weights file without a run is identified by its bytes, and so is one of ImageNet's weights. The
        standard stem is not named, so that records from before there were others stay current.
        """
        if self.imagenet:
            file = self.imagenet_weights
            start = "imagenet" if file is None else f"imagenet, sha256 {file_sha256(file)}"
        elif self.weights is None:
            start = "untrained" if self.seed is None else f"untrained, seed {self.seed}"
        elif self.pretraining:
            start = "run " + _digest(json.dumps(self.pretraining, sort_keys=True).encode())
        else:
            start = _digest(self.weights.read_bytes())
        stem = {} if self.stem == "standard" else {"stem": self.stem}
        return {"start": start, "image_size": self.image_size, **stem}

    def labels(self) -> dict[str, Any]:
        """The keys of a record that say whose it is: the report groups by these."""
        labels = {"arm": self.arm, "dataset": self.dataset, "pretraining": self.pretraining}
        return {**labels, "title": self.title} if self.title else labels


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def run_folder(run: Path | None) -> Path | None:
    """The run folder, if ``run`` is one or is the backbone in one; else None."""
    if run is not None and run.name == BACKBONE and (run.parent / CONFIG).is_file():
        return run.parent
    return run if run is not None and run.is_dir() else None


def default_out(run: Path | None, start: Start) -> Path:
    """Where the records go if no ``--out`` is given: into the run folder, else into ``runs/ARM-DATASET``.

    The latter has a digest of the bytes for a weights file, as two such files may have the same name.
    """
    if folder := run_folder(run):
        return folder / "evaluate" / start.dataset
    arm = start.arm if start.weights is None else f"{start.arm}-{start.identity()['start'][:8]}"
    return Path("runs") / f"{arm}-{start.dataset}"


def _stem(config: StartConfig, weights: Path | None, saved: dict[str, Any]) -> Stem:
    """The stem of the weights, or the one that was named, which must not contradict them."""
    if weights is None:
        return config.stem or "standard"
    shown: Stem = saved.get("stem", "standard") if saved else stem_of(read_weights(weights))
    if config.stem in (None, shown) or (not saved and {config.stem, shown} == {"no-pool", "standard"}):
        return config.stem or shown
    raise CommandError(f"--stem {config.stem}: {weights} has the stem {shown!r}")


def resolve(config: StartConfig) -> Start:
    """Check the options and fill in what the run's configuration says."""
    if (config.run is not None) + config.untrained + config.imagenet != 1:
        raise CommandError("give one of --run FOLDER, --untrained and --imagenet")
    check_imagenet("--imagenet", config.imagenet, config.imagenet_weights, config.stem)
    weights, saved = config.run, {}
    if folder := run_folder(config.run):
        if not (folder / CONFIG).is_file():
            raise CommandError(f"{folder} is no run folder: it holds no {CONFIG}")
        saved = json.loads((folder / CONFIG).read_text())
        weights = folder / BACKBONE
    if weights is not None and not weights.is_file():
        raise CommandError(f"{weights} does not exist: has the run finished?")
    arm = SUP1 if config.untrained else SUP2
    if weights is not None:
        arm = arm_of(saved) if saved else weights.stem
    return Start(
        arm=config.arm or arm,
        dataset=config.dataset or config.data.resolve().name,
        image_size=config.image_size or saved.get("image_size", IMAGE_SIZE),
        val_fraction=saved.get("val_fraction") or config.val_fraction,  # something must choose the model
        split_seed=saved.get("split_seed", config.split_seed),
        data=config.data,
        weights=weights,
        imagenet=config.imagenet,
        imagenet_weights=config.imagenet_weights,
        stem=_stem(config, weights, saved),
        pretraining=saved,
    )
