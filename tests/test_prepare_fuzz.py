"""Odd headers and odd tables, drawn anew in every run: a right picture or row, or one line, and never a traceback."""

from __future__ import annotations

import csv
import io
import os
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="the example needs otloss[examples]")
pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_windowing
from xray_layouts import film, run, write_dicom, write_png

from examples.optiml.data.prepare.convert import Job, convert
from examples.optiml.data.prepare.listing import Film
from examples.optiml.data.prepare.pixels import read_grey

ROUNDS = 300


def seed_of_this_run() -> int:
    """Printed, so that a failure can be made again: OTLOSS_FUZZ_SEED=NUMBER."""
    seed = int(os.environ.get("OTLOSS_FUZZ_SEED") or int.from_bytes(os.urandom(4), "big"))
    print(f"OTLOSS_FUZZ_SEED={seed}")
    return seed


# --- DICOM -----------------------------------------------------------------------------------------------------------


def odd_table(draw: random.Random) -> Dataset:
    bits, count = draw.choice([0, 8, 12, 16, 17]), draw.choice([0, 1, 2, 256, 4096])
    item = Dataset()
    item.LUTDescriptor = [count, draw.choice([0, 5, 300]), bits]
    item.add_new("LUTData", "US", [draw.randrange(2 ** min(bits or 1, 16)) for _ in range(draw.choice([2, 256, 4096]))])
    return item


#: Header values that change no grey, and those that pydicom's own functions for a window read.
PLAIN = {"PatientID", "bits", "PlanarConfiguration", "NumberOfFrames"}
WINDOWED = PLAIN | {"WindowCenter", "WindowWidth", "VOILUTFunction", "RescaleSlope", "RescaleIntercept"}


def odd_header(draw: random.Random) -> tuple[Any, str, dict[str, Any]]:
    """Pixels, photometric interpretation, and header values: each now and then, most of them odd."""
    dtype = draw.choice([np.uint8, np.uint16, np.int16])
    top = draw.choice([1, 200, 255]) if dtype is np.uint8 else draw.choice([200, 4095, 32767])
    pixels = film(draw.randrange(9), draw.choice([1, 17, 24]), draw.choice([2, 20]), top).astype(dtype)
    if draw.random() < 0.2:
        pixels[0] = draw.choice([0, top])
    kinds = ["MONOCHROME1", "MONOCHROME2"] * 4 + [
        "PALETTE COLOR",
        "RGB",
        "YBR_FULL",
        "YBR_ICT",
        "HSV",
        "",
        "monochrome2",
    ]
    photometric = draw.choice(kinds)
    if photometric in ("RGB", "YBR_FULL", "YBR_ICT") and draw.random() < 0.8:
        pixels = np.stack([pixels] * 3, axis=-1)
    numbers = ["", 0, 1, -1, 0.5, 255, 2000, 1e12, -1e12, [40, 80], [300, 4000]]
    choices: dict[str, list[Any]] = {
        "VOILUTFunction": ["LINEAR", "LINEAR_EXACT", "SIGMOID", "sigmoid", "", "CUBIC"],
        "RescaleSlope": ["", 0, 1, -1, 2.5, 1e300],
        "RescaleIntercept": ["", 0, -1024, 1e300],
        "PixelPaddingValue": [0, 1, top, 30000],
        "PixelPaddingRangeLimit": [0, 10, top],
        "PresentationLUTShape": ["IDENTITY", "INVERSE", "", "ODD"],
        "VOILUTSequence": [[odd_table(draw)], []],
        "ModalityLUTSequence": [[odd_table(draw)], []],
        "PresentationLUTSequence": [[odd_table(draw)], []],
        "NumberOfFrames": [0, 1, 2],
        "Rows": [0, 5, 999],
        "bits": [1, 8, 12, 16],
        "PlanarConfiguration": [0, 1],
        "PatientID": ["", "Ω", "a^b", "x" * 300],
        "RedPaletteColorLookupTableDescriptor": [[256, 0, 8], [0, 0, 16]],
        "RedPaletteColorLookupTableData": [bytes(256), b""],
    }
    tags = {name: draw.choice(values) for name, values in choices.items() if draw.random() < 0.12}
    if draw.random() < 0.4:
        tags |= {name: draw.choice(numbers) for name in ("WindowCenter", "WindowWidth")}
    if draw.random() < 0.3:  # a header that pydicom shows by itself
        photometric, pixels = draw.choice(["MONOCHROME1", "MONOCHROME2"]), film(draw.randrange(9), 24, 20, 4095)
        pixels = pixels.astype(draw.choice([np.uint16, np.int16]))
        tags = {name: tags[name] for name in tags if name in WINDOWED - {"bits", "NumberOfFrames"}}
        tags |= {"WindowCenter": draw.choice([1, 900.5, [2000, 3]]), "WindowWidth": draw.choice([0.5, 2, 999, 4000.5])}
    return pixels, photometric, tags


