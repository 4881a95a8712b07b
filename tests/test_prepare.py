"""``prepare``: every layout with its traps, interruptions, bad files, and paths that lead elsewhere."""

from __future__ import annotations

import csv
import errno
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
from xray_layouts import film, nih, rsna, siim, vinbig_kaggle, vinbig_physionet, write_dicom, write_png, write_text

from examples.optiml.data import Box, ChestIndex, ImageStore, read_index
from examples.optiml.layout import PhantomConfig, write_phantoms
from examples.optiml.prepare.command import READERS, Prepared, main, prepare
from examples.optiml.prepare.config import PrepareConfig
from examples.optiml.prepare.siim import read_runs


def run(dataset: Any, root: Path, out: Path, **options: Any) -> Prepared:
    return prepare(PrepareConfig(dataset, out, root, **{"workers": 1, "size": 32, **options}))


def findings(index: ChestIndex) -> dict[str, set[str]]:
    names = [name.removesuffix(".png") for name in index.names.tolist()]
    return {
        name: {index.classes[c] for c in np.flatnonzero(row)} for name, row in zip(names, index.labels, strict=True)
    }


def column(index: ChestIndex, field: str) -> dict[str, str]:
    names = [name.removesuffix(".png") for name in index.names.tolist()]
    return dict(zip(names, getattr(index, field).tolist(), strict=True))


def reasons(out: Path) -> dict[str, str]:
    with (out / "skipped.csv").open(newline="") as file:
        return {row["item"]: row["reason"] for row in csv.DictReader(file)}


# --- the layouts -----------------------------------------------------------------------------------------------------


def test_nih(tmp_path: Path) -> None:
    result = run("nih", nih(tmp_path / "nih"), tmp_path / "out")
    index = result.index
    assert findings(index) == {
        "00000001_000": {"Cardiomegaly"}, "00000001_001": {"Cardiomegaly", "Emphysema"}, "00000002_000": set(),
        "00000003_000": {"Hernia"}, "00000004_000": {"Infiltration", "Nodule"},
    }  # fmt: skip
    assert index.boxes == {"00000004_000.png": [Box("Infiltration", 0.25, 0.5, 0.125, 0.0625)]}
    assert list(index.patients) == ["1", "1", "2", "3", "4"]
    assert list(index.splits) == ["train"] * 4 + ["test"]
    assert reasons(tmp_path / "out") == {"00000005_000.png": "no image file under images*/"}
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
    assert again.converted == 0 and again.index.fingerprint() == index.fingerprint()


# --- a user's own table ----------------------------------------------------------------------------------------------


def own(root: Path, *rows: str, header: str = "file,who,part,hospital,outline,mass,tb=2,words") -> Path:
    for seed, name in enumerate(("a/x.png", "b/x.png", "c.png", "d.png", "e.png")):
        write_png(root / name, seed)
    Image.fromarray((film(0) > 100).astype(np.uint8) * 255).save(root / "m.png")
    Image.new("L", (40, 20)).save(root / "wide.png")
    write_png(root.parent / "secret.png")
    (root / "link.png").symlink_to(root.parent / "secret.png")
    return write_text(root / "T.csv", [header, *rows])


OWN: dict[str, Any] = {
    "image_column": "file", "patient_column": "who", "split_column": "part", "source_column": "hospital",
    "mask_column": "outline", "mask_label": "../Lung", "label_columns": ("mass=Mass", "tb=2", "words"),
}  # fmt: skip


def test_csv(tmp_path: Path) -> None:
    table = own(
        tmp_path / "own",
        "a/x.png,p1,Training,h1,m.png,1,0,Edema|Mass effect",
        "b\\x.png,p1,train,h2,,0.0,True,No Finding",
        "c.png,p2,valid,h1,,0,0,",
        "d.png,p3,test,h1,,1,no,Edema",
        "e.png,p4,holdout,h1,,1,0,",
        "c.png,,test,h1,,1,0,",
    )
    with pytest.raises(ValueError, match=r"lists an image twice, e\.g\. 'c\.png'"):
        run("csv", table.parent, tmp_path / "out", table=table, **OWN)
    write_text(table, table.read_text().splitlines()[:-1])
    index = run("csv", table.parent, tmp_path / "out", table=table, **OWN).index
    assert index.classes == ("Mass", "tb=2", "Edema", "Mass effect")
    assert findings(index) == {
        "a__x": {"Mass", "Edema", "Mass effect"},
        "b__x": {"tb=2"},
        "c": set(),
        "d": {"Mass", "Edema"},
    }
    assert column(index, "splits") == {"a__x": "train", "b__x": "train", "c": "val", "d": "test"}
    assert column(index, "patients") == {"a__x": "p1", "b__x": "p1", "c": "p2", "d": "p3"}
    assert column(index, "sources") == {"a__x": "h1", "b__x": "h2", "c": "h1", "d": "h1"}
    mask = index.mask(0, "../Lung")
    assert mask is not None and mask.shape == (32, 32) and 0.3 < mask.mean() < 0.9
    assert not (tmp_path / "Lung").exists() and not (tmp_path / "out" / "Lung").exists()
    assert "split 'holdout' is none of train" in reasons(tmp_path / "out")["e.png"]


