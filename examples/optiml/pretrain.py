"""Pretraining: data, method and Trainer put together; resume, checkpoint and export."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, RichProgressBar
from rich.console import Console
from torch.utils.data import DataLoader

import otloss

from .augment import EpochSampler, ViewDataset
from .callbacks import CsvLog, PlainProgress, ResumeOrder, StopAfter
from .config import PretrainConfig, claim_run_folder
from .data import ChestIndex, ImageStore, read_index
from .methods import METHODS, Method
from .methods.base import NonFiniteLoss

ViewLoader = DataLoader[tuple[torch.Tensor, torch.Tensor]]
LAST, BACKBONE, LOG = "last.ckpt", "backbone.pth", "metrics.csv"


def pretrain(config: PretrainConfig, console: Console | None = None) -> Path | None:
    """Run or go on with a run. Returns the exported backbone, or None if the run stopped before its end."""
    console = console or Console()
    exported = config.out / BACKBONE
    index = read_index(config.data, config.val_fraction, config.split_seed)
    claim_run_folder(config, index.fingerprint())
    if exported.exists():
        console.print(f"{config.out} is finished: {exported}")
        return exported
    train = index.split("train")
    loader = view_loader(train, config)
    if not len(loader):
        raise SystemExit(f"{len(train)} training images are fewer than one batch of {config.batch_size}")

    torch.manual_seed(config.seed)
    model = METHODS[config.method](config)
    last = config.out / LAST
    trainer = make_trainer(config, console, loader)
    console.print(
        f"{config.method}: {len(train)} images, {config.epochs} epochs of {len(loader)} steps, {config.image_size} px, "
        f"run folder {config.out}" + (", going on from its last epoch" if last.exists() else "")
    )
    try:
        # The checkpoint is this program's own; it holds optimiser and loop state, hence not weights alone.
        resume = str(last) if last.exists() else None
        trainer.fit(model, loader, ckpt_path=resume, weights_only=False if resume else None)
    except NonFiniteLoss as error:
        raise SystemExit(f"Stopped: {error}") from error
    except SystemExit:  # how Lightning ends after Ctrl-C
        console.print(f"Interrupted. {_state(last)} The same command goes on from there.")
        raise
    if trainer.current_epoch < config.epochs:
        console.print(f"Stopped after epoch {trainer.current_epoch} of {config.epochs}. {_state(last)}")
        return None
    export(model, exported)
    console.print(f"Backbone: {exported}")
    return exported


def view_loader(train: ChestIndex, config: PretrainConfig) -> ViewLoader:
    """Batches of two views. The last, smaller batch is dropped: covariance divides by the batch size."""
    # Decode once at twice the view's size, so that a crop is enlarged little; 256 is the field's usual size.
    size = max(config.image_size, min(2 * config.image_size, 256))
    dataset = ViewDataset(ImageStore(train.paths, size), config.image_size, config.augment, config.seed)
    return DataLoader(
        dataset,
        batch_size=config.batch_size,
        sampler=EpochSampler(len(dataset), config.seed),
        drop_last=True,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
    )


def make_trainer(config: PretrainConfig, console: Console, loader: ViewLoader) -> pl.Trainer:
    """A quiet Trainer: our log, one checkpoint, and a progress bar where there is a terminal to draw it on."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated.*")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
    # The share of images whose transport converged is in the log of every step.
    warnings.filterwarnings("ignore", category=otloss.ConvergenceWarning)
    progress: Callback = RichProgressBar(leave=True) if sys.stdout.isatty() else PlainProgress(console)
    callbacks: list[Callback] = [
        progress,
        CsvLog(config.out / LOG),
        ResumeOrder(cast(EpochSampler, loader.sampler)),
        StopAfter(config.stop_after),
        ModelCheckpoint(
            config.out, filename=Path(LAST).stem, save_on_train_epoch_end=True, enable_version_counter=False
        ),
    ]
    return pl.Trainer(
        max_epochs=config.epochs,
        accelerator=config.accelerator,
        devices=1,
        precision=config.precision,
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def export(model: Method, path: Path) -> None:
    """Save the backbone under torchvision's names: ``resnet18().load_state_dict(..., strict=False)`` takes it."""
    weights = {name: value.detach().cpu().clone() for name, value in model.backbone.state_dict().items()}
    part = path.with_suffix(".part")
    torch.save(weights, part)
    part.replace(path)  # a finished run is recognised by this file, so it must never be half written


def _state(last: Path) -> str:
    return f"{last} holds the last finished epoch." if last.exists() else "No epoch was finished yet."


def main(config: PretrainConfig) -> None:
    """The ``pretrain`` command."""
    pretrain(config)
