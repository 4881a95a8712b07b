"""Frozen features: every image once through the backbone, without augmentation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .images import ImageStore

T = TypeVar("T")
Rows = NDArray[np.intp]

#: ImageNet's statistics, as the augmented views use them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def grey_batch(images: ImageStore, rows: Rows, size: int) -> Tensor:
    """Images as a normalised (B, 3, size, size) tensor: grey repeated over ImageNet's three channels."""
    pixels = [np.asarray(images[int(i)].resize((size, size), resample=2)) for i in rows]  # 2: bilinear
    grey = torch.from_numpy(np.stack(pixels))[:, None].float() / 255
    return (grey - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def read_ahead(load: Callable[[Rows], T], batches: Iterable[Rows], threads: int = 4) -> Iterator[T]:
    """``load`` of each, in order, while threads work on the next ones: decoding does not hold Python's lock."""
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for rows in batches:
            pending.append(pool.submit(load, rows))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def grey_batches(images: ImageStore, size: int, batch_size: int = 128) -> Iterator[Tensor]:
    """All images in order, as :func:`grey_batch` makes them."""
    rows = np.arange(len(images))
    batches = (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
    return read_ahead(lambda chosen: grey_batch(images, chosen, size), batches)
