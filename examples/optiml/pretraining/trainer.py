"""Pretraining: data, method and Trainer put together; resume, checkpoint and export.

The same command runs in one process and, under ``torchrun``, in many: ``--batch-size`` counts the images of all
processes together, each takes its share of every batch, and everything that looks at a whole batch (batch norm,
variance, covariance, the log) looks at all of them.
"""

from __future__ import annotations

import importlib.util
import logging
import signal
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import cast

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from torch.utils.data import DataLoader

import otloss

from ..atomic import torch_save_atomic
from ..data.images import ImageStore, UnreadableImage
from ..data.index import ChestIndex, open_index
from ..errors import CommandError, DiskError
from ..locking import folder_lock
from .callbacks import EpochLines, StopAfter, TensorBoard
from .checkpoint import AtomicCheckpointIO, Interrupted, LastCheckpoint
from .distributed import World
from .log import CsvLog
from .methods import method_class
from .methods.base import Method, NonFiniteLoss
from .model_card import write_model_card
from .monitor import Monitor
from .network import set_norm
from .rehearsal import refused_in_one_line, rehearse
from .run_folder import check_run_folder, claim_run_folder
from .settings import INTERRUPTED, PretrainConfig
from .views import EpochSampler, ViewDataset

ViewLoader = DataLoader[tuple[torch.Tensor, ...]]
LAST, BACKBONE, LOG, MONITOR, CARD = "last.ckpt", "backbone.pth", "metrics.csv", "monitor.csv", "MODEL_CARD.md"


#: A run that is shorter gets a warning: the shortest for which this example shows a gain has 208 steps.
SHORT = 200


def pretrain(config: PretrainConfig, console: Console | None = None) -> Path | None:
    """Run or go on with a run. Returns the exported backbone, or None if the run stopped before its end."""
    config, world = config.resolve(), World.of_environment()
    console = (console or Console()) if world.first else Console(quiet=True)
    index = open_index(config.data, config.val_fraction, config.split_seed)
    if world.first:
        check_run_folder(config, index.fingerprint())
    if not (config.out / BACKBONE).exists():
        with folder_lock(config.out) if world.first else nullcontext():
            return _train(config, index, world, console)
    console.print(f"{config.out} is finished: {config.out / BACKBONE}")
    return config.out / BACKBONE


def _train(config: PretrainConfig, index: ChestIndex, world: World, console: Console) -> Path | None:
    """Nothing is written before the first step is known to work."""
    exported, last = config.out / BACKBONE, config.out / LAST
    if last.exists() and not zipfile.is_zipfile(last):
        raise CommandError(f"{last} is damaged. Put back a copy, or delete it to start the run anew.")
    with clear_stops(last, console):
        train = index if config.all_images else index.split("train")
        if len(train) < config.batch_size:
            raise CommandError(
                f"{len(train)} training images are fewer than one batch of {config.batch_size}; say --batch-size "
                f"{len(train)} or less"
            )
        with refused_in_one_line():
            model = build(config)
            loader = view_loader(train, config, world)
            trainer = make_trainer(config, console, loader, index, world)
            if not last.exists():
                rehearse(model, loader, world.share(config.batch_size))
        if world.first:
            claim_run_folder(config, index.fingerprint())
        several = f" in {world.size} processes" if world.size > 1 else ""
        steps = config.epochs * len(loader)
        console.print(
            f"{config.method}: {len(train)} images, {config.epochs} epochs of {len(loader)} steps ({steps} in all)"
            f"{several}, {config.image_size} px, {config.precision}, run folder {config.out}"
            + (", going on from last.ckpt" if last.exists() else "")
        )
        if steps < SHORT:
            console.print(
                f"[yellow]{steps} steps teach a network next to nothing[/]: the shortest run with a gain here has 208. "
                "Give more --epochs, or a smaller --batch-size.",
                highlight=False,
            )
        resume = str(last) if last.exists() else None
        # The checkpoint is this program's own; it holds optimiser and loop state, hence not weights alone.
        trainer.fit(model, loader, ckpt_path=resume, weights_only=False if resume else None)
        if trainer.current_epoch < config.epochs:
            console.print(f"Stopped after epoch {trainer.current_epoch} of {config.epochs}. {_state(last)}")
            return None
        if world.first:
            write_model_card(config, index, train, world, config.out / CARD)
            export(model, exported)
            console.print(f"Backbone: {exported}")
            if not config.keep_checkpoint:
                last.unlink(missing_ok=True)
        trainer.strategy.barrier()  # no process returns before the files are there
    return exported


@contextmanager
def clear_stops(last: Path, console: Console) -> Iterator[None]:
    """One line for each of the ways in which a run may have to stop, and where it can go on."""
    try:
        yield
    except Interrupted:
        console.print(f"Interrupted. {last} holds the last step. The same command goes on from there.", soft_wrap=True)
        raise SystemExit(INTERRUPTED) from None
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != 1:
            raise
        # A Ctrl-C outside training, or a second one, which Lightning turns into exit code 1.
        console.print(f"Interrupted. {_state(last)} The same command goes on from there.", soft_wrap=True)
        raise SystemExit(INTERRUPTED) from None
    except (NonFiniteLoss, UnreadableImage) as error:
        raise CommandError(f"Stopped: {error} {_state(last)}") from error
    except OSError as error:
        stopped = DiskError.of(error, last.parent, _state(last))
        if stopped is None:
            raise
        raise stopped from error


