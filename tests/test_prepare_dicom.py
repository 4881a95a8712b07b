"""DICOM as hospitals write it: every way from a stored value to a shown grey is pydicom's own, or is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="the example needs otloss[examples]")

import pydicom
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, convert_color_space
from xray_layouts import film, write_dicom

from examples.optiml.data.prepare.convert import Job, convert
from examples.optiml.data.prepare.listing import Film
from examples.optiml.data.prepare.pixels import read_grey

DEEP = film(4, 30, 24, 4095)
SHOWN = 255 * (DEEP / 4095)
LUMA = np.array([0.299, 0.587, 0.114])
COLOURS = np.stack([film(seed).astype(np.uint8) for seed in range(3)], axis=-1)


def written(folder: Path, pixels: Any, photometric: str = "MONOCHROME2", **tags: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom finds some of these values odd, too
        write_dicom(folder / "film.dcm", pixels, photometric, **tags)
    return folder / "film.dcm"


def grey_of(*args: Any, **tags: Any) -> Any:
    return read_grey(written(*args, **tags))[0].astype(float)


def table(entries: Any, bits: int, first: int = 0, packed: bool = False, count: int | None = None) -> Dataset:
    item = Dataset()
    item.LUTDescriptor = [(count or len(entries)) % 2**16, first, bits]
    if first < 0:
        item["LUTDescriptor"].VR = "SS"
    data = np.asarray(entries, np.uint8).tobytes() if packed else [int(entry) for entry in entries]
    item.add_new("LUTData", "OW" if packed else "US", data)
    return item


def palette(bits: int, first: int = 0) -> dict[str, Any]:
    entries = np.random.default_rng(bits).integers(0, 2**bits, (3, 256)).astype(f"<u{bits // 8}")
    tags: dict[str, Any] = {}
    for colour, row in zip(("Red", "Green", "Blue"), entries, strict=True):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [256, first, bits]
        tags[f"{colour}PaletteColorLookupTableData"] = row.tobytes()
    return tags


# --- colour ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("first", [0, 9])
def test_palette_colour_is_looked_up(tmp_path: Path, bits: int, first: int) -> None:
    path = written(tmp_path, (film(3) // 8).astype(np.uint8), "PALETTE COLOR", **palette(bits, first))
    data = pydicom.dcmread(path)
    expected = apply_color_lut(data.pixel_array, data) * (255 / (2**bits - 1)) @ LUMA
    assert np.abs(read_grey(path)[0] - expected).max() <= 1  # colours are rounded, then their grey
    assert np.abs(expected - data.pixel_array).max() > 100  # the stored indices are no greys


@pytest.mark.parametrize("kind", ["RGB", "planar", "YBR_FULL", "16 bits"])
def test_colour(tmp_path: Path, kind: str) -> None:
    pixels, tags, photometric = COLOURS, {}, "RGB"
    if kind == "planar":
        pixels, tags = (
            np.ascontiguousarray(COLOURS.transpose(2, 0, 1)).reshape(COLOURS.shape),
            {"PlanarConfiguration": 1},
        )
    elif kind == "YBR_FULL":
        pixels, photometric = convert_color_space(COLOURS, "RGB", "YBR_FULL"), "YBR_FULL"
    elif kind == "16 bits":
        pixels = COLOURS.astype(np.uint16) * 257
    assert np.abs(grey_of(tmp_path, pixels, photometric, **tags) - COLOURS @ LUMA).max() <= 1


@pytest.mark.parametrize(
    ("pixels", "photometric", "tags", "message"),
    [
        (COLOURS, "YBR_PARTIAL_422", {}, "PhotometricInterpretation YBR_PARTIAL_422; read are MONOCHROME1"),
        (DEEP, "", {}, "PhotometricInterpretation is blank"),
        (DEEP, "PALETTE COLOR", {}, "PALETTE COLOR without RedPaletteColorLookupTableData: save the film in grey"),
        (COLOURS.astype(np.int16), "RGB", {}, "RGB of type int16: save the film in grey"),
        (DEEP, "MONOCHROME2", {"PresentationLUTShape": "INVERSE"}, "INVERSE contradicts MONOCHROME2: correct the one"),
        (DEEP, "MONOCHROME1", {"PresentationLUTShape": "IDENTITY"}, "IDENTITY contradicts MONOCHROME1"),
        (DEEP, "MONOCHROME2", {"PresentationLUTSequence": [table(range(4096), 12)]}, "PresentationLUTSequence is not"),
        (np.concatenate([DEEP, DEEP]), "MONOCHROME2", {"NumberOfFrames": 2, "Rows": 30}, "save each frame as its own"),
        (DEEP, "MONOCHROME2", {"VOILUTSequence": [table([0, 1], 12, count=4096)]}, "table of 4096 entries holds 4"),
        (DEEP, "MONOCHROME2", {"WindowCenter": 5, "WindowWidth": 9, "VOILUTFunction": "CUBIC"}, "CUBIC"),
        (np.full((8, 8), 7, np.uint16), "MONOCHROME2", {"PixelPaddingValue": 7}, "every pixel is PixelPaddingValue"),
        (np.full((8, 8), 7, np.uint8), "MONOCHROME2", {}, "every pixel has the same value"),
        (DEEP, "MONOCHROME2", {"RescaleSlope": 0, "RescaleIntercept": 4}, "every pixel has the same value"),
    ],
)
def test_what_is_refused_is_listed_in_one_line(
    tmp_path: Path, pixels: Any, photometric: str, tags: dict[str, Any], message: str
) -> None:
    done = convert(Job(Film("film.png", written(tmp_path, pixels, photometric, **tags)), tmp_path / "out", 0))
    assert message in done.error and "\n" not in done.error
    assert not (tmp_path / "out").exists()


# --- from stored value to shown grey ---------------------------------------------------------------------------------


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_presentation_shape_that_agrees_changes_nothing(tmp_path: Path, photometric: str) -> None:
    shape = {"MONOCHROME1": "INVERSE", "MONOCHROME2": "IDENTITY"}[photometric]
    plain = grey_of(tmp_path, DEEP, photometric, bits=12)
    assert np.array_equal(grey_of(tmp_path, DEEP, photometric, bits=12, PresentationLUTShape=shape), plain)
    assert np.abs(plain - (SHOWN if photometric == "MONOCHROME2" else 255 - SHOWN)).max() <= 0.5


def test_tables_are_pydicoms(tmp_path: Path) -> None:
    """A table for modality and one for the window, of twelve bits; then one of bytes, which pydicom miscounts."""
    curve = np.round(4095 * np.sqrt(np.linspace(0, 1, 4096))).astype(int)
    path = written(tmp_path, DEEP, bits=12, ModalityLUTSequence=[table(curve, 16)], VOILUTSequence=[table(curve, 12)])
    data = pydicom.dcmread(path)
    expected = apply_voi(apply_modality_lut(data.pixel_array, data), data)
    assert np.abs(read_grey(path)[0] - expected / 4095 * 255).max() <= 0.5
    for packed in (False, True):
        grey = grey_of(tmp_path, DEEP, bits=12, VOILUTSequence=[table(curve // 16, 8, packed=packed)])
        assert np.array_equal(grey, curve[DEEP] // 16)
    # Sixteen bits declared, twelve used: viewers go by the entries, and the film is not nearly black.
    assert np.abs(grey_of(tmp_path, DEEP, VOILUTSequence=[table(curve, 16)]) - curve[DEEP] / 4095 * 255).max() <= 0.5
    # Before the first entry its value, after the last entry the last one's; a film of signed values.
    signed = DEEP.astype(np.int16) - 2048
    grey = grey_of(tmp_path, signed, VOILUTSequence=[table([0, 100, 255], 8, first=-1)])
    assert np.array_equal(grey, np.select([signed < 0, signed == 0], [0, 100], 255))


@pytest.mark.parametrize(
    "window", [(0, 1), (1000, 0), (1000, -5), (9e9, 10), (2000, 1), ("", ""), (1e300, 1e300), ([], [])]
)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_useless_window_is_none(tmp_path: Path, window: tuple[Any, Any], photometric: str) -> None:
    """The film's own range is shown, as viewers do."""
    tags = {"WindowCenter": window[0], "WindowWidth": window[1]}
    expected = SHOWN if photometric == "MONOCHROME2" else 255 - SHOWN
    assert np.abs(grey_of(tmp_path, DEEP, photometric, bits=12, **tags) - expected).max() <= 0.5
    for entry in (0, 9):  # so is a table with one value
        flat = [table([entry] * 4096, 12)]
        grey = grey_of(tmp_path, DEEP, photometric, bits=12, VOILUTSequence=flat, **tags)
        assert np.abs(grey - expected).max() <= 0.5


