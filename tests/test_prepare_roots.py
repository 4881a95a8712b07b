"""``prepare`` reads nothing outside the data set's folder and writes nothing outside its own, whatever tables say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

pytest.importorskip("pydicom", reason="the example needs otloss[examples]")
pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from xray_layouts import film, nih, reasons, rsna, run, siim, vinbig_kaggle, vinbig_physionet, write_png, write_text

from examples.optiml.data.index import INDEX_FILE, mask_path, read_index
from examples.optiml.data.prepare import table

#: Cells that lead to ``outside/secret.png`` from a data set in ``own``; ``{outside}`` is that folder.
LEADING_OUT = (
    "../outside/secret.png", "a/../../outside/secret.png", "./.././outside/secret.png", "..\\outside\\secret.png",
    "{outside}/secret.png", "/{outside}/secret.png", "link.png", "a/link.png", "chain.png", "door/secret.png",
    "door/../secret.png", "a/../door/secret.png",
)  # fmt: skip
#: Cells that name no file.
NO_FILE = ("loop.png", "dangling.png", "a", "nowhere.png", "c.png/d.png", "x" * 5000)


def own(tmp_path: Path) -> Path:
    """A data set with films, and with links out of it: to a file, to a link, to a folder; and a secret beside it."""
    root, outside = tmp_path / "own", tmp_path / "outside"
    for seed, path in enumerate((root / "a" / "x.png", root / "c.png", outside / "secret.png", outside / "m.png")):
        write_png(path, seed)
    write_png(tmp_path / "secret.png", 9)  # where door/.. leads
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "a" / "link.png").symlink_to("../../outside/secret.png")
    (root / "chain.png").symlink_to("link.png")
    (root / "door").symlink_to(outside, target_is_directory=True)
    (root / "loop.png").symlink_to("loop.png")
    (root / "dangling.png").symlink_to(outside / "gone.png")
    (root / "inside.png").symlink_to("a/x.png")
    return root


def prepared(root: Path, rows: list[str], out: Path, **options: Any) -> dict[str, str]:
    """What a table of these rows makes of the films; the reasons why films were left out."""
    path = write_text(root / "T.csv", ["image,mask", *rows])
    run("csv", root, out, table=path, mask_column="mask", **options)
    return reasons(out)


def seen(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*.png")}


@pytest.mark.parametrize("cell", LEADING_OUT)
@pytest.mark.parametrize("side", ["image", "mask"])
def test_a_cell_that_leads_out_is_refused(tmp_path: Path, cell: str, side: str) -> None:
    root = own(tmp_path)
    path = cell.format(outside=(tmp_path / "outside").as_posix())
    row = f"{path}," if side == "image" else f"a/x.png,{path}"
    skipped = prepared(root, ["c.png,", row], tmp_path / "out")
    assert sum(reason.startswith("refused: ") and f"leaves {root}" in reason for reason in skipped.values()) == 1
    assert seen(tmp_path / "out") == {"images/c.png"}
    before = {"own", "outside", "out", "secret.png"}
    assert {entry.name for entry in tmp_path.iterdir()} == before


@pytest.mark.parametrize("cell", NO_FILE, ids=lambda cell: cell[:20])
@pytest.mark.parametrize("side", ["image", "mask"])
def test_a_cell_that_names_no_file_is_left_out(tmp_path: Path, cell: str, side: str) -> None:
    root = own(tmp_path)
    skipped = prepared(root, ["c.png,", f"{cell}," if side == "image" else f"a/x.png,{cell}"], tmp_path / "out")
    assert seen(tmp_path / "out") == {"images/c.png"}
    reason = "no file: " if cell != "dangling.png" else "refused: "
    assert sum(text.startswith(reason) for text in skipped.values()) == 1, skipped


def test_what_stays_inside_is_read(tmp_path: Path) -> None:
    """Dots and links that end below the root; and the root itself may be a link."""
    root = own(tmp_path)
    (tmp_path / "alias").symlink_to(root, target_is_directory=True)
    rows = ["inside.png,a/../c.png", "a/../c.png,", f"{root / 'a' / 'x.png'},"]
    for number, folder in enumerate((root, tmp_path / "alias")):
        out = tmp_path / f"out{number}"
        skipped = prepared(folder, rows, out)
        assert not any(reason.startswith(("refused", "no file")) for reason in skipped.values())
        assert len(read_index(out)) == 3 and sum(name.startswith("masks/") for name in seen(out)) == 1


LAYOUTS = {
    "nih": (nih, "nih", "images_001/images/00000001_000.png"),
    "rsna": (rsna, "rsna", "stage_2_train_images/bb.dcm"),
    "siim": (lambda root: siim(root, [film(0, 64, 64) > 100]), "siim", "dicom-images-train/9.1/8.1/1.2.4.dcm"),
    "kaggle": (vinbig_kaggle, "vinbig", "train/n0.dicom"),
    "physionet": (vinbig_physionet, "vinbig", "train/t1.dicom"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_film_of_an_official_layout_that_is_a_link_out_is_refused(tmp_path: Path, layout: str) -> None:
    make, dataset, name = LAYOUTS[layout]
    root, link = make(tmp_path / "own"), tmp_path / "own" / name
    link.rename(tmp_path / link.name)
    link.symlink_to(tmp_path / link.name)
    result = run(dataset, root, tmp_path / "out")
    skipped = reasons(tmp_path / "out")
    assert skipped[f"{link.stem}.png"].startswith("refused: ")
    assert sum(reason.startswith("refused") for reason in skipped.values()) == 1
    assert len(result.index) and f"{link.stem}.png" not in result.index.names


def test_an_outline_of_an_official_layout_that_is_a_link_out_is_refused(tmp_path: Path) -> None:
    root = nih(tmp_path / "own")
    write_png(tmp_path / "outside" / "00000001_000.png")
    (root / "masks").mkdir()
    (root / "masks" / "Lung").symlink_to(tmp_path / "outside", target_is_directory=True)
    run("nih", root, tmp_path / "out")
    assert reasons(tmp_path / "out")["00000001_000.png"].startswith("refused: ")
    assert not (tmp_path / "out" / "masks").exists()


ODD = (
    "../x.png", "a/../../b.png", "/etc/x.png", "..\\y.png", "..", "...", ".", "a/..", "a//", "\0.png", "C:\\d.png",
    "../masks/z.png", "images/../../../w.png",
)  # fmt: skip


def test_names_to_write_are_names_of_files() -> None:
    """Alone, and among others that take the paths' folders into the names."""
    images = pd.Series([*ODD, "one/x.png", "two/x.png"])
    alone = [table._names(Path("T.csv"), images[k : k + 1].reset_index(drop=True))[0] for k in range(len(images))]
    for name in (*alone, *table._names(Path("T.csv"), images)):
        assert Path(name).name == name and name.endswith(".png") and not set("/\\\0") & set(name), name


@pytest.mark.parametrize("label", ["..", "../..", "/etc", ".", "", "a/../../b", "..\\c", "Lung/../.."])
def test_an_outline_lies_in_its_folder(tmp_path: Path, label: str) -> None:
    path = mask_path(tmp_path, label, "x.png")
    assert path.resolve().is_relative_to(tmp_path / "masks") and path.name == "x.png"


def test_a_prepared_folder_is_read_from_its_own_images(tmp_path: Path) -> None:
    """An index that somebody has written by hand names no other file."""
    root = own(tmp_path)
    prepared(root, ["c.png,", "a/x.png,"], tmp_path / "out")
    index = tmp_path / "out" / INDEX_FILE
    for name in ("../../outside/secret.png", str(tmp_path / "outside" / "secret.png"), ".."):
        changed = index.read_text().replace("c.png", name, 1)
        (tmp_path / "out" / INDEX_FILE).write_text(changed)
        with pytest.raises(FileNotFoundError, match="1 images are gone"):
            read_index(tmp_path / "out")
        index.write_text(changed.replace(name, "c.png", 1))
    assert len(read_index(tmp_path / "out")) == 2
