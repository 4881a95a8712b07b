"""``prepare``: every layout with its traps, generated, and true where this machine has it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from PIL import Image
from xray_layouts import (
    column,
    film,
    findings,
    nih,
    reasons,
    rsna,
    run,
    siim,
    vinbig_kaggle,
    vinbig_physionet,
    write_dicom,
    write_png,
    write_text,
)

from examples.optiml.data.images import ImageStore
from examples.optiml.data.index import Box, read_index
from examples.optiml.data.nih_writer import PhantomConfig, write_phantoms
from examples.optiml.data.prepare.siim import read_runs

# --- the layouts -----------------------------------------------------------------------------------------------------


def test_nih(tmp_path: Path) -> None:
    root = nih(tmp_path / "nih")
    write_png(root / "images_002" / "stray.png")
    result = run("nih", root, tmp_path / "out")
    index = result.index
    assert findings(index) == {
        "00000001_000": {"Cardiomegaly"}, "00000001_001": {"Cardiomegaly", "Emphysema"}, "00000002_000": set(),
        "00000003_000": {"Hernia"}, "00000004_000": {"Infiltration", "Nodule"},
    }  # fmt: skip
    assert index.boxes == {"00000004_000.png": [Box("Infiltration", 0.25, 0.5, 0.125, 0.0625)]}
    assert list(index.patients) == ["1", "1", "2", "3", "4"]
    assert list(index.splits) == ["train"] * 4 + ["test"]
    assert reasons(tmp_path / "out") == {
        "00000005_000.png": "no image file under images*/",
        "images_002/stray.png": "an image file that the tables do not list",
    }
    image = Image.open(index.paths[0])
    assert (image.mode, image.size) == ("L", (32, 32))
    assert index.labels[:, index.classes.index("Fibrosis")].sum() == 0  # a class without a film is no trouble


def test_prepared_and_raw_folders_give_the_same_index(tmp_path: Path) -> None:
    raw = write_phantoms(PhantomConfig(tmp_path / "raw", train=60, test=20, size=32))
    write_text(raw / "labels.csv", ["image,source", "images/00000001_000.png,a", "images/00000001_001.png,b"])
    run("nih", raw, tmp_path / "out")
    for fraction, seed in ((0.14, 0), (0.3, 5)):
        one, two = (read_index(root, fraction, seed) for root in (raw, tmp_path / "out"))
        assert one.fingerprint() == two.fingerprint() and (one.splits == "val").any()
        for field in ("names", "patients", "splits", "labels", "sources"):
            assert np.array_equal(getattr(one, field), getattr(two, field)), field
        assert one.classes == two.classes
    images = [ImageStore(index.paths, 32) for index in (one, two)]
    for row, name in enumerate(one.names.tolist()):
        assert np.array_equal(np.asarray(images[0][row]), np.asarray(images[1][row]))
        for here, there in zip(one.boxes.get(name, []), two.boxes.get(name, []), strict=True):
            assert here.label == there.label
            assert np.allclose(list(vars(here).values())[1:], list(vars(there).values())[1:], atol=1e-6)
        for label in one.classes:
            masks = [index.mask(row, label) for index in (one, two)]
            assert (masks[0] is None and masks[1] is None) or np.array_equal(*masks)  # type: ignore[arg-type]


def test_films_of_any_shape_are_read_square(tmp_path: Path) -> None:
    Image.fromarray(film(0, 30, 50).astype(np.uint8)).save(tmp_path / "wide.png")
    for size, side in ((20, 20), (40, 30)):  # reduced, and never enlarged
        assert ImageStore([tmp_path / "wide.png"], size)[0].size == (side, side)


def test_rsna(tmp_path: Path) -> None:
    index = run("rsna", rsna(tmp_path / "rsna"), tmp_path / "out").index
    assert findings(index) == {"aa": {"Pneumonia"}, "bb": set(), "cc": set()}
    boxes = [Box("Pneumonia", 0.5, 0.25, 0.25, 0.125), Box("Pneumonia", 0, 0, 0.5, 1)]
    assert index.boxes == {"aa.png": boxes}
    skipped = reasons(tmp_path / "out")
    assert skipped["dd"] == "no image file under stage_2_train_images/"
    assert skipped["ee.png"].startswith("unreadable: ") and len(skipped) == 2
    notes = json.loads((tmp_path / "out" / "prepare.json").read_text())["notes"]
    assert any("come from NIH" in note and "Nothing was removed" in note for note in notes)


@pytest.mark.parametrize("release", [1, 2])
def test_siim(tmp_path: Path, release: int) -> None:
    regions = [np.zeros((1024, 1024), np.bool_) for _ in range(3)]
    regions[0][100:300, 640:900] = regions[1][250:400, 600:700] = regions[2][900:, 1000:] = True
    root = siim(tmp_path / "siim", regions, release)
    names = ["1.2.3", "1.2.4", "1.2.5"] if release == 1 else ["ID_3", "ID_4", "ID_5"]
    index = run("siim", root, tmp_path / "out", size=0).index
    assert findings(index) == {names[0]: {"Pneumothorax"}, names[1]: set(), names[2]: set()}
    assert list(index.patients) == ["p1", "p1", "p2"]  # from the header
    mask = index.mask(0, "Pneumothorax")
    assert mask is not None and mask.shape == (64, 64) and index.mask(1, "Pneumothorax") is None
    covered = np.logical_or.reduce(regions).reshape(64, 16, 64, 16).mean((1, 3))
    assert mask[covered > 0.6].all() and not mask[covered < 0.4].any() and mask.any()
    assert list(reasons(tmp_path / "out").values()) == ["no image file"]


@pytest.mark.parametrize(
    ("votes", "expected"),
    [(1, {"Cardiomegaly", "ILD", "Nodule/Mass"}), (2, {"Cardiomegaly", "Nodule/Mass"}), (3, {"Nodule/Mass"})],
)
def test_vinbig_kaggle_votes(tmp_path: Path, votes: Any, expected: set[str]) -> None:
    index = run("vinbig", vinbig_kaggle(tmp_path / "kaggle"), tmp_path / "out", votes=votes).index
    assert findings(index) == {"n0": set(), "v1": expected}  # R2's two boxes are one vote
    assert len(index.classes) == 14
    boxes = index.boxes["v1.png"]
    assert {box.label for box in boxes} == expected
    if votes == 2:
        assert boxes[0] == Box("Cardiomegaly", 0.25, 0.4, 0.5, 0.6)  # of 40 x 50 pixels; it ended at 60
        assert len(boxes) == 6
    assert reasons(tmp_path / "out") == {"gone": "no .dicom file under train/"}
    grey = np.asarray(ImageStore(index.paths, 32)[0], float)
    inverted = 255 - np.asarray(Image.fromarray((film(1, 50, 40, 4095) / 16).astype(np.uint8)).resize((32, 32)), float)
    assert np.corrcoef(grey.ravel(), inverted.ravel())[0, 1] > 0.99


def test_vinbig_physionet(tmp_path: Path) -> None:
    root = vinbig_physionet(tmp_path / "physionet")
    index = run("vinbig", root, tmp_path / "out").index
    assert findings(index) == {"s0": {"ILD"}, "t0": {"Cardiomegaly"}, "t1": set()}
    assert column(index, "splits") == {"s0": "test", "t0": "train", "t1": "train"}
    assert index.boxes == {
        "s0.png": [Box("ILD", 0.5, 0.5, 0.5, 0.5)],
        "t0.png": [Box("Cardiomegaly", 0.1, 0.1, 0.5, 0.5)],
    }
    index = run("vinbig", root, tmp_path / "all", vinbig_classes="all").index
    assert len(index.classes) == 27 and "Other diseases" not in index.classes
    assert findings(index) == {"s0": {"ILD", "Other disease"}, "t0": {"Cardiomegaly", "Other disease"}, "t1": set()}
    with pytest.raises(ValueError, match="needs PhysioNet"):
        run("vinbig", vinbig_kaggle(tmp_path / "kaggle"), tmp_path / "no", vinbig_classes="all")


def test_phantom(tmp_path: Path) -> None:
    options = {"phantom_train": 8, "phantom_test": 4, "phantom_size": 32}
    index = run("phantom", None, tmp_path / "out", **options).index  # type: ignore[arg-type]
    assert len(index) == 12 and index.boxes and (tmp_path / "out" / "drawn" / "ORIGIN.txt").is_file()
    again = run("phantom", None, tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(FileExistsError, match="drawn with other options"):
        run("phantom", None, tmp_path / "out", **options, phantom_seed=1)  # type: ignore[arg-type]
    assert again.converted == 0 and again.index.fingerprint() == index.fingerprint()


# --- the true layouts, where this machine has them -------------------------------------------------------------------

DATA = Path(os.environ.get("OTLOSS_DATA", Path(__file__).parents[2] / "shared" / "data"))
LAYOUTS = DATA / "layouts"
real = pytest.mark.skipif(not LAYOUTS.is_dir(), reason=f"no {LAYOUTS}; set OTLOSS_DATA to the folder that holds it")


@real
def test_true_nih(tmp_path: Path) -> None:
    index = run("nih", LAYOUTS / "NIH", tmp_path / "out").index
    assert findings(index)["00000150_002"] == {"Atelectasis", "Infiltration", "Pneumonia"}
    assert column(index, "splits")["00000001_002"] == "train" and list(index.splits).count("test") == 3
    box = index.boxes["00000193_019.png"][0]
    assert (box.label, round(box.x * 1024, 2), round(box.height * 1024, 2)) == ("Pneumonia", 703.72, 249.17)


@real
def test_true_rsna(tmp_path: Path) -> None:
    index = run("rsna", LAYOUTS / "RSNA", tmp_path / "out", nih_match=LAYOUTS / "RSNA" / "nih_match.csv").index
    assert {name[:2]: len(found) for name, found in findings(index).items()} == {"91": 1, "15": 1, "9b": 0, "35": 0}
    assert {name[:2]: len(boxes) for name, boxes in index.boxes.items()} == {"91": 2, "15": 1}
    assert sorted(index.patients) == ["218", "3", "3", "61"]
    assert len({split for split, patient in zip(index.splits, index.patients, strict=True) if patient == "3"}) == 1
    shutil.rmtree(tmp_path / "out")
    files = sorted((DATA / "cxr-dev").glob("train_val_list.txt"))
    if files:  # of the three patients, 61 alone is on that list
        options: dict[str, Any] = {"nih_match": LAYOUTS / "RSNA" / "nih_match.csv", "pretrain_list": files[0]}
        split = run("rsna", LAYOUTS / "RSNA", tmp_path / "out", overlap="split", **options).index
        assert {p for p, s in zip(split.patients, split.splits, strict=True) if s == "test"} == {"3", "218"}


@real
@pytest.mark.parametrize("table", ["train-rle.csv", "stage_2_train.csv"])
def test_true_siim_masks(tmp_path: Path, table: str) -> None:
    root = tmp_path / "siim"
    shutil.copytree(LAYOUTS / "SIIM" / "dicom-images-train", root / "dicom-images-train")
    shutil.copy(LAYOUTS / "SIIM" / table, root)
    masks = sorted((LAYOUTS / "SIIM" / "expected_masks").glob("*.png"))
    drawn = film(3, 1024, 1024).astype(np.uint8)
    for path in masks:  # their films were not to be had
        write_dicom(root / "dicom-images-train" / "s" / f"{path.stem}.dcm", drawn)
    index = run("siim", root, tmp_path / "out", size=0).index
    assert len(index) == 5 and index.labels.sum() == len(masks) == 4
    for row, name in enumerate(index.names.tolist()):
        mask, path = index.mask(row, "Pneumothorax"), LAYOUTS / "SIIM" / "expected_masks" / name
        assert (mask is not None) == path.is_file() == bool(index.labels[row, 0])
        if mask is not None:
            assert np.array_equal(mask, np.asarray(Image.open(path)) > 0)
    official = np.asarray(Image.open(index.paths[index.names.tolist().index(f"{OFFICIAL}.png")]))
    assert official.shape == (1024, 1024) and official.std() > 20


OFFICIAL = "1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819"


@real
def test_true_siim_sample_table() -> None:
    runs = read_runs(LAYOUTS / "SIIM" / "sample images" / "train-rle-sample.csv")  # no header line, spaced values
    assert len(runs) == 10 and sum(bool(parts) for parts in runs.values()) == 5


@real
def test_true_vinbig(tmp_path: Path) -> None:
    index = run("vinbig", LAYOUTS / "VinBig" / "kaggle", tmp_path / "out").index
    assert {name[:4]: found for name, found in findings(index).items()} == {
        "50a4": set(), "0004": set(), "9a50": {"Cardiomegaly"},
    }  # fmt: skip
    shapes = {path.name[:4]: Image.open(path).size for path in index.paths}
    assert shapes == {"50a4": (32, 39), "0004": (36, 32), "9a50": (32, 36)}
    assert len(index.boxes["9a5094b2563a1ef3ff50dc5c7ff71345.png"]) == 3
    headers = LAYOUTS / "VinBig" / "physionet-vindr-cxr-1.0.0"  # credentialed: headers only
    with pytest.raises(ValueError, match="not one image"):
        run("vinbig", headers, tmp_path / "none", vinbig_classes="all")


@real
def test_true_lung_masks(tmp_path: Path) -> None:
    seg = DATA / "cxr-seg"
    lines = (seg / "labels.csv").read_text().splitlines()
    table = write_text(tmp_path / "some.csv", [lines[0], *lines[1::100]])
    options: dict[str, Any] = {"patient_column": "patient_id", "split_column": "split", "label_columns": ("label",)}
    index = run(
        "csv",
        seg,
        tmp_path / "out",
        table=table,
        mask_column="mask",
        mask_label="Lung",
        size=64,
        nothing=("No Finding",),
        **options,
    ).index
    assert len(index) == 9 and set(index.classes) <= {"normal", "bacterial", "viral"}
    assert (index.labels.sum(axis=1) == 1).all()
    for row, path in enumerate(index.paths):
        mask, image = index.mask(row, "Lung"), np.asarray(Image.open(path))
        assert mask is not None and mask.shape == image.shape and 0.1 < mask.mean() < 0.6
        assert min(image.shape) == 64
