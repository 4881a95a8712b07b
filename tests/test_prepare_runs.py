"""``prepare``: the overlap with NIH, interruptions, bad files, and the command."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="the example needs otloss[examples]")
pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from PIL import Image
from xray_layouts import column, film, nih, reasons, rsna, run, write_dicom, write_png, write_text

from examples.optiml.__main__ import cli
from examples.optiml.data.index import read_index
from examples.optiml.data.nih_writer import PhantomConfig, write_phantoms
from examples.optiml.data.prepare import READERS, convert
from examples.optiml.data.prepare.command import main, prepare
from examples.optiml.data.prepare.settings import PrepareConfig

ROOT = Path(__file__).parents[1]

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


def test_a_changed_added_or_removed_mask_is_noticed(tmp_path: Path) -> None:
    raw = write_phantoms(PhantomConfig(tmp_path / "raw", train=20, test=10, size=32))
    run("nih", raw, tmp_path / "out")
    changed = min((raw / "masks" / "Effusion").iterdir())
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save(changed)
    without = next(path for path in sorted((raw / "images").iterdir()) if path.name != changed.name)
    (raw / "masks" / "Lung").mkdir()
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save(raw / "masks" / "Lung" / without.name)
    assert run("nih", raw, tmp_path / "out").converted == 2
    for label, name in (("Effusion", changed.name), ("Lung", without.name)):
        assert np.asarray(Image.open(tmp_path / "out" / "masks" / label / name)).all()
    (raw / "masks" / "Lung" / without.name).unlink()
    assert run("nih", raw, tmp_path / "out").converted == 1
    assert not (tmp_path / "out" / "masks" / "Lung" / without.name).exists()
    assert run("nih", raw, tmp_path / "out").converted == 0


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


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left on the disk of {}. When there is room"),
        (errno.EROFS, "the disk of {} is read-only. When it can be written again"),
    ],
)
def test_the_command_says_why_it_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise OSError(number, "as the system says it")

    where = ["--root", str(nih(tmp_path / "nih")), "--out", str(tmp_path / "out"), "--workers", "1"]
    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(SystemExit) as stop:
        cli(["prepare", "--dataset", "nih", *where])
    assert stop.value.code == f"Stopped: {message.format(tmp_path / 'out')}, the same command goes on from there."


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="there are no such signals")
def test_an_interrupt_while_workers_start_is_the_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It comes where all processes of the group get it before a worker has said that it ignores it."""
    begin = convert._begin_worker

    def begun(parent: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        begin(parent)

    monkeypatch.setattr(convert, "_begin_worker", begun)
    assert run("nih", nih(tmp_path / "nih"), tmp_path / "out", workers=2).converted == 5
    assert "KeyboardInterrupt" not in capfd.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="there are no such signals")
def test_workers_end_with_a_parent_that_is_killed() -> None:
    """They hold its standard output, which is at its end once all are gone."""
    script = """
import os, signal
from concurrent.futures import ProcessPoolExecutor
from examples.optiml.data.prepare.convert import _begin_worker
pool = ProcessPoolExecutor(2, initializer=_begin_worker, initargs=(os.getpid(),))
print(*pool.map(abs, [-1, -2]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL and done.stdout == "1 2\n", done.stderr


def test_another_preparation_is_not_overwritten(tmp_path: Path) -> None:
    root = nih(tmp_path / "nih")
    run("nih", root, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=r"different preparation \(size is 32 there and 16 here\)"):
        run("nih", root, tmp_path / "out", size=16)
    with pytest.raises(FileExistsError, match=r"different preparation \(dataset is 'nih' there and 'rsna' here\)"):
        run("rsna", rsna(tmp_path / "rsna"), tmp_path / "out")
    entry = root / "Data_Entry_2017_v2020.csv"
    text = entry.read_bytes()
    entry.write_bytes(text.replace(b"Hernia", b"Nodule"))
    with pytest.raises(FileExistsError, match=r"Data_Entry_2017_v2020\.csv is"):
        run("nih", root, tmp_path / "out")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    entry.write_bytes(text)
    saved = json.loads((tmp_path / "out" / "prepare.json").read_text())
    saved["options"].pop("box_table")  # as if made before there was such an option
    (tmp_path / "out" / "prepare.json").write_text(json.dumps(saved))
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
    assert set(READERS) == {"nih", "rsna", "siim", "vinbig", "medmnist", "csv", "phantom"}
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