def test_a_blank_is_none(tmp_path: Path) -> None:
    grey = grey_of(tmp_path, DEEP, bits=12, RescaleSlope=None, RescaleIntercept=None)
    assert np.abs(grey - SHOWN).max() <= 0.5
    window = {"WindowCenter": 1000.5, "WindowWidth": 1001, "VOILUTFunction": ""}
    assert np.abs(grey_of(tmp_path, DEEP, bits=12, **window) - 255 * np.clip((DEEP - 500.0) / 1000, 0, 1)).max() <= 0.5


@pytest.mark.parametrize(("photometric", "value"), [("MONOCHROME1", 0), ("MONOCHROME2", 65535), ("MONOCHROME1", 65535)])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 2048, "WindowWidth": 4096}])
def test_padding_is_air(tmp_path: Path, photometric: str, value: int, window: dict[str, int]) -> None:
    """Dark whatever it is stored as, and no part of the film's range."""
    inner = DEEP // 2 + 1000
    pixels = np.pad(inner, 5, constant_values=value).astype(np.uint16)
    grey = grey_of(tmp_path, pixels, photometric, PixelPaddingValue=value, **window)
    shown = (inner - 0.5) / 4095 if window else (inner - inner.min()) / np.ptp(inner)
    shown = 255 * (1 - shown if photometric == "MONOCHROME1" else shown)
    assert np.abs(grey[5:-5, 5:-5] - shown).max() <= 0.75
    grey[5:-5, 5:-5] = 0
    assert not grey.any()


