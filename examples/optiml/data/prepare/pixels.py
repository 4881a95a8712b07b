"""From a file to 8-bit grey, and from run lengths to a mask."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from .dicom import read_dicom
from .grey import Grey, check_contrast, film_range, to_bytes
from .listing import DICOM_SUFFIXES, has_dicom_mark

Mask = NDArray[np.bool_]

#: SIIM gives its run lengths on films of this width and height.
RLE_SPACE = 1024
#: TIFF's tag, and its value for files in which 0 is white.
TIFF_PHOTOMETRIC, TIFF_WHITE_IS_ZERO = 262, 0


def read_grey(path: Path) -> tuple[Grey, str]:
    """A film's grey values, dark air and bright bone, and the PatientID of a DICOM header (else "")."""
    if path.suffix.lower() in DICOM_SUFFIXES or has_dicom_mark(path):
        image, patient = read_dicom(path)
    else:
        image, patient = _read_picture(path), ""
    check_contrast(image)
    return image, patient


def _read_picture(path: Path) -> Grey:
    """An ordinary image file as a viewer shows it: upright, and dark where it is transparent."""
    with Image.open(path) as file:
        pictures = getattr(file, "n_frames", 1)
        if pictures > 1 and file.format != "MPO":  # a camera's JPEG with a preview
            raise ValueError(f"{pictures} pictures in one file; expected one film: save each as its own file")
        deep = file.mode.startswith(("I", "F"))
        # Pillow inverts such files of 8 bits only.
        inverted = deep and file.format == "TIFF" and file.tag_v2.get(TIFF_PHOTOMETRIC) == TIFF_WHITE_IS_ZERO  # type: ignore[attr-defined]
        upright = ImageOps.exif_transpose(file)
    if deep:  # 16 bits and more, which convert("L") would clip
        values = np.asarray(upright, dtype=np.float64)
        image = to_bytes(values, *film_range(values))
        return 255 - image if inverted else image
    if upright.has_transparency_data:
        seen = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", seen.size, (0, 0, 0, 255)), seen)
    return np.array(upright.convert("L"))


def fitted_size(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height after the shorter side is reduced to ``size``; never enlarged, 0 keeps."""
    shorter = min(width, height)
    if size == 0 or shorter <= size:
        return width, height
    return max(1, round(width * size / shorter)), max(1, round(height * size / shorter))


def resize(image: Grey, shape: tuple[int, int]) -> Grey:
    """To (width, height)."""
    if image.shape[::-1] == shape:
        return image
    return np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.LANCZOS))


def decode_runs(runs: Iterable[str], side: int = RLE_SPACE) -> Mask:
    """The union of SIIM's masks.

    Each string holds pairs ``start length``; a start counts from the end of the run before, and pixels run
    down the columns. ``-1`` and blank mean nothing is marked.
    """
    union = np.zeros(side * side, np.bool_)
    for text in runs:
        numbers = np.array(text.split(), dtype=np.int64)
        if len(numbers) == 0 or (len(numbers) == 1 and numbers[0] == -1):
            continue
        if len(numbers) % 2 or numbers.min() < 0:
            raise ValueError(f"run lengths must be pairs of start and length, not {text[:40]!r}")
        ends = np.cumsum(numbers)[1::2]
        if ends[-1] > side * side:
            raise ValueError(f"run lengths leave the {side}x{side} film")
        for end, length in zip(ends, numbers[1::2], strict=True):
            union[end - length : end] = True
    return union.reshape(side, side).T


def read_mask(path: Path, width: int, height: int) -> Mask:
    """A mask image, brighter half on; it must have the film's proportions."""
    with Image.open(path) as file:
        values = np.asarray(ImageOps.exif_transpose(file).convert("L"))
    rows, columns = values.shape
    if abs(columns / rows - width / height) > 0.02 * width / height:
        raise ValueError(f"mask {path.name} is {columns}x{rows}, its film {width}x{height}")
    return values > values.max() / 2
