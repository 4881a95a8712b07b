"""Options of each method, apart from the methods: the command line shows them without importing PyTorch.

A class attribute ``presets`` says what a preset means for this method where that differs from everybody's, by preset
and then by field, as in ``settings.PRESETS``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Presets = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class NoOptions:
    """Of a method that has none."""


@dataclass(frozen=True)
class OPTiMLOptions:
    """The loss; where the paper leaves a choice, see ``otloss.OPTiMLLoss``."""

    alpha: float = 0.6
    """Weight of the transport cost."""
    beta: float = 25.0
    """Weight of variance."""
    eta: float = 1.0
    """Weight of covariance."""
    eps: float = 0.05
    """Entropic regularisation of the transport."""
    match: Literal["channel", "position"] = "channel"
    """What is transported: channels (d x d, as printed) or positions (hw x hw)."""
    marginals: Literal["perplexity", "hardest", "learned", "detached", "uniform", "overlap"] | None = None
    """How CV-SIM sets the marginals; "learned" is as printed and is known to collapse, "hardest" raises the transport
    cost. Without CV-SIM: "uniform", or "overlap", by how much of a position's part of the film the other view shows.
    Unset: the preset's."""
    near: float = 0.0
    """What a pair of positions costs in addition for the squared distance, in widths of the film, between what they
    show."""
    perplexity: float = 0.5
    """Share of the points that the marginals are spread over, under the policies "perplexity" and "hardest"."""
    tokens: Literal["channel", "batch"] = "channel"
    """What CV-SIM attends over; under several processes "batch" is each process's share of the batch."""
    heads: int = 8
    """Heads of CV-SIM; the paper gives no number."""
    shared: bool = True
    """Whether R_s and R_t are one module."""
    gradient: Literal["implicit", "unroll", "none"] = "implicit"
    """How the transport is differentiated; "none" holds the plan fixed, and CV-SIM is then not trained."""
    objective: Literal["transport_cost", "value", "divergence", "matched"] = "transport_cost"
    """What L_OT is; "transport_cost" is as printed. "matched" is VICReg's invariance between what the plan matches, the
    mean over dimensions of <T, (z_i - z_j)^2> of the maps as they are; its marginals are uniform."""
    max_iter: int = 200
    """Sinkhorn iterations at most; images that converge earlier stop earlier."""
    invariance: float | None = None
    """Weight of the mean squared difference between the two views' embeddings. The paper has none, VICReg 25. Unset:
    the preset's."""
    dense: int = 0
    """Channels of a projection head at every position, whose maps are transported in place of the backbone's; variance
    and covariance over positions and images, weighted by beta and eta, are to keep them from collapsing. 0: the
    backbone's maps, as printed."""
    stage: Literal[3, 4] = 4
    """Stage of the ResNet whose maps these are: the last, or the one before, with four times as many positions."""

    def __post_init__(self) -> None:
        if self.dense < 0 or self.dense % self.heads:
            raise ValueError(f"dense must be a multiple of heads ({self.heads}), or 0, not {self.dense}")
        if self.near < 0:
            raise ValueError(f"near must be 0 or more, not {self.near}")
        placed = [flag for flag, on in (("near", self.near), ("marginals overlap", self.marginals == "overlap")) if on]
        if placed and self.match != "position":
            raise ValueError(f"{placed[0]} is for match position")
        taken = (
            self.marginals in ("uniform", "overlap") and self.gradient != "unroll" and self.objective != "divergence"
        )
        if self.solved_here and not (taken and (self.objective, self.gradient) != ("value", "none")):
            raise ValueError(
                f"{placed[0] if placed else 'objective matched'} takes marginals uniform or overlap, gradient implicit "
                "or none, and no objective divergence, nor value with gradient none"
            )

    @property
    def solved_here(self) -> bool:
        """Whether the method solves the transport itself, as ``otloss.OPTiMLLoss`` does not know this one."""
        return self.objective == "matched" or self.near > 0 or self.marginals == "overlap"


