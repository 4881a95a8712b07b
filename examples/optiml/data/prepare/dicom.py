"""A DICOM film as a viewer shows it, in 8-bit grey: stored values, modality, window or table, which end is dark."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_windowing

from .grey import Grey, film_range, to_bytes

Floats = NDArray[np.float64]

GREY = ("MONOCHROME1", "MONOCHROME2")
#: What pydicom turns into RGB; of other kinds of colour it hands over the numbers as they are stored.
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
#: What a film must be shown by if its grey values are what they say.
SHAPES = {"MONOCHROME1": "INVERSE", "MONOCHROME2": "IDENTITY"}


def read_dicom(path: Path) -> tuple[Grey, str]:
    """The film's grey values, and the header's PatientID."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's remarks on header values that nothing here depends on
        data = pydicom.dcmread(path)
        return _picture(data), str(data.get("PatientID") or "").strip()


def _picture(data: pydicom.Dataset) -> Grey:
    kind = str(data.get("PhotometricInterpretation") or "").strip().upper()
    if kind not in (*GREY, *COLOUR, "PALETTE COLOR"):
        raise ValueError(f"PhotometricInterpretation {kind or 'is blank'}; read are {', '.join((*GREY, *COLOUR))} ...")
    data.PhotometricInterpretation = kind
    pixels = data.pixel_array
    if pixels.ndim != (3 if kind in COLOUR else 2) or (kind in COLOUR and pixels.shape[2] != 3):
        raise ValueError(f"pixels of shape {pixels.shape}; expected one grey film: save each frame as its own file")
    if kind in COLOUR:
        if pixels.dtype.kind != "u" or (kind != "RGB" and pixels.dtype != np.uint8):
            raise ValueError(f"{kind} of type {pixels.dtype}: save the film in grey")
        return _luma(pixels, 2.0**data.BitsStored - 1)
    if kind == "PALETTE COLOR":
        return _luma(*_palette(pixels, data))
    return _grey(pixels, data, kind)


def _grey(pixels: NDArray[Any], data: pydicom.Dataset, kind: str) -> Grey:
    """Air is dark: MONOCHROME1 is inverted, and so is not what pads the film."""
    _check_presentation(data, kind)
    film = ~_padding(pixels, data)
    if not film.any():
        raise ValueError("every pixel is PixelPaddingValue")
    values = _modality(pixels, data)
    image = next((shown for shown in _shown(values, data) if len(np.unique(shown[film])) > 2), None)
    if image is None:  # no window, or one that leaves black and white at most
        if pixels.dtype == np.uint8 and data.BitsStored == 8 and values.min() >= 0 and values.max() <= 255:
            low, high = 0.0, 255.0
        else:
            low, high = film_range(values[film])
        image = to_bytes(values, low, high)
    if kind == "MONOCHROME1":
        image = 255 - image
    image[~film] = 0
    return image


def _check_presentation(data: pydicom.Dataset, kind: str) -> None:
    shape = str(data.get("PresentationLUTShape") or SHAPES[kind]).strip().upper()
    if shape != SHAPES[kind]:
        raise ValueError(f"PresentationLUTShape {shape} contradicts {kind}: correct the one that is wrong")
    if data.get("PresentationLUTSequence"):
        raise ValueError("a PresentationLUTSequence is not read: save the film as it is shown")


def _padding(pixels: NDArray[Any], data: pydicom.Dataset) -> NDArray[np.bool_]:
    """Stored values that stand for no film."""
    value, limit = data.get("PixelPaddingValue"), data.get("PixelPaddingRangeLimit")
    if value is None or pixels.dtype.kind == "f":
        return np.zeros(pixels.shape, np.bool_)
    ends = np.array([value, value if limit is None else limit])
    ends = ends.astype(pixels.dtype)  # of a signed film, some files have them unsigned
    return np.asarray((pixels >= ends.min()) & (pixels <= ends.max()))


def _modality(pixels: NDArray[Any], data: pydicom.Dataset) -> Floats:
    """What the stored values measure, by a table or by slope and intercept."""
    if item := data.get("ModalityLUTSequence"):
        return _table(item[0], data).of(pixels)
    if data.get("RescaleSlope") is None or data.get("RescaleIntercept") is None:
        return pixels.astype(np.float64)
    return np.asarray(apply_modality_lut(pixels, data), dtype=np.float64)


