"""Everything a run depends on, as dataclasses: they are the command line, and they are saved with the run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .methods import METHODS

#: Learning rate and weight decay belong together with LARS's trust coefficient, hence presets.
#: ``recommended``: chosen on the phantoms (see README), the same for every method; 0.3 at batch size 64.
#: ``paper``: the printed numbers, with the trust coefficient LARS is usually given. Weights hardly move.
PRESETS: dict[str, dict[str, float]] = {
    "recommended": {"base_lr": 1.2, "weight_decay": 1e-4, "trust": 0.02},
    "paper": {"base_lr": 3e-4 * 256 / 64, "weight_decay": 1e-4, "trust": 1e-3},
}


@dataclass(frozen=True)
class OptimConfig:
    """LARS with momentum, linear warm-up, then a cosine to a thousandth."""

    preset: Literal["recommended", "paper"] = "recommended"
    """Values for what is not set below."""
    lr: float | None = None
    """Learning rate as used; unset: the preset's base rate times batch size / 256."""
    weight_decay: float | None = None
    """Decay of weight matrices; biases and batch-norm parameters have none."""
    trust: float | None = None
    """LARS's trust coefficient."""
    momentum: float = 0.9
    warmup_epochs: int = 2
    """Epochs of linear warm-up, at most a fifth of all epochs."""

    def resolve(self, batch_size: int) -> OptimConfig:
        """Fill what is unset from the preset."""
        preset = PRESETS[self.preset]
        lr = preset["base_lr"] * batch_size / 256 if self.lr is None else self.lr
        decay = preset["weight_decay"] if self.weight_decay is None else self.weight_decay
        trust = preset["trust"] if self.trust is None else self.trust
        return dataclasses.replace(self, lr=lr, weight_decay=decay, trust=trust)


@dataclass(frozen=True)
class ExpanderConfig:
    """The MLP that turns pooled features into the embeddings which variance and covariance act on."""

    dim: int = 2048
    layers: int = 3
    last_act: bool = False
    """Batch norm and ReLU also after the last layer (the paper's sentence read literally)."""


@dataclass(frozen=True)
class AugmentConfig:
    """VICReg's two asymmetric views."""

    min_scale: float = 0.08
    """Smallest share of the image a crop may show. Small crops can miss the lesion."""
    hflip: float = 0.5
    """Probability of a mirror image. It moves the heart to the wrong side; 0 keeps it."""


if TYPE_CHECKING:
    MethodOptions = Any
else:
    # One field per entry of the table of methods: adding a method adds its options to the command line.
    MethodOptions = dataclasses.make_dataclass(
        "MethodOptions",
        [(name, m.Options, field(default_factory=m.Options)) for name, m in METHODS.items()],
        frozen=True,
    )
    MethodOptions.__doc__ = "Options of each method; only those of the chosen method count."


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a ResNet18 without labels on the training split; resumes when the run folder exists."""

    data: Path
    """Folder in the layout of NIH ChestX-ray14."""
    out: Path
    """Run folder: config.json, metrics.csv, last.ckpt and finally backbone.pth."""
    method: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(METHODS) + "}")] = "optiml"
    epochs: int = 300
    batch_size: int = 64
    image_size: int = 224
    """Width and height of a view in pixels."""
    seed: int = 0
    """Fixes initial weights, order and augmentation."""
    val_fraction: float = 0.14
    """Share of patients of the train/validation list held out (never pretrained on)."""
    split_seed: int = 0
    """Fixes which patients those are."""
    options: Annotated[MethodOptions, tyro.conf.arg(name="")] = field(default_factory=lambda: MethodOptions())
    optim: OptimConfig = OptimConfig()
    expander: ExpanderConfig = ExpanderConfig()
    augment: AugmentConfig = AugmentConfig()
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accelerator: str = "auto"
    workers: int = 0
    """Processes that prepare views; 0 prepares them in the training process."""
    stop_after: int | None = None
    """Stop after this epoch as if interrupted (for time limits); the same command goes on."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")

    def identity(self) -> dict[str, Any]:
        """What the result depends on. Two runs with equal identity are the same run."""
        known = dataclasses.asdict(dataclasses.replace(self, optim=self.optim.resolve(self.batch_size)))
        for name in ("data", "out", "workers", "stop_after", "accelerator"):
            known.pop(name)
        known["options"] = known["options"][self.method]
        return json.loads(json.dumps(known))  # as it will be read back


def claim_run_folder(config: PretrainConfig, fingerprint: str) -> None:
    """Write ``config.json``, or make sure that the one which is there says the same."""
    path = config.out / "config.json"
    mine = {**config.identity(), "data_fingerprint": fingerprint}
    if path.exists():
        theirs = json.loads(path.read_text())
        changed = [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]
        if changed:
            detail = "; ".join(f"{key}: {theirs.get(key)} there, {mine.get(key)} now" for key in sorted(changed))
            raise SystemExit(f"{config.out} holds a different run ({detail}). Choose another --out or delete it.")
        return
    if config.out.exists() and any(config.out.iterdir()):
        raise SystemExit(f"{config.out} is not empty and holds no config.json. Choose another --out.")
    config.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=2) + "\n")
