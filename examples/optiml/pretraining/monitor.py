"""How good the features are while training goes on: neighbours' labels, and how many dimensions are in use."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from torch import Tensor
from torch.nn.functional import normalize

from ..data.index import ChestIndex
from ..metrics import class_aucs, macro
from .callbacks import TensorBoard
from .features import extract
from .log import CsvLog, CsvTable
from .methods.base import Method
from .network import Backbone
from .settings import MonitorConfig


def knn_scores(bank: Tensor, labels: Tensor, queries: Tensor, neighbours: int, temperature: float) -> Tensor:
    """Of every query (Q, d) the share of each label (N, C) among its nearest rows of ``bank`` (N, d): (Q, C).

    Nearest by cosine; a neighbour counts exp(cosine / temperature). An image may have several labels or none.
    """
    cosine = normalize(queries, dim=1) @ normalize(bank, dim=1).T
    nearest, rows = cosine.topk(min(neighbours, len(bank)), dim=1)
    weights = (nearest / temperature).softmax(dim=1)
    return torch.einsum("qk,qkc->qc", weights, labels.to(weights)[rows])


def effective_rank(x: Tensor) -> float:
    """Perplexity of the spectrum: exp of the entropy of the covariance's normalised eigenvalues; from 1 to d."""
    eigenvalues = torch.linalg.svdvals(x.double() - x.double().mean(0)).square()
    if not eigenvalues.sum() > 0:
        return 1.0
    return float(torch.special.entr(eigenvalues / eigenvalues.sum()).sum().exp())


def subsample(index: ChestIndex, count: int) -> ChestIndex:
    """At most ``count`` rows, always the same ones."""
    if len(index) <= count:
        return index
    rows: NDArray[np.intp] = np.sort(np.random.default_rng(0).permutation(len(index))[:count])
    return index.take(rows)


def measure(
    backbone: Backbone, bank: ChestIndex, queries: ChestIndex, image_size: int, config: MonitorConfig
) -> dict[str, float]:
    """How the features of ``queries`` fare by their neighbours in ``bank``, and how the latter spread."""
    x, y = (extract(backbone, index, image_size) for index in (bank, queries))
    scores = knn_scores(x, torch.from_numpy(bank.labels), y, config.neighbours, config.temperature)
    result = {}
    for name, groups in (("knn_auc", None), ("knn_auc_within", queries.sources)):
        if name == "knn_auc" or groups is not None:
            aucs = class_aucs(scores.double().numpy(), queries.labels, groups)
            result[name] = float(macro(aucs, bank.labels.max(axis=0) > 0)[0])
    return {**result, "effective_rank": effective_rank(x), "std": float(x.std(dim=0).mean())}


class Monitor(Callback):
    """Writes ``monitor.csv``: a row every so many epochs, and one after the last.

    ``knn_auc`` is the macro AUC of `knn_scores` on validation images over labels of training images,
    ``knn_auc_within`` the same within each source; ``effective_rank`` and ``std`` are of the pooled features, and
    ``loss`` and ``perplexity`` (of the marginals, where the method has any) are means over the epoch.
    """

    def __init__(
        self,
        path: Path,
        log: CsvLog,
        bank: ChestIndex,
        queries: ChestIndex,
        image_size: int,
        config: MonitorConfig,
        console: Console,
        board: TensorBoard | None = None,
    ) -> None:
        self.table, self.config, self.console, self.board = CsvTable(path, "epoch"), config, console, board
        self.metrics = log
        self.bank, self.queries, self.image_size = (
            subsample(bank, config.images),
            subsample(queries, config.images),
            image_size,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.table.keep(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Method)
        epoch = trainer.current_epoch + 1
        if epoch % self.config.every and epoch != trainer.max_epochs:
            return
        backbone = copy.deepcopy(pl_module.backbone)  # which leaves training as it was
        row = measure(backbone, self.bank, self.queries, self.image_size, self.config)
        means = {name: self.metrics.mean(name) for name in ("loss", "perplexity")}
        row.update({name: mean for name, mean in means.items() if mean is not None})
        self.table.append({"epoch": epoch, "step": trainer.global_step, **row})
        if self.board:
            self.board.add("monitor", row, trainer.global_step)
        self.console.print(
            f"  nearest neighbours on validation: AUC {row['knn_auc']:.3f}, effective rank {row['effective_rank']:.1f}",
            highlight=False,
        )