def _shown(values: Floats, data: pydicom.Dataset) -> Iterator[Grey]:
    """The film by its table, then by its first window, as far as it has them and they can be used."""
    if item := data.get("VOILUTSequence"):
        table = _table(item[0], data)
        if table.white:
            yield to_bytes(table.of(values), 0, table.white)
    center, width = _number(data.get("WindowCenter")), _number(data.get("WindowWidth"))
    function = str(data.get("VOILUTFunction") or "").strip().upper() or "LINEAR"
    if math.isfinite(center) and math.isfinite(width) and width > (1 if function == "LINEAR" else 0):
        data.WindowCenter, data.WindowWidth, data.VOILUTFunction = center, width, function
        # Black and white are the window's own ends, not the image's: a film without black must not be stretched.
        with np.errstate(over="ignore"):
            low, high = (float(end) for end in apply_windowing(np.array([-1e12, 1e12]), data))
            if low != high:
                yield to_bytes(apply_windowing(values, data), low, high)


def _number(value: Any) -> float:
    """The first of several; NaN for a blank."""
    first = value[0] if isinstance(value, (list, pydicom.multival.MultiValue)) and len(value) else value
    return math.nan if first is None or first == "" or isinstance(first, (list, tuple)) else float(first)


@dataclass(frozen=True)
class Table:
    """A lookup table of DICOM."""

    first: int
    """The value that the first entry is for; smaller ones get it too, and values beyond the last entry the last."""
    entries: NDArray[np.uint16]

    def of(self, values: NDArray[Any]) -> Floats:
        place = np.clip(np.rint(values).astype(np.int64) - self.first, 0, len(self.entries) - 1)
        return self.entries[place].astype(np.float64)

    @property
    def white(self) -> int:
        """The top of the fewest bits that hold all entries: some files declare more bits than their table uses."""
        return int(2 ** int(self.entries.max()).bit_length() - 1)


def _table(item: pydicom.Dataset, data: pydicom.Dataset, name: str = "LUT") -> Table:
    """Read here because pydicom's own look-up counts in bytes where the entries are bytes, whatever their number."""
    count, first, _ = (int(number) for number in item[f"{name}Descriptor"].value)
    raw, count = item[f"{name}Data"].value, count or 2**16
    word = "<u2" if data.file_meta.TransferSyntaxUID.is_little_endian else ">u2"
    packed = raw if isinstance(raw, bytes) else np.atleast_1d(np.asarray(raw, word)).tobytes()
    # Entries are words, or bytes where there is no room for words.
    entries = np.frombuffer(packed, word if len(packed) >= 2 * count else np.uint8, min(count, len(packed)))
    if len(entries) < count:
        raise ValueError(f"a lookup table of {count} entries holds {len(entries)}")
    # Its first value is signed where pixels or what they measure can be negative, but some files have it unsigned.
    signed = data.get("PixelRepresentation") == 1 or float(data.get("RescaleIntercept") or 0) < 0
    return Table(first - 2**16 if signed and first >= 2**15 else first, entries.astype(np.uint16))


def _palette(pixels: NDArray[Any], data: pydicom.Dataset) -> tuple[NDArray[Any], float]:
    """Colours of stored indices, and the value of full brightness."""
    names = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    for name in names:
        if f"{name}Descriptor" not in data or f"{name}Data" not in data:
            raise ValueError(f"PALETTE COLOR without {name}Data: save the film in grey")
    colours = np.stack([_table(data, data, name).of(pixels) for name in names], axis=-1)
    bits = int(data[f"{names[0]}Descriptor"].value[2])
    return colours, 2.0 ** (bits if colours.max() < 2**bits else 16) - 1


def _luma(colours: NDArray[Any], white: float) -> Grey:
    """ITU-R 601's grey of red, green and blue, as Pillow computes it."""
    eight = np.round(colours * (255.0 / white)).astype(np.uint8) if white != 255 else colours.astype(np.uint8)
    return np.array(Image.fromarray(eight).convert("L"))