def pydicoms_picture(path: Path) -> Any:
    """By pydicom's own functions, from 0 to 255; None where they refuse, or where the window leaves black and white."""
    data = pydicom.dcmread(path)
    try:
        values = apply_modality_lut(data.pixel_array, data)
        low, high = apply_windowing(np.array([-1e12, 1e12]), data)
        shown = 255 * np.clip((apply_windowing(values, data) - low) / (high - low), 0, 1)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError):
        return None
    return shown if np.isfinite(shown).all() and len(np.unique(np.round(shown))) > 2 else None


def test_odd_dicom_headers(tmp_path: Path) -> None:
    seed, pictures, compared, refusals = seed_of_this_run(), 0, 0, set()
    number = written = 0
    while written < ROUNDS:
        number += 1
        draw = random.Random(f"{seed} {number}")
        pixels, photometric, tags = odd_header(draw)
        path = tmp_path / "film.dcm"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                write_dicom(path, pixels, photometric, **tags)
            except (ValueError, TypeError, AttributeError, OverflowError, np.exceptions.DTypePromotionError):
                continue  # pydicom does not write such a header
        written += 1
        if draw.random() < 0.1:
            content = path.read_bytes()
            path.write_bytes(content[: draw.randrange(len(content))])
        done = convert(Job(Film("film.png", path), tmp_path / "out", 0))
        context = f"seed {seed}, round {number}: {photometric} {pixels.dtype} {pixels.shape} {tags} -> {done.error!r}"
        if done.error:
            assert "\n" not in done.error and len(done.error) > 10, context
            refusals.add(done.error.split(":")[0])
            continue
        pictures += 1
        grey, _ = read_grey(path)
        assert grey.dtype == np.uint8 and grey.ndim == 2 and grey.min() < grey.max(), context
        if {"WindowCenter", "WindowWidth"} <= set(tags) <= WINDOWED and photometric.upper() in (
            "MONOCHROME1",
            "MONOCHROME2",
        ):
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                expected = pydicoms_picture(path)
            if expected is not None:
                compared += 1
                shown = grey if photometric.upper() == "MONOCHROME2" else 255.0 - grey
                assert np.abs(shown - expected).max() <= 0.51, context
        if set(tags) <= PLAIN and photometric.upper() in ("MONOCHROME1", "MONOCHROME2") and pixels.dtype == np.uint8:
            shown = grey if photometric.upper() == "MONOCHROME2" else 255 - grey
            if tags.get("bits", 8) == 8:  # nothing in the header says that these are other greys
                assert np.array_equal(shown, pixels), context
    print(
        f"{pictures} pictures, {compared} of them with a window that pydicom shows alike; refused as {sorted(refusals)}"
    )
    assert pictures > ROUNDS / 10 and compared > ROUNDS / 30 and refusals


# --- tables ----------------------------------------------------------------------------------------------------------

CELLS = [
    "0",
    "1",
    "",
    "Y",
    "N",
    "-1",
    "nan",
    "Mass",
    "mass",
    "Mass|Edema",
    "['a', 'b']",
    "a, b",
    "NORMAL",
    "2",
    "é",
    '"',
]
IMAGES = [
    "a.png",
    "b.png",
    "c.png",
    "d/e.png",
    "gone.png",
    "../out.png",
    "A.PNG",
    "x" * 300,
    "",
    "d\\e.png",
    "\u202e.png",
]
COLUMNS = ["image", "who", "part", "Mass", "words", "Mass", "", " image "]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "cp1252", "utf-16-le"]


