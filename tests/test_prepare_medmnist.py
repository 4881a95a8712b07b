"""``prepare --dataset medmnist``: files of MedMNIST's form, made here, streamed, interrupted, damaged and refused."""

from __future__ import annotations

import json
import os
import tracemalloc
import zipfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("pydicom", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from PIL import Image
from xray_layouts import column, findings, run

from examples.optiml.__main__ import cli
from examples.optiml.data.index import NIH_CLASSES, read_index
from examples.optiml.data.prepare import convert, medmnist
from examples.optiml.data.prepare.command import prepare
from examples.optiml.data.prepare.convert import Done, Job
from examples.optiml.data.prepare.listing import DamagedSource, Film
from examples.optiml.data.prepare.settings import PrepareConfig

Arrays = dict[str, NDArray[Any]]
SAVE = {"compressed": np.savez_compressed, "stored": np.savez}


def arrays(columns: int = 14, size: int = 28, counts: tuple[int, int, int] = (20, 6, 9)) -> Arrays:
    """Films that all differ, and labels of both kinds in every column."""
    rng = np.random.default_rng(0)
    made: Arrays = {}
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        made[f"{split}_images"] = rng.integers(0, 256, (count, size, size), np.uint8)
        labels = rng.integers(0, 2, (count, columns), np.uint8)
        labels[0], labels[1] = 0, 1
        made[f"{split}_labels"] = labels
    return made


def save(path: Path, made: Arrays, form: str = "compressed") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    SAVE[form](path, **made)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """All that was written, but for what says how far it is."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "progress.jsonl"
    }


@pytest.mark.parametrize("form", SAVE)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("films", [1, 7, 1000], ids=lambda films: f"{films}-at-once")
def test_chestmnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, workers: int, films: int) -> None:
    monkeypatch.setattr(medmnist, "PIECE", films * 28 * 28)
    made = arrays()
    root = save(tmp_path / "chestmnist.npz", made, form)
    result = run("medmnist", root, tmp_path / "out", workers=workers, size=256)
    index = read_index(tmp_path / "out", val_fraction=0.5)  # the file has validation films: none are cut from train
    assert result.converted == 35 and not result.skipped and index.classes == NIH_CLASSES
    assert index.fingerprint() == result.index.fingerprint()
    for split in ("train", "val", "test"):
        part = index.split(split)
        np.testing.assert_array_equal(part.labels, made[f"{split}_labels"])
        images = [Image.open(path) for path in part.paths]
        assert {image.mode for image in images} == {"L"}
        np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), made[f"{split}_images"])
    assert len(set(index.patients.tolist())) == 35
    assert any("every film counts as its own patient" in note for note in result.notes)
    assert prepare(PrepareConfig("medmnist", tmp_path / "out", root, workers=workers)).converted == 0


def test_pneumoniamnist(tmp_path: Path) -> None:
    made = arrays(columns=1, size=64)
    made |= {"extra": np.zeros(3), "train_labels": made["train_labels"].astype(np.int64)}
    root = save(tmp_path / "PneumoniaMNIST_64 (1).npz", made)
    index = run("medmnist", root, tmp_path / "out", size=32).index
    assert index.classes == ("Pneumonia",)
    assert findings(index)["train-000000"] == set() and findings(index)["train-000001"] == {"Pneumonia"}
    assert column(index, "splits")["val-000002"] == "val"
    assert Image.open(index.paths[0]).size == (32, 32)  # reduced by --size as all other films are


def test_the_labels_are_in_the_order_of_medmnist() -> None:
    """MedMNIST's own table (``info.py``): NIH's order, in lower case, with one name cut short."""
    names = [
        "atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia", "pneumothorax",
        "consolidation", "edema", "emphysema", "fibrosis", "pleural", "hernia",
    ]  # fmt: skip
    assert [name.lower() for name in medmnist.FINDINGS["chestmnist"]] == [
        {"pleural": "pleural_thickening"}.get(name, name) for name in names
    ]


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", SAVE)
def test_memory_holds_a_few_films(tmp_path: Path, form: str) -> None:
    """The peak of everything that Python allocates, which is the same in every run.

    At most three pieces of 1 MiB are alive: the one before, the bytes so far of the next, and those being added to
    them; a fourth MiB is for all else that does not grow with the file. Each film adds its record, its result and
    their texts, about 1 kB, for which 2 kB are allowed; its pixels would add 50 kB.
    """
    count, side = 300, 224
    made = arrays(size=side, counts=(2, 2, 2))
    made["train_images"] = np.broadcast_to(np.arange(side, dtype=np.uint8), (count, side, side))
    made["train_labels"] = np.zeros((count, 14), np.uint8)
    root = save(tmp_path / "chestmnist_224.npz", made, form)
    config = PrepareConfig("medmnist", tmp_path / "out", root, workers=1)
    prepare(PrepareConfig("medmnist", tmp_path / "warm", save(tmp_path / "chestmnist.npz", arrays()), workers=1))
    tracemalloc.start()
    try:
        assert prepare(config).converted == count + 4
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    limit = 4 * 2**20 + 2_000 * count
    assert limit < count * side * side / 3  # so that one array, or a third of it, would be noticed
    assert peak < limit


def test_workers_are_given_a_few_films_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    class Pool:
        def submit(self, function: Any, jobs: list[Job]) -> Future[list[Done]]:
            future: Future[list[Done]] = Future()
            future.set_result(function(jobs))
            return future

    def jobs() -> Any:
        for number in range(1000):
            drawn.append(number)
            yield Job(Film(f"{number}.png", Path()), Path(), 0)

    monkeypatch.setattr(convert, "convert", lambda job: Done(job.record.name, ""))
    results = convert._map_ahead(Pool(), jobs(), batch=4, ahead=5)  # type: ignore[arg-type]
    for number, done in enumerate(results):
        assert done.name == f"{number}.png"
        assert len(drawn) - number <= 4 * (5 + 1)
    assert len(drawn) == number + 1 == 1000


# --- stopping and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", SAVE)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_preparation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, workers: int
) -> None:
    monkeypatch.setattr(medmnist, "PIECE", 4 * 28 * 28)
    root = save(tmp_path / "chestmnist.npz", arrays(), form)
    config = PrepareConfig("medmnist", tmp_path / "out", root, workers=workers)
    whole = prepare(PrepareConfig("medmnist", tmp_path / "whole", root, workers=1))

    def stop(done: int, total: int) -> None:
        assert total == 35
        if done == 23:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, stop)
    with pytest.raises(FileNotFoundError, match="not prepared to the end"):
        read_index(tmp_path / "out")
    (tmp_path / "out" / "images" / "train-000005.png").unlink()
    opened: list[str] = []
    open_member = zipfile.ZipFile.open

    def count_opened(self: zipfile.ZipFile, name: str | zipfile.ZipInfo, *options: Any) -> Any:
        opened.append(name if isinstance(name, str) else name.filename)
        return open_member(self, name, *options)

    monkeypatch.setattr(zipfile.ZipFile, "open", count_opened)
    resumed = prepare(config)
    assert resumed.converted == 13  # 23 were done, of which one got lost
    assert resumed.index.fingerprint() == whole.index.fingerprint()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert opened.count("train_images.npy") == 2  # its header, and its films
    opened.clear()
    assert prepare(config).converted == 0
    assert opened.count("train_images.npy") == 1


def test_another_file_is_not_mixed_in(tmp_path: Path) -> None:
    made = arrays()
    run("medmnist", save(tmp_path / "chestmnist.npz", made), tmp_path / "out")
    moved = (tmp_path / "chestmnist.npz").rename(tmp_path / "chestmnist_copy.npz")
    assert run("medmnist", moved, tmp_path / "out").converted == 0  # its name and place do not matter
    before = contents(tmp_path / "out")
    made["val_labels"] = 1 - made["val_labels"]
    other = save(tmp_path / "other" / "chestmnist.npz", made)
    with pytest.raises(FileExistsError, match=r"different preparation \(val_labels is "):
        run("medmnist", other, tmp_path / "out")
    pneumonia = save(tmp_path / "pneumoniamnist.npz", arrays(columns=1))
    with pytest.raises(
        FileExistsError,
        match=r"different preparation \(classes is Atelectasis, .* and 11 more there and Pneumonia here\)",
    ):
        run("medmnist", pneumonia, tmp_path / "out")
    assert contents(tmp_path / "out") == before


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", SAVE)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, form: str, share: float) -> None:
    root = save(tmp_path / "chestmnist.npz", arrays(), form)
    root.write_bytes(root.read_bytes()[: int(share * root.stat().st_size)])
    with pytest.raises(DamagedSource, match=r"chestmnist\.npz is cut off or damaged .*; download it again"):
        run("medmnist", root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", SAVE)
@pytest.mark.parametrize("place", [0.02, 0.5, 0.98], ids=["begin", "middle", "end"])
@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_of_a_damaged_array_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, place: float, workers: int
) -> None:
    monkeypatch.setattr(medmnist, "PIECE", 2 * 28 * 28)
    root = save(tmp_path / "chestmnist.npz", arrays(), form)
    whole, stat = root.read_bytes(), root.stat()
    with zipfile.ZipFile(root) as archive:
        info = archive.getinfo("test_images.npy")
    name_end = whole.index(b"test_images.npy", info.header_offset) + len("test_images.npy")
    # 200 bytes are more than the array's header: the byte that is flipped is one of the pixels.
    at = name_end + 200 + int(place * (info.compress_size - 400))
    root.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    os.utime(root, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for _ in range(2):  # the same command again must not take what it left for good
        with pytest.raises(DamagedSource, match="download it again"):
            run("medmnist", root, tmp_path / "out", workers=workers)
        assert not (tmp_path / "out" / "index.csv").exists()
    root.write_bytes(whole)
    os.utime(root, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # some downloads keep the server's time
    assert run("medmnist", root, tmp_path / "out").converted == 35
    run("medmnist", root, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# --- what is no such file --------------------------------------------------------------------------------------------

RGB = np.zeros((20, 28, 28, 3), np.uint8)
REFUSALS: dict[str, tuple[Arrays | None, str]] = {
    "no labels": ({"val_labels": None}, "has no array 'val_labels'.* this one train_images, train_labels, val_images"),
    "colour": ({"train_images": RGB}, r"train_images has the shape \(20, 28, 28, 3\), so colour"),
    "flat": ({"train_images": np.zeros((20, 784), np.uint8)}, r"must be \(number, height, width\)"),
    "empty films": ({"train_images": np.zeros((20, 0, 28), np.uint8)}, r"must be \(number, height, width\)"),
    "float films": ({"test_images": np.zeros((9, 28, 28))}, "test_images is float64; it must be uint8"),
    "objects": ({"train_images": np.full(3, None)}, "train_images holds Python objects"),
    "fortran": ({"train_images": np.asfortranarray(np.zeros((20, 28, 28), np.uint8))}, "ascontiguousarray"),
    "sizes": ({"val_images": np.zeros((6, 64, 64), np.uint8)}, r"\(64, 64\) in val_images but \(28, 28\) in train"),
    "too few labels": ({"train_labels": np.zeros((19, 14), np.uint8)}, r"\(19, 14\).* must be \(20, 14\)"),
    "other findings": ({"train_labels": np.zeros((20, 1), np.uint8)}, r"\(20, 1\).* must be \(20, 14\)"),
    "text labels": ({"train_labels": np.full((20, 14), "yes")}, "train_labels is <U3; it must be uint8"),
    "label 2": ({"test_labels": np.full((9, 14), 2, np.uint8)}, "test_labels holds 2 for film 0; labels must be 0 or"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_another_kind_of_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    changed, message = REFUSALS[case]
    made = {name: array for name, array in {**arrays(), **(changed or {})}.items() if array is not None}
    root = save(tmp_path / "chestmnist.npz", made)
    options = ["--root", str(root), "--out", str(tmp_path / "out"), "--workers", "1"]
    with pytest.raises(SystemExit, match=f"^prepare: .*{message}") as stop:
        cli(["prepare", "--dataset", "medmnist", *options])
    assert "\n" not in str(stop.value)
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_header_that_promises_more_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "chestmnist.npz"
    with zipfile.ZipFile(save(tmp_path / "whole.npz", arrays(), "stored")) as whole, zipfile.ZipFile(root, "w") as file:
        for name in whole.namelist():
            values = whole.read(name)
            if name == "train_images.npy":
                values = values.replace(b"(20, 28, 28)", b"(99, 28, 28)")
            file.writestr(name, b"no array" if name == "val_images.npy" else values)
    with pytest.raises(DamagedSource, match=r"train_images is not as long as its shape \(99, 28, 28\) says"):
        medmnist.read_medmnist(PrepareConfig("medmnist", tmp_path / "out", root))
    with zipfile.ZipFile(root) as archive, pytest.raises(ValueError, match="val_images has no header that NumPy wrote"):
        medmnist._member(archive, root, "val_images")


def test_a_file_of_another_name_is_refused(tmp_path: Path) -> None:
    """BreastMNIST has the very form of PneumoniaMNIST: grey films, one column of 0 and 1."""
    with pytest.raises(ValueError, match=r"breastmnist\.npz: the name must begin with chestmnist or pneumoniamnist"):
        run("medmnist", save(tmp_path / "breastmnist.npz", arrays(columns=1)), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no file .*chestmnist_64\.npz"):
        run("medmnist", tmp_path / "chestmnist_64.npz", tmp_path / "out")
    with pytest.raises(ValueError, match="is a folder; --root must be the file itself"):
        run("medmnist", tmp_path, tmp_path / "out")


def test_the_command_says_that_patients_are_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = save(tmp_path / "chestmnist.npz", arrays())
    cli(["prepare", "--dataset", "medmnist", "--root", str(root), "--out", str(tmp_path / "out"), "--workers", "1"])
    text = capsys.readouterr().out
    assert "35 images read now" in text and "every film counts as its own patient" in text and "too narrow" in text
    assert any("too narrow" in note for note in json.loads((tmp_path / "out" / "prepare.json").read_text())["notes"])
