"""How much the stages compute: one set of sizes, two named budgets, and the flags of ``compare`` that change them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, TypeVar

import tyro

from ..data.fractions import LARGE_SEEDS, SMALL, SMALL_SEEDS, check_fractions, check_seeds
from ..downstream.settings import TrainConfig
from ..pretraining.settings import Precision, Stem


@dataclass(frozen=True)
class Sizes:
    """The sizes of all stages: pretraining, evaluation, heatmaps, segmentation. The defaults are those of ``xray``."""

    epochs: int = 10
    """Of the pretraining."""
    batch_size: int = 64
    """Films of a step of the pretraining; at most as many as there are training films."""
    image_size: int | None = None
    """Unset: that of the first ``run``, or 64."""
    stem: Stem | None = None
    """First layers of the networks, see ``pretrain``. Unset: that of the first ``run``, or "standard"."""
    min_scale: float | None = None
    """Smallest share of the film that a crop of the pretraining shows. Unset: the method's."""

    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Shares of the training labels to learn from."""
    small_seeds: Annotated[tuple[int, ...], tyro.conf.arg(name="seeds")] = SMALL_SEEDS
    """Label subsets to draw for fractions below a tenth, where few patients decide."""
    large_seeds: tuple[int, ...] = LARGE_SEEDS
    """Label subsets to draw for the other fractions."""
    finetune_seeds: tuple[int, ...] | None = None
    """Of ``large_seeds``, those that are also fine-tuned. Unset: all."""
    finetune_fractions: tuple[float, ...] | None = None
    """Of ``fractions``, those that are also fine-tuned; with no number after it, none. Unset: all."""
    neighbours: bool = True
    """Also score frozen features by a vote of the nearest training films, with all labels."""
    finetune: TrainConfig = field(default_factory=lambda: TrainConfig(lr=1e-3, epochs=5, min_steps=60, checks=5))
    """How to fine-tune; short runs want a larger learning rate than the 1e-4 of long ones."""
    heatmap_fractions: tuple[float, ...] = (0.01, 1.0)
    """Of ``fractions``, those whose networks' heatmaps are drawn; the paper's are of 1 %."""
    segment_fractions: tuple[float, ...] = (0.1, 1.0)
    segment_seeds: tuple[int, ...] = (0, 1, 2)
    segment_size: int | None = None
    """Unset: ``image_size``."""
    unet: TrainConfig = field(
        default_factory=lambda: TrainConfig(lr=1e-3, batch_size=16, epochs=3, min_steps=60, checks=5)
    )
    """How to train the U-Net."""
    figure_images: int = 6
    draws: int = 1000

    def check(self) -> None:
        """Raise a ValueError unless fractions and seeds are possible.

        Whoever holds the sizes calls this: tyro prints a ValueError as one line only where the command's own
        configuration raises it.
        """
        for name, least in (("epochs", 1), ("batch_size", 2), ("image_size", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        check_fractions("fractions", self.fractions)
        check_fractions("segment_fractions", self.segment_fractions)
        check_seeds("segment_seeds", self.segment_seeds)
        small, large = self.split_fractions()
        if small:
            check_seeds("seeds", self.small_seeds)
        if large:
            check_seeds("large_seeds", self.large_seeds)
        if self.finetune_seeds is not None:
            check_seeds("finetune_seeds", self.finetune_seeds)

    def tuned(self, fraction: float) -> bool:
        """Whether networks are also fine-tuned with this share of the labels."""
        return self.finetune_fractions is None or fraction in self.finetune_fractions

    def split_fractions(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The fractions that ``small_seeds`` serve, and those that ``large_seeds`` serve."""
        return tuple(f for f in self.fractions if f < SMALL), tuple(f for f in self.fractions if f >= SMALL)


@dataclass(frozen=True)
class Budget:
    """What a comparison spends on each row: the sizes, and settings of the pretraining that go with them."""

    sizes: Sizes
    queue: int | None = None
    """Keys in the queues of methods that have any; unset: each method's own."""
    key_momentum: float | None = None
    """Momentum of the key encoder of those; unset: each method's own."""
    precision: Precision | None = None
    """Of the pretraining; unset: the fastest of this machine."""


