"""What every pretraining method shares: backbone, optimiser, schedule, and what is logged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightly.utils.lars import LARS
from lightly.utils.scheduler import cosine_warmup_schedule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..distributed import all_gather_stack, gather_with_grad
from ..network import Backbone, start_from_imagenet
from ..settings import AugmentConfig, PretrainConfig
from ..views import Views, seed_all, two_views


class NonFiniteLoss(RuntimeError):
    """Training cannot go on: the loss is NaN or infinite."""


@dataclass
class StepOutput:
    """The loss of a batch, and named scalars for the log (parts of the loss, diagnostics)."""

    loss: Tensor
    log: dict[str, Tensor]


class Method(pl.LightningModule):
    """A self-supervised method. Subclasses build their heads after ``super().__init__`` and define :meth:`step`.

    The backbone is built first, so that all methods start from the same weights under the same seed. What changes
    outside of gradient descent (a momentum encoder, a queue) changes inside of :meth:`step`, before the gradient is
    taken, and lies in parameters or buffers: then a checkpoint after any step holds all of it.
    """

    #: Children whose learning rate follows neither warm-up nor cosine.
    constant_rate: ClassVar[frozenset[str]] = frozenset()
    #: Lightning's strategy for several processes; another where a step leaves parameters without gradient.
    strategy: ClassVar[str] = "ddp"
    #: Logged figures of which the largest over processes counts; of all others it is the mean.
    maxima: ClassVar[frozenset[str]] = frozenset({"marginal_error"})

    def __init__(self, config: PretrainConfig) -> None:
        """``config`` must be resolved."""
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.stem)
        if config.init == "imagenet":
            start_from_imagenet(self.backbone, config.imagenet_weights)
        self.last_log: dict[str, float] = {}
        self.stop_wanted = False
        """Set by a signal handler, at any time and perhaps in one process only."""
        self.stopping = False
        """Some process was told to stop; the same in all processes after each step."""

    @classmethod
    def views(cls, image_size: int, config: AugmentConfig) -> Views:
        """What turns a film into the views that :meth:`step` takes."""
        return two_views(image_size, config)

    def step(self, *views: Tensor) -> StepOutput:
        """The loss of a batch; each view is (B, 3, H, W), row i of every view shows image i."""
        raise NotImplementedError

    def done(self) -> float:
        """Share of the run's steps that are done, for what follows a schedule; 0 outside of a run."""
        if self._trainer is None:
            return 0.0
        return self.trainer.global_step / int(self.trainer.estimated_stepping_batches)

    def watched(self) -> dict[str, nn.Module | None]:
        """Modules whose gradient norm is logged as ``grad_<name>``, to see that they are being trained."""
        return {"backbone": self.backbone}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """What a method draws in a step follows the step alone, so that a resumed run draws it again."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        seed_all(self.config.seed, self.current_epoch, batch_idx, rank)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        try:
            out = self.step(*batch)
        except ValueError as error:
            if "finite" not in str(error):
                raise
            raise self._stopped("features are not finite", batch_idx, f" ({error})") from error
        self.last_log = self._log_of_all({"loss": out.loss, **out.log})
        # The loss of all processes, so that all stop if one must.
        if not math.isfinite(self.last_log["loss"]):
            parts = ", ".join(f"{name} {value:.4g}" for name, value in self.last_log.items())
            raise self._stopped(f"the loss is {self.last_log['loss']}", batch_idx, f" ({parts})")
        self.log("loss", out.loss.detach(), prog_bar=True)
        return out.loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Before an epoch is saved, measured or exported: the step after it would tell, but may not come."""
        if self.trainer.is_last_batch and not all(bool(value.isfinite().all()) for value in self.state_dict().values()):
            raise self._stopped("weights are no longer finite", batch_idx)

    def _stopped(self, what: str, batch_idx: int, detail: str = "") -> NonFiniteLoss:
        return NonFiniteLoss(
            f"{what} in epoch {self.current_epoch + 1}, step {batch_idx + 1}{detail}. A smaller --optim.lr or a longer "
            "--optim.warmup-epochs usually helps."
        )

    def _log_of_all(self, values: dict[str, Tensor]) -> dict[str, float]:
        """The figures of the whole batch, and whether any process is to stop; one exchange, one wait for the device."""
        scalars = [value.detach().float().reshape(()) for value in values.values()]
        rows = all_gather_stack(torch.stack([*scalars, scalars[0].new_tensor(float(self.stop_wanted))])).cpu()
        self.stopping = bool(rows[:, -1].any())
        columns = zip(values, rows.T, strict=False)  # the last column was the wish to stop
        return {name: float(x.max() if name in self.maxima else x.mean()) for name, x in columns}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for name, module in self.watched().items():
            grads = [p.grad for p in module.parameters() if p.grad is not None] if module else []
            self.last_log[f"grad_{name}"] = float(torch.stack([g.norm() for g in grads]).norm()) if grads else 0.0

    def configure_optimizers(self) -> Any:
        optim = self.config.optim
        assert optim.warmup_epochs is not None
        groups = self._parameter_groups()
        optimizer = self._optimizer(groups)
        total = int(self.trainer.estimated_stepping_batches)
        warmup = int(total * min(optim.warmup_epochs / self.config.epochs, 0.2))

        def scale(step: int) -> float:
            return cosine_warmup_schedule(step, total, start_value=1.0, end_value=1e-3, warmup_steps=warmup,
                                          warmup_start_value=0.0)  # fmt: skip

        schedule = LambdaLR(optimizer, [(lambda _: 1.0) if group["constant"] else scale for group in groups])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Trained parameters by whether their rate is constant and whether they are matrices; none is empty."""
        found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, p in self.named_parameters():
            if p.requires_grad:
                found.setdefault((name.partition(".")[0] in self.constant_rate, p.ndim > 1), []).append(p)
        return [{"params": found[key], "constant": key[0], "matrices": key[1]} for key in sorted(found, reverse=True)]

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        optim = self.config.optim
        assert optim.lr is not None and optim.weight_decay is not None and optim.trust is not None
        if optim.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)
        for group in groups:
            group["weight_decay"] = optim.weight_decay if group["matrices"] else 0.0
        if optim.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.momentum, 0.999))
        # lightly's LARS adapts a parameter if and only if its group decays, so biases and norms, which must
        # be left alone, are groups of their own; a decay of 0 for matrices would switch LARS off unseen.
        for group in (group for group in groups if group["matrices"]):
            group["weight_decay"] = max(optim.weight_decay, 1e-12)
        return LARS(groups, lr=optim.lr, momentum=optim.momentum, trust_coefficient=optim.trust)


def spread(embeddings: Tensor) -> Tensor:
    """Mean over dimensions of the deviation over the batch: near 0 means that all images look alike."""
    return gather_with_grad(embeddings.detach()).std(dim=0).mean()


__all__ = ["Method", "NonFiniteLoss", "StepOutput", "spread"]
