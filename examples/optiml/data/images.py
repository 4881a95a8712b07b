"""The pixels of image files: grey values, damaged files by name, and a store that keeps small sets decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class UnreadableImage(RuntimeError):
    """An image file is missing, cut off or damaged; the message names it."""


def open_grey(path: Path) -> Image.Image:
    """An image file's grey values."""
    try:
        with Image.open(path) as file:
            return file.convert("L")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's ways to refuse a file
        raise UnreadableImage(f"cannot read image {path} ({error})") from error


class ImageStore:
    """Grey square images by row, kept decoded in memory when they are small enough, else read each time."""

    def __init__(self, paths: list[Path], size: int, limit_mb: int = 2048) -> None:
        """``size`` caps width and height: larger files are reduced once, smaller ones only made square."""
        self.paths, self.size = paths, size
        self._images: list[NDArray[np.uint8]] | None = None
        if len(paths) * size * size <= limit_mb * 2**20:
            self._images = [self._read(path) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Image.Image:
        return Image.fromarray(self._read(self.paths[row]) if self._images is None else self._images[row])

    def _read(self, path: Path) -> NDArray[np.uint8]:
        image = open_grey(path)
        side = min(self.size, *image.size)
        if image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.BOX)
        return np.asarray(image)


def resize_mask(mask: NDArray[np.bool_], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """To (width, height): a pixel is on where most of what it covers was; a finding never vanishes altogether."""
    if mask.shape[::-1] == shape:
        return mask
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    cover = np.asarray(grey.resize(shape, Image.Resampling.BOX)).copy()
    if mask.any() and not cover.any():  # a spot too small for a grey value
        row, column = np.argwhere(mask)[mask.sum() // 2]
        cover[row * shape[1] // mask.shape[0], column * shape[0] // mask.shape[1]] = 1
    return cover >= np.clip(cover.max(), 1, 128)