BUDGETS = {
    "small": Budget(
        Sizes(
            image_size=64, stem="standard", epochs=10, batch_size=64, fractions=(0.01, 0.1, 1.0), small_seeds=(0, 1, 2),
            large_seeds=(0,), finetune=TrainConfig(lr=1e-3, epochs=5, min_steps=60, checks=5),
            heatmap_fractions=(0.01,), segment_fractions=(1.0,), segment_seeds=(0,), neighbours=False,
            unet=TrainConfig(lr=1e-3, batch_size=16, epochs=3, min_steps=60, checks=5), figure_images=6, draws=2000,
        ),
        queue=1024, key_momentum=0.99,
    ),
    "paper": Budget(
        Sizes(
            image_size=224, stem="standard", epochs=300, batch_size=64, fractions=(0.01, 0.1, 1.0),
            small_seeds=(0, 1, 2, 3, 4), large_seeds=(0, 1, 2),
            finetune=TrainConfig(lr=1e-4, epochs=30, min_steps=300, checks=10),
            heatmap_fractions=(0.01,), segment_fractions=(1.0,), segment_seeds=(0, 1, 2), neighbours=False,
            unet=TrainConfig(lr=1e-3, batch_size=16, epochs=30, min_steps=300, checks=10), figure_images=6, draws=2000,
        ),
        precision="32-true",
    ),
}  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True)
class SizeFlags:
    """Flags of ``compare`` that replace sizes of the named budget. The budget's value stands where a flag is unset."""

    image_size: int | None = None
    stem: Stem | None = None
    """First layers of the networks, see ``pretrain``. Unset: "standard"."""
    epochs: int | None = None
    """Of pretraining."""
    batch_size: int | None = None
    min_scale: float | None = None
    """Smallest share of the film that a crop of the pretraining shows. Unset: each method's own."""
    queue: int | None = None
    """Keys in the queues of methods that have any. A film is its own negative while its last key is queued: always
    where there are more keys than films, else where it came late in one epoch and early in the next."""
    key_momentum: float | None = None
    """Share of its weights that the key encoder of those keeps; 0.999 hardly moves it in a few hundred steps."""
    precision: Precision | None = None
    """Of the pretraining. Unset: each budget's own; small takes bf16-mixed where the processor computes in it, else
    32-true. What is kept counts whatever it was made in, and goes on in that."""
    fractions: tuple[float, ...] | None = None
    """Shares of the labels."""
    small_seeds: tuple[int, ...] | None = None
    """Label subsets of fractions below a tenth."""
    large_seeds: tuple[int, ...] | None = None
    """Of the other fractions; pretraining seeds add to the spread."""
    neighbours: bool | None = None
    """Also score frozen features by a vote of the nearest training films, with all labels."""
    finetune_fractions: tuple[float, ...] | None = None
    """Of ``fractions``, those that are also fine-tuned; with no number after it, none. Unset: all."""
    heatmap_fractions: tuple[float, ...] | None = None
    finetune_lr: float | None = None
    finetune_epochs: int | None = None
    finetune_steps: int | None = None
    """At least so many."""
    finetune_max_steps: int | None = None
    segment_fractions: tuple[float, ...] | None = None
    segment_seeds: tuple[int, ...] | None = None
    unet_lr: float | None = None
    unet_epochs: int | None = None
    unet_steps: int | None = None
    unet_max_steps: int | None = None
    checks: int | None = None
    """Looks at validation while fine-tuning or segmenting."""
    figure_images: int | None = None
    draws: int | None = None
    """Bootstrap replicates."""

    def applied_to(self, budget: Budget) -> Budget:
        """The budget with the flags that are set."""
        usual = budget.sizes
        sizes = replace(
            usual,
            epochs=_first_set(self.epochs, usual.epochs),
            batch_size=_first_set(self.batch_size, usual.batch_size),
            image_size=_first_set(self.image_size, usual.image_size),
            stem=_first_set(self.stem, usual.stem),
            min_scale=_first_set(self.min_scale, usual.min_scale),
            fractions=_first_set(self.fractions, usual.fractions),
            small_seeds=_first_set(self.small_seeds, usual.small_seeds),
            large_seeds=_first_set(self.large_seeds, usual.large_seeds),
            neighbours=_first_set(self.neighbours, usual.neighbours),
            finetune_fractions=_first_set(self.finetune_fractions, usual.finetune_fractions),
            finetune=_training(
                usual.finetune, self.finetune_lr, self.finetune_epochs, self.finetune_steps, self.finetune_max_steps,
                self.checks,
            ),
            heatmap_fractions=_first_set(self.heatmap_fractions, usual.heatmap_fractions),
            segment_fractions=_first_set(self.segment_fractions, usual.segment_fractions),
            segment_seeds=_first_set(self.segment_seeds, usual.segment_seeds),
            unet=_training(
                usual.unet, self.unet_lr, self.unet_epochs, self.unet_steps, self.unet_max_steps, self.checks
            ),
            figure_images=_first_set(self.figure_images, usual.figure_images),
            draws=_first_set(self.draws, usual.draws),
        )  # fmt: skip
        return Budget(
            sizes,
            queue=_first_set(self.queue, budget.queue),
            key_momentum=_first_set(self.key_momentum, budget.key_momentum),
            precision=_first_set(self.precision, budget.precision),
        )


def _first_set(flag: T | None, usual: T) -> T:
    return usual if flag is None else flag


def _training(
    usual: TrainConfig, lr: float | None, epochs: int | None, steps: int | None, max_steps: int | None,
    checks: int | None,
) -> TrainConfig:  # fmt: skip
    return replace(
        usual,
        lr=_first_set(lr, usual.lr),
        epochs=_first_set(epochs, usual.epochs),
        min_steps=_first_set(steps, usual.min_steps),
        max_steps=_first_set(max_steps, usual.max_steps),
        checks=_first_set(checks, usual.checks),
    )
