"""``last.ckpt``: written whole or not at all, at the end of each epoch and when a run is told to stop."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from ..atomic import torch_save_atomic
from ..data.images import UnreadableImage
from .methods.base import Method
from .views import EpochSampler


class Interrupted(Exception):
    """The run was told to stop, and has saved where it is."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own writes to the system's temporary folder first, from where a move may be a slow copy."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        torch_save_atomic(checkpoint, Path(path))


class LastCheckpoint(Checkpoint):
    """Saves at the end of each epoch; and, after Ctrl-C or SIGTERM, at the end of the step, then stops.

    All processes stop after the same step, because the wish to stop travels with the log of each step
    (``Method.training_step``). A second Ctrl-C ends a lone process at once.
    """

    def __init__(self, path: Path, sampler: EpochSampler) -> None:
        self.path, self.sampler = path, sampler
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Method)

        def stop(number: int, frame: FrameType | None) -> None:
            if pl_module.stop_wanted and trainer.world_size == 1:
                raise KeyboardInterrupt
            pl_module.stop_wanted = True

        # Here and not earlier: Lightning sets a handler of its own for SIGTERM when it starts.
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Method)
        if pl_module.stopping and not trainer.is_last_batch:
            self._save(trainer)
            raise Interrupted

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Method)
        self._save(trainer)
        if pl_module.stopping:
            raise Interrupted

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()
        # The model is as the last step left it. Saving waits for all processes, and the others know of nothing.
        if isinstance(exception, UnreadableImage) and trainer.world_size == 1 and trainer.global_step:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_handlers()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        epoch, batch = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx + 1
        checkpoint["position"] = (epoch + 1, 0) if batch >= trainer.num_training_batches else (epoch, batch)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Tell the sampler where to go on, before worker processes fetch their first batches."""
        self.sampler.go_to(*checkpoint["position"])

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
