"""How much a comparison spends: all sizes of all stages, under two names."""

from __future__ import annotations

from dataclasses import dataclass

from ..pretraining.settings import Precision


@dataclass(frozen=True)
class Budget:
    """All sizes, the same for every row; what is unset is as the named budget has it."""

    image_size: int | None = None
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
    """Shares of the labels, frozen and fine-tuned."""
    small_seeds: tuple[int, ...] | None = None
    """Label subsets of fractions below a tenth."""
    large_seeds: tuple[int, ...] | None = None
    """Of the other fractions; pretraining seeds add to the spread."""
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


BUDGETS = {
    "small": Budget(
        image_size=64, epochs=10, batch_size=64, queue=1024, key_momentum=0.99,
        fractions=(0.01, 0.1, 1.0), small_seeds=(0, 1, 2), large_seeds=(0,),
        heatmap_fractions=(0.01,), finetune_lr=1e-3, finetune_epochs=5, finetune_steps=60, segment_fractions=(1.0,),
        segment_seeds=(0,), unet_lr=1e-3, unet_epochs=3, unet_steps=60, checks=5, figure_images=6, draws=2000,
    ),
    "paper": Budget(
        image_size=224, epochs=300, batch_size=64, precision="32-true",
        fractions=(0.01, 0.1, 1.0), small_seeds=(0, 1, 2, 3, 4), large_seeds=(0, 1, 2),
        heatmap_fractions=(0.01,), finetune_lr=1e-4, finetune_epochs=30, finetune_steps=300, segment_fractions=(1.0,),
        segment_seeds=(0, 1, 2), unet_lr=1e-3, unet_epochs=30, unet_steps=300, checks=10, figure_images=6, draws=2000,
    ),
}  # fmt: skip
