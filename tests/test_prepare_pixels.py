"""Files to grey values, and run lengths to masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="the example needs otloss[examples]")

from PIL import Image
from pydicom.dataset import Dataset
from xray_layouts import encode_runs, film, write_dicom, write_png

from examples.optiml.data.images import resize_mask
from examples.optiml.data.prepare.pixels import decode_runs, fitted_size, read_grey, read_mask, resize


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_every_8_bit_mode_gives_the_same_grey(tmp_path: Path, mode: str) -> None:
    expected = write_png(tmp_path / "film.png", 3, mode)
    grey, patient = read_grey(tmp_path / "film.png")
    assert grey.dtype == np.uint8 and patient == ""
    assert np.abs(grey.astype(int) - expected).max() <= 1  # a palette's grey is rounded


def test_16_bit_png_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = film(2, top=4095)
    Image.fromarray(values).save(tmp_path / "deep.png")
    grey, _ = read_grey(tmp_path / "deep.png")
    assert np.array_equal(grey, np.round(values * (255 / 4095)).astype(np.uint8))
    Image.fromarray(np.full((8, 8), 700, np.uint16)).save(tmp_path / "flat.png")
    with pytest.raises(ValueError, match="same value"):
        read_grey(tmp_path / "flat.png")


def test_jpeg(tmp_path: Path) -> None:
    expected = film(1).astype(np.uint8)
    Image.fromarray(expected).save(tmp_path / "film.jpg", quality=95)
    assert np.abs(read_grey(tmp_path / "film.jpg")[0].astype(int) - expected).max() < 8


DEEP = film(4, 30, 24, 4095)
FRACTION = DEEP / 4095.0


@pytest.mark.parametrize(
    ("pixels", "photometric", "tags", "expected"),
    [
        # No window: the film's own range. MONOCHROME1 shows air white, so it is inverted (uint16: -x overflows).
        (DEEP, "MONOCHROME2", {"bits": 12}, FRACTION),
        (DEEP, "MONOCHROME1", {"bits": 12}, 1 - FRACTION),
        ((DEEP * 16).astype(np.uint16), "MONOCHROME1", {}, 1 - FRACTION),
        # A blank window is none.
        (DEEP, "MONOCHROME2", {"bits": 12, "WindowCenter": None, "WindowWidth": None}, FRACTION),
        # 8 bits stay as they are, also where the film uses few of them.
        ((DEEP // 32 + 50).astype(np.uint8), "MONOCHROME2", {}, (DEEP // 32 + 50) / 255),
        # The window decides, inside and outside the film's range; of two windows the first.
        (DEEP, "MONOCHROME2", {"bits": 12, "WindowCenter": 1000.5, "WindowWidth": 1001}, (DEEP - 500.0) / 1000),
        (DEEP, "MONOCHROME1", {"bits": 12, "WindowCenter": 1000.5, "WindowWidth": 1001}, 1 - (DEEP - 500.0) / 1000),
        (DEEP // 4, "MONOCHROME2", {"bits": 12, "WindowCenter": [2048, 9], "WindowWidth": [4096, 9]}, FRACTION / 4),
        (DEEP, "MONOCHROME2", {"bits": 12, "WindowCenter": 2000, "WindowWidth": 500, "VOILUTFunction": "SIGMOID"},
         1 / (1 + np.exp(-4 * (DEEP - 2000.0) / 500))),
        # Rescale comes before the window.
        (DEEP, "MONOCHROME2", {"bits": 12, "RescaleSlope": 2, "RescaleIntercept": -1000,
                               "WindowCenter": 1000.5, "WindowWidth": 2001}, (2.0 * DEEP - 1000) / 2000),
        # A negative slope: what is stored brightest is darkest.
        (DEEP, "MONOCHROME2", {"bits": 12, "RescaleSlope": -1, "RescaleIntercept": 4095,
                               "WindowCenter": 2048, "WindowWidth": 4096}, 1 - FRACTION),
        # Signed values.
        (DEEP.astype(np.int16) - 1024, "MONOCHROME2", {}, FRACTION),
        (DEEP.astype(np.int16) - 1024, "MONOCHROME2", {"WindowCenter": 0.5, "WindowWidth": 2001},
         (DEEP - 24.0) / 2000),
    ],
)  # fmt: skip
def test_dicom_grey_values(tmp_path: Path, pixels: Any, photometric: str, tags: dict, expected: Any) -> None:
    write_dicom(tmp_path / "film.dicom", pixels, photometric, PatientID=" p7 ", **tags)
    grey, patient = read_grey(tmp_path / "film.dicom")
    assert patient == "p7" and grey.dtype == np.uint8
    assert np.abs(grey - 255 * np.clip(expected, 0, 1)).max() <= 0.75  # half a grey value, and a quarter for rounding


@pytest.mark.parametrize("limit", [{}, {"PixelPaddingRangeLimit": -1999}])
def test_padding_of_a_signed_film(tmp_path: Path, limit: dict[str, int]) -> None:
    pixels = DEEP.astype(np.int16)
    pixels[0] = -2000
    write_dicom(tmp_path / "film.dcm", pixels, PixelPaddingValue=-2000, **limit)
    grey = read_grey(tmp_path / "film.dcm")[0]
    low, high = DEEP[1:].min(), DEEP[1:].max()
    assert not grey[0].any() and np.abs(grey[1:] - 255 * (DEEP[1:] - 1.0 * low) / (high - low)).max() <= 0.5


def test_what_is_not_finite_is_no_film(tmp_path: Path) -> None:
    values = film(1).astype(np.float32)
    values[3, 3] = np.nan
    Image.fromarray(values).save(tmp_path / "film.tiff")
    with pytest.raises(ValueError, match="not finite"):
        read_grey(tmp_path / "film.tiff")


def test_dicom_lookup_table(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 12]
    table.LUTData = [4095 - i for i in range(4096)]
    table["LUTData"].VR = "US"
    write_dicom(tmp_path / "film.dcm", DEEP, bits=12, VOILUTSequence=[table])
    assert np.abs(read_grey(tmp_path / "film.dcm")[0] - 255 * (1 - FRACTION)).max() <= 0.5


def test_dicom_jpeg_baseline_and_without_suffix(tmp_path: Path) -> None:
    pixels = film(5, 64, 64).astype(np.uint8)
    write_dicom(tmp_path / "film", pixels, jpeg=True)
    assert np.abs(read_grey(tmp_path / "film")[0].astype(int) - pixels).max() < 8


def test_dicom_in_colour_and_in_frames(tmp_path: Path) -> None:
    grey = film(5).astype(np.uint8)
    write_dicom(tmp_path / "colour.dcm", np.stack([grey] * 3, -1), "RGB")
    assert np.array_equal(read_grey(tmp_path / "colour.dcm")[0], grey)
    frames = np.concatenate([grey, grey])
    write_dicom(tmp_path / "frames.dcm", frames, NumberOfFrames=2, Rows=40)
    path = tmp_path / "frames.dcm"
    with pytest.raises(ValueError, match=r"\(2, 40, 40\); expected one grey film"):
        read_grey(path)


def test_runs_unite_and_run_down_columns() -> None:
    assert np.flatnonzero(decode_runs(["1 2"], side=4).T).tolist() == [1, 2]
    assert decode_runs(["1 2"], side=4)[1:3, 0].all()  # down the first column
    assert np.flatnonzero(decode_runs(["1 2 3 1"], side=4).T).tolist() == [1, 2, 6]  # relative to the last end
    rng = np.random.default_rng(0)
    parts = [rng.random((16, 16)) < 0.3 for _ in range(3)]
    parts.append(np.zeros((16, 16), np.bool_))
    parts[-1][3:, 15] = True  # to the very end
    for part in parts:
        assert np.array_equal(decode_runs([encode_runs(part)], side=16), part)
    union = np.logical_or.reduce(parts)
    assert np.array_equal(decode_runs([encode_runs(part) for part in parts], side=16), union)
    for nothing in ([], ["-1"], [" -1"], [""]):
        assert not decode_runs(nothing, side=16).any()


@pytest.mark.parametrize(("text", "message"), [("5", "pairs"), ("1 2 -1 2", "pairs"), ("250 7", "leave the 16x16")])
def test_bad_runs(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_runs([text], side=16)


def test_sizes_keep_proportions_and_never_grow() -> None:
    assert fitted_size(2080, 2336, 256) == (256, 288)
    assert fitted_size(2336, 2080, 256) == (288, 256)
    assert fitted_size(100, 80, 256) == (100, 80) == fitted_size(100, 80, 0)
    assert fitted_size(5000, 3, 2) == (3333, 2)
    assert resize(film(0, 30, 60).astype(np.uint8), (20, 10)).shape == (10, 20)


def test_a_reduced_mask_keeps_its_area(tmp_path: Path) -> None:
    y, x = np.mgrid[0:400, 0:400]
    disc = (x - 150) ** 2 + (y - 220) ** 2 < 90**2
    small = resize_mask(disc, (100, 100))
    assert abs(small.mean() / disc.mean() - 1) < 0.02
    assert small[55, 37] and not small[10, 10]
    speck = np.zeros((400, 400), np.bool_)
    assert not resize_mask(speck, (100, 100)).any()
    speck[40, 81] = True  # a sixteenth of a pixel is still a finding
    assert np.argwhere(resize_mask(speck, (100, 100))).tolist() == [[10, 20]]
    assert np.argwhere(resize_mask(speck, (8, 5))).tolist() == [[0, 1]]  # too small for a grey value
    for top in (1, 255):  # both ways of writing a mask
        Image.fromarray(disc.astype(np.uint8) * top).save(tmp_path / "mask.png")
        assert np.array_equal(read_mask(tmp_path / "mask.png", 1000, 1000), disc)
    with pytest.raises(ValueError, match=r"mask\.png is 400x400, its film 400x300"):
        read_mask(tmp_path / "mask.png", 400, 300)
