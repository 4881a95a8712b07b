"""The network: torchvision's ResNet18 as a trunk that also returns its feature maps, the expander, and its norms."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import ResNet18_Weights
from torchvision.models.resnet import BasicBlock, ResNet

from ..errors import CommandError
from .settings import ExpanderConfig, Norm, Stem

FEATURE_DIM = 512
#: By how much the last maps are smaller than the image.
STRIDES: dict[Stem, int] = {"standard": 32, "no-pool": 16, "small": 8}


class Backbone(ResNet):
    """ResNet18 without classifier. Parameter names are torchvision's, so its weights load anywhere.

    The stem is torchvision's, or one for small images: as that of SimCLR for CIFAR (arXiv 2002.05709, appendix B.9), or
    without pooling only.
    """

    def __init__(self, stem: Stem = "standard") -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.fc = nn.Identity()  # type: ignore[assignment]
        self.stem: Stem = stem
        if stem != "standard":
            self.maxpool = nn.Identity()  # type: ignore[assignment]
        if stem == "small":
            self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does

    @property
    def stride(self) -> int:
        """By how much the last maps are smaller than the image."""
        return STRIDES[self.stem]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) to maps (B, 512, H/stride, W/stride) and their global average (B, 512)."""
        _, maps, pooled = self.stages(x)
        return maps, pooled

    def stages(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`forward` gives, and before it the last stage but one: (B, 256, 2 H/stride, 2 W/stride)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        third = self.layer3(self.layer2(self.layer1(x)))
        maps = self.layer4(third)
        return third, maps, torch.flatten(self.avgpool(maps), 1)


def imagenet_weights() -> dict[str, Tensor]:
    """torchvision's ResNet18 weights without its classifier; downloaded at the first call."""
    try:
        weights = ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    except URLError as error:
        url, folder = ResNet18_Weights.IMAGENET1K_V1.url, Path(torch.hub.get_dir()) / "checkpoints"
        raise CommandError(f"cannot download ImageNet weights ({error}); put {url} into {folder}") from error
    return {name: torch.as_tensor(value) for name, value in weights.items() if not name.startswith("fc.")}


def start_from_imagenet(backbone: Backbone, path: Path | None = None) -> None:
    """Load ImageNet's weights, downloaded or from a file, into a backbone with batch norms."""
    if path is None:
        backbone.load_state_dict(imagenet_weights())
        return
    weights = read_weights(path)
    with _named(path):
        _load(backbone, weights)


def device() -> torch.device:
    """Where networks run after pretraining; while it lasts, Lightning decides."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_backbone(path: Path | None, seed: int = 0, stem: Stem | None = None) -> Backbone:
    """The backbone of a run (its ``backbone.pth``), or, for ``None``, an untrained one that follows ``seed``.

    Weights from elsewhere load too: see :func:`foreign_weights`. ``stem`` unset: what the weights show, see
    :func:`stem_of`.
    """
    weights = None if path is None else read_weights(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = Backbone(stem or ("standard" if weights is None else stem_of(weights)))
    if path is not None and weights is not None:
        set_norm(backbone, norm_of(weights))
        with _named(path):
            _load(backbone, weights)
    return backbone.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file, see :func:`foreign_weights`; nothing in it is executed."""
    with _named(path):
        return foreign_weights(torch.load(path, map_location="cpu", weights_only=True))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What is wrong with a file of weights becomes one line that names the file."""
    try:
        yield
    except (ValueError, RuntimeError, AttributeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CommandError(f"{path} holds no ResNet18 weights under torchvision's names ({reason})") from error


def _load(backbone: Backbone, weights: dict[str, Tensor]) -> None:
    """As ``load_state_dict``; a ValueError names the first weight that does not fit."""
    expected = backbone.state_dict()
    if other := sorted(weights.keys() - expected.keys()):
        raise ValueError(f"it has {other[0]!r}, so it is a ResNet of another kind")
    for name, value in expected.items():
        if name.endswith("num_batches_tracked"):  # which older files lack, and nothing here reads
            continue
        if name not in weights:
            raise ValueError(f"{name!r} is missing")
        if weights[name].shape != value.shape:
            raise ValueError(f"{name!r} is {_shape(weights[name])}, and should be {_shape(value)}")
    backbone.load_state_dict(weights)


def _shape(x: Tensor) -> str:
    return " x ".join(map(str, x.shape)) or "a number"


#: Under what a file keeps a network's weights beside other things.
WRAPPERS = ("state_dict", "model_state_dict", "model")
#: Of several networks in one file, whose weights are meant: the one that gradients trained.
TRAINED = ("backbone", "encoder_q", "online_encoder", "student", "encoder")
#: What a ResNet consists of, without its classifier.
PARTS = ("conv1.", "bn1.", "layer")


def foreign_weights(content: Any) -> dict[str, Tensor]:
    """A ResNet18's weights by torchvision's names, without its classifier, from what a file holds.

    That may be a checkpoint around them, and all names may have a prefix such as ``module.`` or ``encoder_q.``. Other
    networks beside it (heads, momentum encoders) are left out. A ValueError says what is in the way.
    """
    wrapper = next(
        (name for name in WRAPPERS if isinstance(content, dict) and isinstance(content.get(name), dict)), None
    )
    weights = content[wrapper] if wrapper else content
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise TypeError(f"it is a {type(weights).__name__}, not a state_dict")
    prefixes = [name.removesuffix("conv1.weight") for name in weights if name.endswith("conv1.weight")]
    prefixes = [prefix for prefix in prefixes if f"{prefix}layer4.1.conv2.weight" in weights]
    if not prefixes:
        raise ValueError(
            f"no conv1.weight and layer4.1.conv2.weight under any prefix; its names are as {_first(weights)}"
        )
    ends = [prefix.rstrip(".").split(".")[-1] for prefix in prefixes]
    trained = [prefixes[ends.index(name)] for name in TRAINED if ends.count(name) == 1]
    chosen = "" if "" in prefixes else prefixes[0] if len(prefixes) == 1 else next(iter(trained), None)
    if chosen is None:
        raise ValueError(f"several networks, under {', '.join(map(repr, prefixes))}: save the state_dict of one")
    found = {name.removeprefix(chosen): x for name, x in weights.items() if name.startswith(chosen)}
    return {name: x for name, x in found.items() if name.startswith(PARTS)}


def _first(weights: dict[str, Any]) -> str:
    return repr(next(iter(weights), "none"))


def stem_of(weights: dict[str, Tensor]) -> Stem:
    """Which stem weights belong to, as far as they show it: pooling has none, so "no-pool" looks like "standard"."""
    return "small" if weights["conv1.weight"].shape[-1] == 3 else "standard"


def norm_of(weights: dict[str, Tensor], prefix: str = "") -> Norm:
    """Which norm a backbone's weights belong to; frozen ones are batch norm's again."""
    return "batch" if f"{prefix}bn1.running_mean" in weights else "group"


class FrozenBatchNorm(nn.Module):
    """Marks batch norms that neither gather statistics nor use the batch's: a fixed scale and shift per channel."""

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        del mode
        return super().train(False)


class FrozenBatchNorm1d(FrozenBatchNorm, nn.BatchNorm1d):
    """Parameters keep their names, so that weights load as those of the usual norm do."""


class FrozenBatchNorm2d(FrozenBatchNorm, nn.BatchNorm2d):
    """As above, for maps."""


def set_norm(model: nn.Module, norm: Norm) -> None:
    """Replace all batch norms below ``model``; drawing no random numbers, whatever the order of calls.

    ``"group"``: group norm of 32 groups for maps (of fewer, so that no channel stands alone and loses its mean) and one
    group (layer norm) for vectors. ``"frozen"``: the statistics and parameters that are there, for good: those of
    ImageNet under that initialisation, else the identity. Both treat every image by itself, so that a batch may be cut
    into pieces without a difference.
    """
    if norm == "batch":
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, _BatchNorm):
                continue
            flat = isinstance(child, nn.BatchNorm1d)
            if norm == "group":
                groups = 1 if flat else math.gcd(32, child.num_features, child.num_features // 2)
                new: nn.Module = nn.GroupNorm(groups, child.num_features, child.eps, child.affine)
                new.requires_grad_(all(p.requires_grad for p in child.parameters()))
            else:
                new = (FrozenBatchNorm1d if flat else FrozenBatchNorm2d)(
                    child.num_features, child.eps, child.momentum, child.affine
                )
                new.load_state_dict(child.state_dict())
                new.requires_grad_(False).eval()
            setattr(parent, name, new)


def mlp(in_dim: int, dim: int, layers: int, last_act: bool = False) -> nn.Sequential:
    """Linear-BN-ReLU blocks, then a bare Linear without bias, unless ``last_act``."""
    parts: list[nn.Module] = []
    for i in range(layers):
        last = i == layers - 1
        parts.append(nn.Linear(in_dim, dim, bias=not last))
        if not last or last_act:
            parts += [nn.BatchNorm1d(dim), nn.ReLU(inplace=True)]
        in_dim = dim
    return nn.Sequential(*parts)


def expander(config: ExpanderConfig) -> nn.Sequential:
    """VICReg's expander of pooled features.

    The paper's sentence ("three linear layers ... accompanied by ReLU and BN within each layer") can also be
    read as a normalised, rectified last layer; ``last_act`` builds that. It makes embeddings non-negative,
    which the variance and covariance terms do not like, so it is off by default.
    """
    return mlp(FEATURE_DIM, config.dim, config.layers, bool(config.last_act))
