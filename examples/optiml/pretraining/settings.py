"""Everything a run depends on, as dataclasses: they are the command line, and they are saved with the run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..errors import CommandError
from .methods import METHODS

#: What a run is, in its folder.
CONFIG = "config.json"
#: The exit code that shells give to Ctrl-C.
INTERRUPTED = 130

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Norm = Literal["batch", "group", "frozen"]
Stem = Literal["standard", "no-pool", "small"]

#: What fills fields that were not set on the command line, and why (FAITHFULNESS.md has the whole story); a method may
#: mean something else by a preset (``presets`` of its options).
#: ``recommended``: what was settled on after short runs (SELECTION.md says what it is worth), among it marginals that
#: cannot collapse.
#: ``paper``: the sentences of the paper taken literally, with the trust coefficient LARS is usually given. Weights
#: hardly move under it, and the marginals collapse.
#: ``official``: each baseline as its own authors train it; for OPTiML, of which there is no code, the paper's.
#: Learning rates are for 64 images per batch and scale with it.
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {
        "optim.optimizer": "adamw",
        "optim.lr": 1e-3,
        "optim.weight_decay": 1e-4,
        "optim.trust": 0.02,
        "optim.warmup_epochs": 2,
        "augment.min_scale": 0.6,
        "expander.last_act": False,
        "options.optiml.marginals": "perplexity",
        "options.optiml.invariance": 25.0,
    },
    "paper": {
        "optim.optimizer": "lars",
        "optim.lr": 3e-4,
        "optim.weight_decay": 1e-4,
        "optim.trust": 1e-3,
        "optim.warmup_epochs": 2,
        "augment.min_scale": 0.08,
        "expander.last_act": True,
        "options.optiml.marginals": "learned",
        "options.optiml.invariance": 0.0,
    },
}
PRESETS["official"] = PRESETS["paper"]


@dataclass(frozen=True)
class OptimConfig:
    """Warm-up, then a cosine to a thousandth. SGD decays every parameter, as its users do, the others matrices only."""

    optimizer: Literal["adamw", "lars", "sgd"] | None = None
    """Another than the preset's needs a learning rate of its own. Unset: the preset's."""
    lr: float | None = None
    """Learning rate as used; unset: the preset's, times batch size / 64."""
    weight_decay: float | None = None
    """Decay of weight matrices; biases and batch-norm parameters have it under SGD only. Unset: the preset's."""
    trust: float | None = None
    """LARS's trust coefficient. Unset: the preset's."""
    momentum: float = 0.9
    """Under AdamW its first beta; the second is 0.999."""
    warmup_epochs: int | None = None
    """Epochs of linear warm-up, at most a fifth of all epochs. Unset: the preset's."""


@dataclass(frozen=True)
class ExpanderConfig:
    """The MLP that turns pooled features into the embeddings which variance and covariance act on."""

    dim: int = 2048
    layers: int = 3
    last_act: bool | None = None
    """Batch norm and ReLU also after the last layer (the paper's sentence read literally). Unset: the preset's."""


@dataclass(frozen=True)
class AugmentConfig:
    """The views; which ones, is the method's."""

    min_scale: float | None = None
    """Smallest share of the image a crop may show. Small crops can miss the lesion. Unset: the preset's."""
    hflip: float = 0.5
    """Probability of a mirror image. It moves the heart to the wrong side; 0 keeps it."""


