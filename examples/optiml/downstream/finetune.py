"""End-to-end fine-tuning: backbone and a linear classifier together, the paper's Table I.

From random weights with all labels it is plain supervised training: what a data set's labels teach in that many steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from ..atomic import torch_save_atomic
from ..data.batches import grey_batch, grey_batches
from ..data.images import ImageStore
from ..data.index import ChestIndex
from ..metrics import Floats, class_aucs, macro
from ..pretraining.network import FEATURE_DIM, Backbone, device, norm_of, set_norm
from .settings import TrainConfig
from .training import Fitted, fit, jitter


class Classifier(nn.Module):
    """A backbone with one linear score per class."""

    def __init__(self, backbone: Backbone, classes: int, seed: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(FEATURE_DIM, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(x)[1])
        return logits


@torch.no_grad()
def predict(model: Classifier, index: ChestIndex, size: int, images: ImageStore | None = None) -> Floats:
    """Logits (n, classes) of all rows of ``index``, whose images may be at hand already."""
    model.eval()
    where = next(model.parameters()).device
    images = images or ImageStore(index.paths, size)
    scores = [model(x.to(where)).float().cpu() for x in grey_batches(images, size)]
    return torch.cat(scores).double().numpy()


def usable_classes(train: ChestIndex) -> NDArray[np.bool_]:
    """Classes with positives and negatives among the labelled images: only these can be learnt."""
    positives = train.labels.sum(axis=0)
    return (positives > 0) & (positives < len(train))


def finetune(
    backbone: Backbone,
    train: ChestIndex,
    val: ChestIndex,
    image_size: int,
    config: TrainConfig,
    seed: int = 0,
    checkpoint: Path | None = None,
    identity: dict[str, Any] | None = None,
) -> tuple[Classifier, Fitted]:
    """Train on ``train``; the weights kept are those of the best macro AUC on ``val``."""
    model = Classifier(backbone, train.labels.shape[1], seed).to(device())
    images, val_images = ImageStore(train.paths, image_size), ImageStore(val.paths, image_size)
    labels, usable = torch.from_numpy(train.labels).float(), usable_classes(train)

    def load(rows: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        return grey_batch(images, rows, image_size), labels[torch.from_numpy(rows)]

    def loss_of(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return bce(model(jitter(x, generator)), y)

    def score_of() -> float:
        scores = predict(model, val, image_size, val_images)
        auc = float(macro(class_aucs(scores, val.labels), usable)[0])
        if np.isnan(auc):  # no class that could be learnt has a pair to compare in validation
            return -float(bce(torch.from_numpy(scores), torch.from_numpy(val.labels).double()))
        return auc

    fitted = fit(model, len(train), load, loss_of, score_of, config, seed, checkpoint, identity)
    return model, fitted


def save_classifier(model: Classifier, train: ChestIndex, image_size: int, path: Path) -> None:
    """Keep a fine-tuned network for the heatmaps, with what is needed to use it."""
    state = {
        "weights": {name: value.detach().cpu() for name, value in model.state_dict().items()},
        "classes": list(train.classes),
        "usable": usable_classes(train).tolist(),
        "image_size": image_size,
        "stem": model.backbone.stem,
    }
    torch_save_atomic(state, path)


def load_classifier(path: Path) -> tuple[Classifier, dict[str, Any]]:
    """The network and its facts: ``classes``, ``usable``, ``image_size``."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    weights: dict[str, Tensor] = state.pop("weights")
    backbone = Backbone(state.pop("stem", "standard"))  # a network that names none is from before there were others
    set_norm(backbone, norm_of(weights, "backbone."))
    model = Classifier(backbone, len(state["classes"]))
    model.load_state_dict(weights)
    return model.eval(), state
