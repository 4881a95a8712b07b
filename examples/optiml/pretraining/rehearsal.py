"""The first step before it counts, so that settings which cannot work are refused while nothing is written."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import cast

import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import CommandError
from .methods.base import Method
from .views import EpochSampler, ViewDataset, seeded

#: What libraries raise for a size, a share or a name that they do not take.
REFUSALS = (
    ValueError,
    RuntimeError,
    TypeError,
    IndexError,
    ZeroDivisionError,
    AssertionError,
    MisconfigurationException,
)


@contextmanager
def refused_in_one_line() -> Iterator[None]:
    """What goes wrong in building a run is about its settings."""
    try:
        yield
    except REFUSALS as error:
        if isinstance(error, CommandError) or type(error).__module__.startswith("examples."):
            raise
        raise CommandError(f"these settings cannot work: {' '.join(str(error).split())[:300]}") from error


def rehearse(model: Method, loader: DataLoader[tuple[Tensor, ...]], share: int) -> None:
    """A step of a copy of the model on a few films; random numbers are afterwards what they were before.

    ``share`` is this process's part of a batch. The films are as many as divide it, as queues of keys want.
    """
    if share < 2:
        return
    count = next(number for number in range(2, share + 1) if share % number == 0)
    dataset = cast(ViewDataset, loader.dataset)
    with seeded(0), torch.enable_grad():
        films = [dataset[key] for key in islice(cast(EpochSampler, loader.sampler), count)]
        twin = copy.deepcopy(model).train()
        optimizer = twin._optimizer(twin._parameter_groups())
        twin.step(*(torch.stack(views) for views in zip(*films, strict=True))).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