def _state(last: Path) -> str:
    return f"{last} holds the run up to its last save." if last.exists() else "Nothing was saved yet."


def build(config: PretrainConfig) -> Method:
    """The method's network as it is before the first step; follows the seed alone."""
    torch.manual_seed(config.seed)
    model = method_class(config.method)(config)
    set_norm(model, config.norm)
    if config.precision != "32-true":
        model.backbone.to(memory_format=torch.channels_last)  # half-precision convolutions are faster in this layout
    return model


def store_size(image_size: int) -> int:
    """Size of a film that views are made of: decoded once, and large enough that a crop is enlarged little."""
    return max(image_size, min(2 * image_size, 256))  # 256 is the field's usual size


def view_loader(train: ChestIndex, config: PretrainConfig, world: World) -> ViewLoader:
    """This process's share of batches of views.

    The last, smaller batch is dropped: covariance divides by the batch size.
    """
    views = method_class(config.method).views(config.image_size, config.augment)
    dataset = ViewDataset(ImageStore(train.paths, store_size(config.image_size)), views, config.seed)
    return DataLoader(
        dataset,
        batch_size=world.share(config.batch_size),
        sampler=EpochSampler(len(dataset), config.seed, config.batch_size, world),
        drop_last=True,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        worker_init_fn=_leave_ctrl_c_to_the_trainer,
        pin_memory=_on_gpu(config),
    )


def _leave_ctrl_c_to_the_trainer(worker: int) -> None:
    """A terminal's Ctrl-C reaches worker processes too; the step in hand still needs them."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_trainer(
    config: PretrainConfig, console: Console, loader: ViewLoader, index: ChestIndex, world: World
) -> pl.Trainer:
    """A quiet Trainer: our log, one checkpoint, a line per epoch, and a bar where there is a terminal to draw it on."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # its sampler is
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # frozen norms are meant
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated.*")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
    # The share of images whose transport converged is in the log of every step.
    warnings.filterwarnings("ignore", category=otloss.ConvergenceWarning)
    _check_machine(config, world, console)
    callbacks: list[Callback] = []
    if world.first:
        board = TensorBoard(config.out / "tensorboard") if config.tensorboard else None
        log = CsvLog(config.out / LOG)
        callbacks += [log, EpochLines(console, log, config.batch_size)]
        callbacks += [board] if board else []
        callbacks += _monitor(config, console, index, log, board)
    callbacks += [
        StopAfter(config.stop_after),
        LastCheckpoint(config.out / LAST, cast(EpochSampler, loader.sampler)),
    ]
    return pl.Trainer(
        max_epochs=config.epochs,
        accelerator=config.accelerator,
        devices=world.per_node,
        num_nodes=world.nodes,
        strategy=method_class(config.method).strategy if world.size > 1 else "auto",
        use_distributed_sampler=False,
        sync_batchnorm=world.size > 1 and config.norm == "batch",
        precision=config.precision,
        # CPUs repeat bit for bit by themselves. Pooling's gradient has no other way on some devices, hence no error.
        deterministic="warn" if _on_gpu(config) else None,
        plugins=[AtomicCheckpointIO()],
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def _monitor(
    config: PretrainConfig, console: Console, index: ChestIndex, log: CsvLog, board: TensorBoard | None
) -> list[Callback]:
    if not config.monitor.every:
        return []
    if not {"train", "val"} <= set(index.splits.tolist()):
        console.print(f"{config.data} has no validation images, so there is no {MONITOR}")
        return []
    return [
        Monitor(
            config.out / MONITOR, log, index.split("train"), index.split("val"), config.image_size,
            config.monitor, console, board,
        )
    ]  # fmt: skip


def _check_machine(config: PretrainConfig, world: World, console: Console) -> None:
    """What this machine or several processes cannot do, or do differently."""
    if config.precision == "16-mixed" and not _on_gpu(config):
        raise CommandError("--precision 16-mixed needs a GPU; take bf16-mixed")
    if world.size > 1 and config.norm == "batch" and not _on_gpu(config):
        raise CommandError(
            "--norm batch must be synchronised between processes, which PyTorch does on GPUs only; "
            "take --norm group or --norm frozen, or one process"
        )
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise CommandError("--tensorboard needs the package tensorboard: pip install tensorboard")
    if world.size > 1 and config.method == "optiml" and config.options.optiml.tokens == "batch":
        console.print("--tokens batch attends over each process's share of the batch, not over all of it")


def _on_gpu(config: PretrainConfig) -> bool:
    return config.accelerator not in ("cpu",) and torch.cuda.is_available()


def export(model: Method, path: Path) -> None:
    """Save the backbone under torchvision's names: ``resnet18().load_state_dict(..., strict=False)`` takes it.

    A finished run is recognised by this file, so it must never be half written.
    """
    torch_save_atomic({name: value.detach().cpu().clone() for name, value in model.backbone.state_dict().items()}, path)


def main(config: PretrainConfig) -> None:
    """The ``pretrain`` command."""
    pretrain(config)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
