"""``prepare``: a user's own table, the overlap with NIH, interruptions, bad files, and paths that lead elsewhere."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="the example needs otloss[examples]")
pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from PIL import Image
from xray_layouts import column, film, findings, nih, reasons, rsna, run, write_dicom, write_png, write_text

from examples.optiml.__main__ import cli
from examples.optiml.data import read_index
from examples.optiml.layout import PhantomConfig, write_phantoms
from examples.optiml.prepare.command import READERS, main, prepare
from examples.optiml.prepare.config import PrepareConfig

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


def test_csv_mistakes_are_named(tmp_path: Path) -> None:
    table = own(tmp_path / "own", "c.png,1,a|b", "d.png,2,", header="image,mass,x")
    for labels, message in (
        (("mass",), "column 'mass' holds '2' among 0 and 1"),
        (("mess",), "no column 'mess'; it has 'image'"),
    ):
        with pytest.raises(ValueError, match=message):
            run("csv", table.parent, tmp_path / "out", table=table, label_columns=labels)
    assert not (tmp_path / "out").exists()


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
    notes = json.loads((tmp_path / "keep" / "prepare.json").read_text())["notes"]
    assert "1 of the 4 images are of patients on the pretraining list." in notes
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
    options = ["--root", str(rsna(tmp_path / "rsna")), "--out", str(tmp_path / "out"), "--workers", "1"]
    cli(["prepare", "--dataset", "rsna", *options])
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
