"""From a file to 8-bit grey, and from run lengths to a mask."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from .listing import DICOM_SUFFIXES, Grey

Mask = NDArray[np.bool_]

#: SIIM gives its run lengths on films of this width and height.
RLE_SPACE = 1024


def read_grey(path: Path) -> tuple[Grey, str]:
    """A film's grey values, dark air and bright bone, and the PatientID of a DICOM header (else "")."""
    if path.suffix.lower() in DICOM_SUFFIXES or _has_dicom_mark(path):
        return _read_dicom(path)
    with Image.open(path) as file:
        if file.mode.startswith(("I", "F")):  # 16 bits and more, which convert("L") would clip
            values = np.asarray(file, dtype=np.float64)
            return _to_bytes(values, values.min(), values.max()), ""
        return np.array(file.convert("L")), ""


def _has_dicom_mark(path: Path) -> bool:
    """Hospitals' own files often have no suffix."""
    with path.open("rb") as file:
        file.seek(128)
        return file.read(4) == b"DICM"


def _read_dicom(path: Path) -> tuple[Grey, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's remarks on header values that nothing here depends on
        data = pydicom.dcmread(path)
        pixels = data.pixel_array
        patient = str(data.get("PatientID") or "").strip()
        if pixels.ndim == 3 and data.SamplesPerPixel == 3 and pixels.dtype == np.uint8:
            return np.array(Image.fromarray(pixels).convert("L")), patient
        if pixels.ndim != 2:
            raise ValueError(f"pixels of shape {pixels.shape}; expected one grey film")
        grey = np.asarray(apply_modality_lut(pixels, data), dtype=np.float64)
        if data.get("VOILUTSequence"):
            grey = apply_voi_lut(grey.astype(np.int64), data).astype(np.float64)
            low, high = 0.0, 2.0 ** data.VOILUTSequence[0].LUTDescriptor[2] - 1
        elif data.get("WindowCenter") is not None and data.get("WindowWidth") is not None:
            # The window's own ends, not the image's: a film without black must not be stretched.
            with np.errstate(over="ignore"):
                low, high = (float(end) for end in apply_voi_lut(np.array([-1e12, 1e12]), data))
            grey = apply_voi_lut(grey, data)
        elif pixels.dtype == np.uint8 and data.BitsStored == 8 and grey.min() >= 0 and grey.max() <= 255:
            low, high = 0.0, 255.0
        else:
            film = grey if data.get("PixelPaddingValue") is None else grey[~_padding(pixels, data)]
            low, high = (film.min(), film.max()) if film.size else (0.0, 0.0)
        image = _to_bytes(grey, low, high)
        return (255 - image if data.PhotometricInterpretation == "MONOCHROME1" else image), patient


def _padding(pixels: NDArray[Any], data: pydicom.Dataset) -> Mask:
    """Stored values that stand for no film."""
    limit = data.get("PixelPaddingRangeLimit")
    ends = np.array([data.PixelPaddingValue, data.PixelPaddingValue if limit is None else limit])
    ends = ends.astype(pixels.dtype)  # of a signed film, some files have them unsigned
    return np.asarray((pixels >= ends.min()) & (pixels <= ends.max()))


def _to_bytes(values: NDArray[np.float64], low: float, high: float) -> Grey:
    """Black at ``low``, white at ``high``, which is the smaller one where a window's slope is negative."""
    if not np.isfinite(high - low):
        raise ValueError("pixels are not finite")
    if high == low:
        raise ValueError("every pixel has the same value")
    return np.round(255 * np.clip((values - low) / (high - low), 0, 1)).astype(np.uint8)


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
        values = np.asarray(file.convert("L"))
    rows, columns = values.shape
    if abs(columns / rows - width / height) > 0.02 * width / height:
        raise ValueError(f"mask {path.name} is {columns}x{rows}, its film {width}x{height}")
    return values > values.max() / 2