@dataclass(frozen=True)
class MonitorConfig:
    """What is measured with labels while training goes on without them. It changes nothing in the training."""

    every: int = 10
    """Epochs between measurements, which also follow the last epoch; 0: none."""
    images: int = 2000
    """At most so many training images to look neighbours up in, and so many validation images to classify."""
    neighbours: int = 20
    temperature: float = 0.1
    """A neighbour counts exp(cosine / temperature)."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.images < 1 or self.neighbours < 1 or not self.temperature > 0:
            raise ValueError(f"monitor must have every at least 0 and all else positive, not {self}")


if TYPE_CHECKING:
    MethodOptions = Any
else:
    # One field per entry of the table of methods: adding a method adds its options to the command line.
    MethodOptions = dataclasses.make_dataclass(
        "MethodOptions",
        [(name, entry.options, field(default_factory=entry.options)) for name, entry in METHODS.items()],
        frozen=True,
    )
    MethodOptions.__doc__ = "Options of each method; only those of the chosen method count."


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a ResNet18 without labels on the training split; resumes when the run folder exists."""

    data: Path
    """Folder of images with their index, as ``prepare`` writes it."""
    out: Path
    """Run folder: config.json, metrics.csv, monitor.csv, last.ckpt, and finally backbone.pth and MODEL_CARD.md in place
    of last.ckpt."""
    method: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(METHODS) + "}")] = "optiml"
    preset: Literal["recommended", "paper", "official"] = "recommended"
    """Values for what is not set: "recommended" trains; "paper" is all as printed (with --all-images: its images);
    "official" is each baseline as its authors train it."""
    epochs: int = 300
    batch_size: int = 64
    """Images per step, of all processes together."""
    image_size: int = 224
    """Width and height of a view in pixels."""
    seed: int = 0
    """Fixes initial weights, order and augmentation."""
    all_images: bool = False
    """Pretrain on validation and test images too, as the paper says it did: scores on them are then transductive."""
    val_fraction: float = 0.14
    """Share of patients of the train/validation list held out (never pretrained on)."""
    split_seed: int = 0
    """Fixes which patients those are."""
    init: Literal["random", "imagenet"] = "random"
    """First weights of the backbone; "imagenet" downloads torchvision's, or reads them from --imagenet-weights."""
    imagenet_weights: Path | None = None
    """File with ImageNet's weights of a ResNet18, for --init imagenet without a download."""
    stem: Stem = "standard"
    """The first layers. "standard": ResNet18's, a 7 x 7 convolution of stride 2 and max-pooling; the last maps of 64 px
    are 2 x 2. "no-pool": without the pooling (4 x 4). "small": a 3 x 3 convolution of stride 1 and no pooling (8 x 8),
    as SimCLR for CIFAR."""
    norm: Norm = "batch"
    """Normalisation; "batch" is synchronised between GPUs. CPUs cannot do that: several need "group" or "frozen"."""
    options: Annotated[MethodOptions, tyro.conf.arg(name="")] = field(default_factory=lambda: MethodOptions())
    optim: OptimConfig = OptimConfig()
    expander: ExpanderConfig = ExpanderConfig()
    augment: AugmentConfig = AugmentConfig()
    monitor: MonitorConfig = MonitorConfig()
    precision: Precision = "32-true"
    accelerator: str = "auto"
    workers: int = 0
    """Processes that prepare views, for each training process; 0 prepares them in that process."""
    tensorboard: bool = False
    """Also write events for TensorBoard."""
    keep_checkpoint: bool = False
    """Keep last.ckpt (about 130 MB) when the run is finished; nothing here needs it then."""
    stop_after: int | None = None
    """Stop after this epoch as if interrupted (for time limits); the same command goes on."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        for name in ("epochs", "batch_size", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def resolve(self) -> PretrainConfig:
        """With every unset field filled from the preset."""
        self._check()
        filled = self
        values = {**PRESETS[self.preset], **METHODS[self.method].presets.get(self.preset, {})}
        usual = values["optim.optimizer"]
        if self.optim.lr is None and self.optim.optimizer not in (None, usual):
            raise CommandError(
                f"--optim.optimizer {self.optim.optimizer} needs --optim.lr; the preset's is for {usual}"
            )
        for path, value in values.items():
            value = value * self.batch_size / 64 if path == "optim.lr" else value
            filled = _fill(filled, path.split("."), value)
        return filled

    def _check(self) -> None:
        """End the command for settings that cannot work, whatever the data."""
        optim, expander = self.optim, self.expander
        rules = {
            f"--batch-size {self.batch_size}: the losses compare films, so a batch needs 2 at least": self.batch_size
            > 1,
            f"--workers {self.workers}: 0 or more processes": self.workers >= 0,
            f"--seed {self.seed}: a whole number from 0 up": self.seed >= 0,
            f"--val-fraction {self.val_fraction}: a share, from 0 to below 1": 0 <= self.val_fraction < 1,
            f"--stop-after {self.stop_after}: an epoch, 1 or later": self.stop_after is None or self.stop_after >= 1,
            f"--augment.hflip {self.augment.hflip}: a probability, from 0 to 1": 0 <= self.augment.hflip <= 1,
            f"--augment.min-scale {self.augment.min_scale}: a share, above 0 and at most 1": (
                self.augment.min_scale is None or 0 < self.augment.min_scale <= 1
            ),
            f"--expander.dim {expander.dim}, --expander.layers {expander.layers}: 1 or more of each": (
                min(expander.dim, expander.layers) >= 1
            ),
            f"--optim.momentum {optim.momentum}: from 0 to below 1": 0 <= optim.momentum < 1,
        }
        for name in ("lr", "weight_decay", "trust", "warmup_epochs"):
            value = getattr(optim, name)
            flag = f"--optim.{name.replace('_', '-')} {value}: a number from 0 up"
            rules[flag] = value is None or 0 <= value < math.inf
        if broken := next((rule for rule, holds in rules.items() if not holds), None):
            raise CommandError(broken)
        check_imagenet("--init imagenet", self.init == "imagenet", self.imagenet_weights, self.stem)

    def identity(self) -> dict[str, Any]:
        """What the result depends on. Two runs with equal identity are the same run."""
        known = dataclasses.asdict(self.resolve())
        for name in (
            "data",
            "out",
            "workers",
            "stop_after",
            "accelerator",
            "monitor",
            "tensorboard",
            "keep_checkpoint",
            "imagenet_weights",
        ):
            known.pop(name)
        known["options"] = known["options"][self.method]
        if self.imagenet_weights is not None:
            known["imagenet_sha256"] = file_sha256(self.imagenet_weights)
        # Not named, so that a run from before there were others is the same run.
        if self.stem == "standard":
            known.pop("stem")
        if known["options"].get("near") == 0:
            known["options"].pop("near")
        return json.loads(json.dumps(known))  # as it will be read back

    def key(self) -> str:
        """A short name of the identity, for a run folder that no other run can claim."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:8]


def check_imagenet(flag: str, wanted: bool, file: Path | None, stem: Stem | None) -> None:
    """End the command where ImageNet's weights, which ``flag`` asks for, are not there or do not fit the stem."""
    if file is not None and not wanted:
        raise CommandError(f"--imagenet-weights {file}: only with {flag}")
    if file is not None and not file.is_file():
        raise CommandError(f"--imagenet-weights {file}: there is no such file")
    if wanted and stem == "small":
        raise CommandError(
            f"{flag}, --stem small: ImageNet's first convolution is 7 x 7, this stem's 3 x 3; take --stem no-pool"
        )


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _fill(node: Any, path: list[str], value: Any) -> Any:
    """``node`` with the field at ``path`` set, where it was ``None``."""
    name, *rest = path
    child = getattr(node, name)
    if rest or child is None:
        return dataclasses.replace(node, **{name: _fill(child, rest, value) if rest else value})
    return node