@pytest.mark.parametrize("suffix", ["dcm", "png"])
def test_a_marker_beyond_the_film_does_not_darken_it(tmp_path: Path, suffix: str) -> None:
    """Twelve bits in sixteen, and a few pixels at the top: the film keeps its greys, and none of it is clipped."""
    pixels = film(4, 60, 50, 4095)
    pixels[2:4, 2:5] = 65535
    if suffix == "dcm":
        grey = grey_of(tmp_path, pixels)
    else:
        Image.fromarray(pixels).save(tmp_path / "film.png")
        grey = read_grey(tmp_path / "film.png")[0].astype(float)
    rest = pixels < 65535
    low, high = pixels[rest].min(), pixels[rest].max()
    assert (grey[~rest] == 255).all()
    assert np.abs(grey[rest] - 255.0 * (pixels[rest] - low) / (high - low)).max() <= 0.5


# --- ordinary image files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_a_viewer_shows_is_what_is_read(tmp_path: Path, orientation: int) -> None:
    """A camera's JPEG or PNG says how it was held; a box drawn in a viewer fits what is written."""
    shown = film(2, 20, 32).astype(np.uint8)
    stored = {
        1: shown, 2: shown[:, ::-1], 3: shown[::-1, ::-1], 4: shown[::-1], 5: shown.T, 6: np.rot90(shown),
        7: shown[::-1, ::-1].T, 8: np.rot90(shown, -1),
    }[orientation]  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "film.png", exif=exif)
    assert np.array_equal(read_grey(tmp_path / "film.png")[0], shown)
    deep = Image.fromarray(np.ascontiguousarray(stored).astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png", exif=exif)
    assert (
        np.abs(read_grey(tmp_path / "deep.png")[0] - np.interp(shown, (shown.min(), shown.max()), (0, 255))).max() < 1
    )


def test_transparent_is_dark(tmp_path: Path) -> None:
    grey = film(2).astype(np.uint8)
    alpha = np.full_like(grey, 255)
    alpha[:10] = 0
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]).save(tmp_path / "film.png")
    read = read_grey(tmp_path / "film.png")[0]
    assert not read[:10].any() and np.array_equal(read[10:], grey[10:])


def test_a_tiff_in_which_zero_is_white(tmp_path: Path) -> None:
    values = film(1, top=4095)
    Image.fromarray(values).save(tmp_path / "film.tif", tiffinfo={262: 0})
    assert np.abs(read_grey(tmp_path / "film.tif")[0] - (255 - values / 4095 * 255)).max() <= 0.5


def test_several_pictures_in_one_file_are_refused(tmp_path: Path) -> None:
    pages = [Image.fromarray(film(seed).astype(np.uint8)) for seed in range(3)]
    pages[0].save(tmp_path / "film.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match="3 pictures in one file; expected one film: save each as its own file"):
        read_grey(tmp_path / "film.tif")
    Image.new("L", (9, 9), 4).save(tmp_path / "flat.png")
    with pytest.raises(ValueError, match="every pixel has the same value"):
        read_grey(tmp_path / "flat.png")