@pytest.mark.parametrize("uncertain", ["refuse", "negative", "positive", "skip"])
def test_csv_blank_labels(tmp_path: Path, uncertain: Any) -> None:
    table = own(tmp_path / "own", "c.png,1", "d.png,", "e.png,-1.0", header="image,mass")
    options: dict[str, Any] = {"table": table, "label_columns": ("mass",), "uncertain": uncertain}
    if uncertain == "refuse":
        with pytest.raises(ValueError, match=r"column 'mass' is '' for 'd\.png'.*--uncertain"):
            run("csv", table.parent, tmp_path / "out", **options)
        return
    expected = {"negative": [1, 0, 0], "positive": [1, 1, 1], "skip": [1]}[uncertain]
    assert run("csv", table.parent, tmp_path / "out", **options).index.labels[:, 0].tolist() == expected


def test_paths_that_leave_the_root_are_refused(tmp_path: Path) -> None:
    table = own(
        tmp_path / "own",
        "c.png,", "../secret.png,", f"{tmp_path / 'secret.png'},", "link.png,", "..\\secret.png ,", "a/../d.png,",
        "e.png,../secret.png", "nowhere.png,", "b/x.png,wide.png",
        header="image,outline",
    )  # fmt: skip
    options: dict[str, Any] = {"table": table, "mask_column": "outline", "image_column": "image"}
    with pytest.raises(ValueError, match="twice"):  # ../secret and ..\secret are the same
        run("csv", table.parent, tmp_path / "out", **options)
    write_text(table, [line for line in table.read_text().splitlines() if "\\" not in line])
    result = run("csv", table.parent, tmp_path / "out", **options)
    skipped = reasons(tmp_path / "out")
    refused = {name for name, reason in skipped.items() if reason.startswith("refused: ") and "leaves" in reason}
    assert len(refused) == 4 and any("link" in name for name in refused)
    assert sum(reason.startswith("no file") for reason in skipped.values()) == 1
    assert sum("wide.png is 40x20, its film 40x40" in reason for reason in skipped.values()) == 1
    assert len(result.index) == 2 and len(skipped) == 6
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.png")}
    assert written == {"own", "out", "secret.png"}


def test_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    table = own(tmp_path / "own", "c.png,p1,train", "d.png,p1,test", header="image,who,part")
    with pytest.raises(ValueError, match="patient 'p1' has images in test and train"):
        run("csv", table.parent, tmp_path / "out", table=table, patient_column="who", split_column="part")


def test_drawn_splits_go_by_patient_and_stay(tmp_path: Path) -> None:
    root = tmp_path / "own"
    rows = []
    for patient in range(60):
        for visit in range(1 + patient % 3):  # a third of the patients have one image
            rows.append(f"{patient}_{visit}.png,{patient}")
            write_png(root / f"{patient}_{visit}.png", patient, side=8)
    table = write_text(root / "T.csv", ["image,who", *rows])
    options: dict[str, Any] = {"table": table, "patient_column": "who", "val_fraction": 0.2, "test_fraction": 0.3}
    index = run("csv", root, tmp_path / "out", **options).index
    groups = [set(index.patients[index.splits == name]) for name in ("train", "val", "test")]
    assert sum(map(len, groups)) == 60 == len(set.union(*groups))
    assert 20 < len(groups[0]) < 40 and 5 < len(groups[1]) < 20 and 10 < len(groups[2]) < 27
    assert read_index(tmp_path / "out", 0.9, 7).fingerprint() == index.fingerprint()  # it is on disk
    other = run("csv", root, tmp_path / "other", **options, split_seed=1).index
    assert not np.array_equal(other.splits, index.splits)
    # A patient's split does not depend on who else is there.
    write_text(table, ["image,who", *rows[40:]])
    fewer = run("csv", root, tmp_path / "fewer", **options).index
    before = dict(zip(index.names.tolist(), index.splits.tolist(), strict=True))
    assert all(before[name] == split for name, split in zip(fewer.names.tolist(), fewer.splits.tolist(), strict=True))