def odd_table_file(draw: random.Random, path: Path) -> tuple[list[list[str]], dict[str, Any]]:
    """Write a table; its rows, and options that may or may not fit it."""
    header = draw.sample(COLUMNS[:5], draw.randint(2, 5)) if draw.random() < 0.8 else draw.sample(COLUMNS, 4)
    if "image" not in header and draw.random() < 0.9:
        header[0] = "image"
    images = draw.sample(IMAGES[:5], draw.randint(1, 5)) if draw.random() < 0.7 else draw.choices(IMAGES, k=4)
    plain = draw.random() < 0.4

    def cell(column: str, image: str) -> str:
        if column.strip() == "image":
            return image
        if column == "part":
            return draw.choice(["train", "Val", "test", "train", "holdout"])
        return draw.choice(["p1", "p2", "p3", "N/A"]) if column == "who" else draw.choice(CELLS[:2] if plain else CELLS)

    rows = [[cell(column, image) for column in header] for image in images]
    ragged = [row + [""] * draw.choice([0, 0, 0, 2]) + ["more"] * (draw.random() < 0.02) for row in rows]
    buffer = io.StringIO()
    writer = csv.writer(
        buffer, delimiter=draw.choice([",", ",", ";", "\t"]), lineterminator=draw.choice(["\n", "\r\n"])
    )
    writer.writerows([header, *ragged])
    content = buffer.getvalue().encode(draw.choice(ENCODINGS), "replace")
    if draw.random() < 0.05:
        content = bytes(draw.randrange(256) for _ in range(60))
    path.write_bytes(content)
    options: dict[str, Any] = {
        "patient_column": draw.choice(["who", None]), "split_column": draw.choice(["part", None, None]),
        "label_columns": tuple(draw.sample(["Mass", "words", "Mass=Lump"], draw.randint(0, 2))),
        "uncertain": draw.choice(["refuse", "positive", "u-ones", "u-ignore"]),
        "blank": draw.choice([None, "negative", "skip", "positive"]), "separator": draw.choice([None, None, ","]),
    }  # fmt: skip
    return [header, *rows], options


def test_odd_tables(tmp_path: Path) -> None:
    root = tmp_path / "films"
    for number, name in enumerate(("a.png", "b.png", "c.png", "d/e.png")):
        write_png(root / name, number, side=8)
    seed, prepared, refusals = seed_of_this_run(), 0, set()
    for number in range(ROUNDS):
        draw = random.Random(f"{seed} {number}")
        (header, *rows), options = odd_table_file(draw, tmp_path / "T.csv")
        context = f"seed {seed}, round {number}: {(tmp_path / 'T.csv').read_bytes()!r} {options}"
        try:
            result = run("csv", root, tmp_path / f"out{number}", table=tmp_path / "T.csv", size=0, **options)
        except (ValueError, OSError) as error:  # which the command prints as one line
            assert "\n" not in str(error) and len(str(error)) > 20, context
            refusals.add(" ".join(str(error).replace(str(tmp_path), "").split()[:4]))
            continue
        prepared += 1
        header = [name.strip() for name in header]
        index = result.index
        cells = {
            row[header.index("image")].strip().replace("\\", "/"): dict(zip(header, row, strict=True)) for row in rows
        }
        by_name = {f"{Path(image).stem}.png": cells[image] for image in cells}
        for row, name in enumerate(index.names.tolist()):
            said = by_name.get(name) or by_name[name.removeprefix("d__")]
            assert options["patient_column"] is None or index.patients[row] == said["who"], context
            assert options["split_column"] is None or index.splits[row] == said["part"].lower(), context
            for label in set(index.classes) & {"Mass", "Lump"}:
                if said.get("Mass") in ("0", "1", "Y", "N") and "words" not in options["label_columns"]:
                    assert bool(index.labels[row, index.classes.index(label)]) == (said["Mass"] in "1Y"), context
        used = {
            str(path.relative_to(root)) for path in (root / "a.png", root / "b.png", root / "c.png", root / "d/e.png")
        }
        listed = {item.replace("\\", "/") for item, _ in result.skipped}
        films = {f"{name}".removeprefix("d__") for name in index.names.tolist()}
        assert all({Path(item).name, item} & (films | listed) for item in used), context  # every film is somewhere
    print(f"{prepared} tables prepared; refused as {sorted(refusals)}")
    assert prepared > ROUNDS / 10 and len(refusals) > 5