@dataclass(frozen=True)
class VICRegOptions:
    """Weights of the three terms, as in the official code (which halves variance, unlike its paper)."""

    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    presets: ClassVar[Presets] = {
        "official": {
            "optim.lr": 0.05,  # 0.2 for 256 images
            "optim.weight_decay": 1e-6,
            "optim.trust": 1e-3,
            "optim.warmup_epochs": 10,
            "expander.last_act": False,
        }
    }


@dataclass(frozen=True)
class SimCLROptions:
    """Temperature, and the widths of the projection head."""

    temperature: float = 0.1
    hidden: int = 512
    dim: int = 128
    presets: ClassVar[Presets] = {
        "official": {
            "optim.optimizer": "lars",
            "optim.lr": 0.075,  # 0.3 per 256 images
            "optim.weight_decay": 1e-6,
            "optim.trust": 1e-3,
            "optim.warmup_epochs": 10,
            "augment.min_scale": 0.08,
        }
    }


@dataclass(frozen=True)
class MoCoOptions:
    """Temperature, key encoder, queue, and the widths of the projection head."""

    temperature: float = 0.2
    momentum: float = 0.999
    """Share of its old weights that the key encoder keeps in each step."""
    queue: int = 65536
    """Keys kept as negatives, a multiple of the batch; more than there are images count an image against itself."""
    hidden: int = 512
    dim: int = 128
    presets: ClassVar[Presets] = {
        "official": {
            "optim.optimizer": "sgd",
            "optim.lr": 0.0075,  # 0.03 for 256 images
            "optim.weight_decay": 1e-4,
            "optim.warmup_epochs": 0,
            "augment.min_scale": 0.2,
        }
    }


@dataclass(frozen=True)
class DenseCLOptions(MoCoOptions):
    """MoCo's, for two heads and two queues alike, and the share of the dense loss."""

    dense: float = 0.5
    """Weight of the dense loss; the global one has the rest."""

    def __post_init__(self) -> None:
        if not 0 <= self.dense <= 1:
            raise ValueError(f"dense must lie in [0, 1], not {self.dense}")


@dataclass(frozen=True)
class BYOLOptions:
    """Target network, and the widths of projector and predictor."""

    momentum: float = 0.99
    """Share of its old weights that the target keeps in the first step; rises to 1 along a cosine."""
    hidden: int = 4096
    dim: int = 256
    presets: ClassVar[Presets] = {
        "official": {
            "optim.optimizer": "lars",
            "optim.lr": 0.075,  # 0.3 per 256 images
            "optim.weight_decay": 1e-6,
            "optim.trust": 1e-3,
            "optim.warmup_epochs": 10,
            "augment.min_scale": 0.08,
        }
    }


@dataclass(frozen=True)
class SimSiamOptions:
    """Start of the residual blocks, and the widths of projector and predictor."""

    zero_init_residual: bool | None = None
    """Blocks begin as the identity (with --norm batch and --init random only). Unset: the preset's."""
    hidden: int = 512
    """Hidden width of the projector: the backbone's, as in the official code."""
    dim: int = 2048
    bottleneck: int = 512
    """Hidden width of the predictor."""
    presets: ClassVar[Presets] = {
        "recommended": {"options.simsiam.zero_init_residual": False},  # all methods begin with the same weights
        "paper": {"options.simsiam.zero_init_residual": False},
        "official": {
            "optim.optimizer": "sgd",
            "optim.lr": 0.0125,  # 0.05 per 256 images
            "optim.weight_decay": 1e-4,
            "optim.warmup_epochs": 0,
            "augment.min_scale": 0.2,
            "options.simsiam.zero_init_residual": True,
        },
    }


@dataclass(frozen=True)
class PCRLv2Options:
    """The decoder; the rest is as its authors have it."""

    channels: tuple[int, int, int, int, int] = (256, 128, 64, 32, 16)
    """Channels of its blocks, from coarse to fine."""
    presets: ClassVar[Presets] = {
        # Global crops that show less than local ones may would be another method, whatever the optimiser.
        "paper": {"augment.min_scale": 0.3},
        "official": {
            "optim.optimizer": "sgd",
            "optim.lr": 1e-2,
            "optim.weight_decay": 1e-4,
            "optim.warmup_epochs": 0,
            "augment.min_scale": 0.3,
        },
    }