# --- the overlap with NIH --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "json"])
def test_overlap(tmp_path: Path, form: str) -> None:
    root = rsna(tmp_path / "rsna")
    films = {"aa": "00000007_001.png", "bb": "00000008_000.png"}  # cc is not matched
    if form == "csv":
        match = write_text(
            tmp_path / "match.csv", ["patientId,nih_image,mse", *(f"{k},{v},1.5" for k, v in films.items())]
        )
    else:
        rows = [{"subset_img_id": k, "img_id": v, "SOPInstanceUID": f"1.{k}"} for k, v in films.items()]
        (match := tmp_path / "match.json").write_text(json.dumps(rows))
    seen = write_text(tmp_path / "train_val_list.txt", ["00000007_000.png", "00000009_000.png"])
    options = {"nih_match": match, "pretrain_list": seen}

    kept = run("rsna", root, tmp_path / "keep", **options).index
    assert column(kept, "patients") == {"aa": "7", "bb": "8", "cc": "cc"}
    split = run("rsna", root, tmp_path / "split", **options, overlap="split").index
    assert column(split, "splits") == {"aa": "train", "bb": "test", "cc": "train"}
    dropped = run("rsna", root, tmp_path / "drop", **options, overlap="drop").index
    assert list(dropped.names) == ["bb.png"]
    assert reasons(tmp_path / "drop")["aa"] == "overlap: NIH patient 7 is on the pretraining list"
    assert "not in nih_match" in reasons(tmp_path / "drop")["cc"]

    # The pretraining list may be the folder that pretraining reads: here patients 1 to 3 train, 4 does not.
    films = {"aa": "00000004_000.png", "bb": "00000001_009.png"}
    match = write_text(tmp_path / "other.csv", ["id,film", *(f"{k},{v}" for k, v in films.items())])
    options = {"nih_match": match, "pretrain_list": nih(tmp_path / "nih")}
    split = run("rsna", root, tmp_path / "folder", **options, overlap="split").index
    assert column(split, "splits") == {"aa": "test", "bb": "train", "cc": "train"}


# --- stopping and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_preparation_goes_on(tmp_path: Path, workers: int) -> None:
    raw = write_phantoms(PhantomConfig(tmp_path / "raw", train=40, test=20, size=32))
    config = PrepareConfig("nih", tmp_path / "out", raw, size=16, workers=workers)

    def stop(done: int, total: int) -> None:
        assert total == 60
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, stop)
    with pytest.raises(FileNotFoundError, match="not prepared to the end"):
        read_index(tmp_path / "out")
    with (tmp_path / "out" / "progress.jsonl").open("a") as log:
        log.write('{"name": "000')  # torn by a crash
    (tmp_path / "out" / "images" / "00000001_000.png").unlink()
    resumed = prepare(config)
    assert resumed.converted == 54  # seven were done, of which one got lost
    whole = run("nih", raw, tmp_path / "whole", size=16)
    assert whole.converted == 60
    for path in sorted((tmp_path / "whole").rglob("*")):
        if path.is_file() and path.name not in ("progress.jsonl",):
            assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes(), path
    assert prepare(config).converted == 0
    assert not list((tmp_path / "out").rglob("*.part"))


def test_a_corrupt_file_is_reported_and_tried_again(tmp_path: Path) -> None:
    root = nih(tmp_path / "nih")
    path = root / "images_001" / "images" / "00000001_001.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    result = run("nih", root, tmp_path / "out")
    assert len(result.index) == 4 and "00000001_001.png" not in result.index.names
    assert reasons(tmp_path / "out")["00000001_001.png"].startswith("unreadable: ")
    path.write_bytes(whole)
    result = run("nih", root, tmp_path / "out")
    assert len(result.index) == 5 and result.converted == 1
    assert list(reasons(tmp_path / "out")) == ["00000005_000.png"]
    write_png(path, 17)  # another film under the same name
    assert run("nih", root, tmp_path / "out").converted == 1


def test_a_full_disk_stops_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, save, calls = nih(tmp_path / "nih"), Image.Image.save, []

    def full(self: Image.Image, path: Path, **options: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(OSError, match="No space left"):
            run("nih", root, tmp_path / "out")
    assert run("nih", root, tmp_path / "out").converted == 3


def test_another_preparation_is_not_overwritten(tmp_path: Path) -> None:
    root = nih(tmp_path / "nih")
    run("nih", root, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=r"different preparation \(size is 32 there and 16 here\)"):
        run("nih", root, tmp_path / "out", size=16)
    with pytest.raises(FileExistsError, match=r"different preparation \(dataset\)"):
        run("rsna", rsna(tmp_path / "rsna"), tmp_path / "out")
    entry = root / "Data_Entry_2017_v2020.csv"
    text = entry.read_bytes()
    entry.write_bytes(text.replace(b"Hernia", b"Nodule"))
    with pytest.raises(FileExistsError, match=r"Data_Entry_2017_v2020\.csv is"):
        run("nih", root, tmp_path / "out")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    entry.write_bytes(text)
    moved = shutil.move(root, tmp_path / "moved")
    assert run("nih", Path(moved), tmp_path / "out").index.fingerprint()  # where the data lies does not matter
    with pytest.raises(FileExistsError, match="not made by prepare"):
        run("rsna", tmp_path / "rsna", tmp_path / "moved")
    with pytest.raises(ValueError, match="own folder"):
        run("rsna", tmp_path / "rsna", tmp_path / "rsna")


def test_a_lost_image_is_noticed_on_reading(tmp_path: Path) -> None:
    index = run("nih", nih(tmp_path / "nih"), tmp_path / "out").index
    index.paths[2].unlink()
    with pytest.raises(FileNotFoundError, match=r"1 images are gone, e\.g\. 00000002_000\.png"):
        read_index(tmp_path / "out")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(PrepareConfig("rsna", tmp_path / "out", rsna(tmp_path / "rsna"), workers=1))
    text = capsys.readouterr().out
    assert "3 images read now" in text and "come from NIH" in text
    assert "skipped 1: unreadable" in text and "skipped.csv" in text
    with pytest.raises(SystemExit, match=r"prepare: .* holds a different preparation"):
        main(PrepareConfig("rsna", tmp_path / "out", tmp_path / "rsna", size=8, workers=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "nih", "root": None}, "needs --root"),
        ({"dataset": "csv"}, "needs --table"),
        ({"size": -1}, "size must be"),
        ({"test_fraction": 0.9, "val_fraction": 0.1}, "less than 1"),
        ({"overlap": "drop"}, "needs nih_match"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**{"dataset": "rsna", "out": tmp_path, "root": tmp_path, **options})


@pytest.mark.parametrize("dataset", ["nih", "rsna", "siim", "vinbig", "csv"])
def test_an_empty_folder_is_named(tmp_path: Path, dataset: Any) -> None:
    assert set(READERS) == {"nih", "rsna", "siim", "vinbig", "csv", "phantom"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        run(dataset, tmp_path / "empty", tmp_path / "out", table=tmp_path / "empty" / "T.csv")


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    root = rsna(tmp_path / "rsna")
    shutil.rmtree(root / "stage_2_train_images")
    with pytest.raises(ValueError, match=r"not one image could be used\. Most often: no image file"):
        run("rsna", root, tmp_path / "out")
    write_dicom(root / "stage_2_train_images" / "bb.dcm", film(0).astype(np.uint8))
    assert len(run("rsna", root, tmp_path / "out").index) == 1  # one image, one patient, no positive


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
    if files:  # patients 3 and 61 or 218 are test patients of NIH
        options: dict[str, Any] = {"nih_match": LAYOUTS / "RSNA" / "nih_match.csv", "pretrain_list": files[0]}
        split = run("rsna", LAYOUTS / "RSNA", tmp_path / "out", overlap="split", **options).index
        assert {p for p, s in zip(split.patients, split.splits, strict=True) if s == "test"} == {"3", "61"}


@real
@pytest.mark.parametrize("table", ["train-rle.csv", "stage_2_train.csv"])
def test_true_siim_masks(tmp_path: Path, table: str) -> None:
    root = tmp_path / "siim"
    shutil.copytree(LAYOUTS / "SIIM" / "dicom-images-train", root / "dicom-images-train")
    shutil.copy(LAYOUTS / "SIIM" / table, root)
    masks = sorted((LAYOUTS / "SIIM" / "expected_masks").glob("*.png"))
    blank = np.zeros((1024, 1024), np.uint8)
    for path in masks:  # their films were not to be had
        write_dicom(root / "dicom-images-train" / "s" / f"{path.stem}.dcm", blank)
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
        "csv", seg, tmp_path / "out", table=table, mask_column="mask", mask_label="Lung", size=64, **options
    ).index
    assert len(index) == 9 and set(index.classes) <= {"normal", "bacterial", "viral"}
    assert (index.labels.sum(axis=1) == 1).all()
    for row, path in enumerate(index.paths):
        mask, image = index.mask(row, "Lung"), np.asarray(Image.open(path))
        assert mask is not None and mask.shape == image.shape and 0.1 < mask.mean() < 0.6
        assert min(image.shape) == 64
