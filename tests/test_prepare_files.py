"""Tables as programs save them, the wrong table of a download, and films and names that nothing else may stop."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydicom", reason="the example needs otloss[examples]")
pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from xray_layouts import (
    column,
    film,
    findings,
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

from examples.optiml.__main__ import cli
from examples.optiml.data.tables import read_rows
from examples.optiml.errors import CommandError
from examples.optiml.locking import folder_lock

LABELS: dict[str, Any] = {"label_columns": ("Mass",)}


def films(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        write_png(root / name, seed)
    return root


# --- how tables are saved --------------------------------------------------------------------------------------------

TEXT = "image,patient,Mass\r\nMüller.png,p1,1\r\nb.png,p2,0\r\n"


@pytest.mark.parametrize(
    ("content", "noted"),
    [
        (TEXT.encode(), False),
        (TEXT.encode("utf-8-sig"), False),
        (TEXT.encode("utf-16"), False),
        (TEXT.replace(",", "\t").encode("utf-16"), False),  # Excel's "Unicode text"
        (TEXT.encode("cp1252"), True),
        (TEXT.replace(",", ";").encode("cp1252"), True),
        (("sep=;\r\n" + TEXT.replace(",", ";")).encode(), False),
        (TEXT.replace("\r\n", "\r").encode(), False),  # an old Mac's line ends
        (TEXT.replace("\r\n", ",,\r\n").encode(), False),  # blank columns
        ((TEXT + ",,\r\n\r\n,,\r\n").encode(), False),  # blank rows
        (TEXT.replace("p1,", '" p1 ",').encode(), False),
    ],
)
def test_every_usual_way_to_save_a_table(tmp_path: Path, content: bytes, noted: bool) -> None:
    root = films(tmp_path / "films", "Müller.png", "b.png")
    (tmp_path / "T.csv").write_bytes(content)
    result = run("csv", root, tmp_path / "out", table=tmp_path / "T.csv", patient_column="patient", **LABELS)
    assert findings(result.index) == {"Müller": {"Mass"}, "b": set()} and not result.skipped
    assert column(result.index, "patients") == {"Müller": "p1", "b": "p2"}
    assert noted == any("T.csv is not UTF-8 and was read as Windows-1252" in note for note in result.notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04...", "is a workbook of Excel, which is not read: save it there as CSV UTF-8"),
        (b"\xd0\xcf\x11\xe0...", "is a workbook of Excel"),
        (b"image,Mass\na\0b,1\n", "it holds zero bytes.*save it as CSV UTF-8"),
        (b"image,Mass\n\x81\x8d,1\n", "is no text that can be read"),
        (b"\xff\xfea", "is no text that can be read"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (
            b"image,Mass\na.png,1,x\nb.png,0\n",
            "line 2: 3 cells under a header of 2; put quotes around a cell that holds ','",
        ),
        (b"image,Mass\na.png,1,\nb.png,0,y\n", "line 3: 3 cells under a header of 2"),
        (
            b'image,Mass\na.png,"1\nb.png,0\n',
            "the row that begins in line 2: unexpected end of data; correct its quotes",
        ),
        (b"image,Mass,Mass\na.png,1,0\n", "has two columns 'Mass': rename one"),
        (b"picture,Mass\na.png,1\n", "has no column 'image'; it has 'picture', 'Mass'"),
        (b"image,Mass\na.png,1\na.png,0\n", "lists an image twice, e.g. 'a.png': give each image one row"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_cure(
    tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = films(tmp_path / "films", "a.png", "b.png")
    (tmp_path / "T.csv").write_bytes(content)
    command = ["prepare", "--dataset", "csv", "--root", str(root), "--table", str(tmp_path / "T.csv")]
    with pytest.raises(SystemExit, match=rf"^prepare: .*T\.csv.*{message}") as stop:
        cli([*command, "--out", str(tmp_path / "out"), "--label-columns", "Mass", "--workers", "1"])
    assert "\n" not in str(stop.value) and not (tmp_path / "out").exists()


# --- the wrong table of a download -----------------------------------------------------------------------------------


def test_the_wrong_table_is_told_from_the_right_one(tmp_path: Path) -> None:
    root = rsna(tmp_path / "rsna")
    labels, classes = root / "stage_2_train_labels.csv", root / "stage_2_detailed_class_info.csv"
    right = labels.read_text()
    write_text(classes, ["patientId,class", "aa,Lung Opacity"])
    labels.write_text(classes.read_text())
    with pytest.raises(ValueError) as caught:
        run("rsna", root, tmp_path / "out")
    assert str(caught.value) == (
        f"{labels} has no column 'Target'; it has 'patientId', 'class'; the download's stage_2_train_labels.csv has it"
    )
    (root / "copy.csv").write_text(right)
    with pytest.raises(ValueError, match=r"has no column 'Target'; it has .*; copy\.csv beside it has one$"):
        run("rsna", root, tmp_path / "out")
    labels.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has no stage_2_train_labels\.csv; of tables it has 'copy\.csv', 'stage"
    ):
        run("rsna", root, tmp_path / "out")
    labels.write_text(right.replace("bb,,,,,0", "bb,,,,,2"))
    with pytest.raises(ValueError, match="column 'Target' holds 2, which is neither 0 nor 1"):
        run("rsna", root, tmp_path / "out")
    labels.write_text(right.replace("aa,512", "aa,left"))
    with pytest.raises(ValueError, match=r"stage_2_train_labels\.csv: column 'x' holds 'left', which is no number"):
        run("rsna", root, tmp_path / "out")


def test_the_wrong_tables_of_vinbig(tmp_path: Path) -> None:
    root = vinbig_kaggle(tmp_path / "kaggle")
    write_text(root / "train.csv", ["image_id,PredictionString", "n0,14 1 0 0 1 1"])
    with pytest.raises(
        ValueError, match=r"train\.csv has no column 'class_name'; it has 'image_id', 'Pred.*; Kaggle's train"
    ):
        run("vinbig", root, tmp_path / "out")
    root = vinbig_physionet(tmp_path / "physionet")
    notes = root / "annotations"
    (notes / "image_labels_train.csv").write_text((notes / "annotations_train.csv").read_text())
    with pytest.raises(
        ValueError, match=r"image_labels_train\.csv has no column 'Aortic enlargement'; .*image_labels_test\.c"
    ):
        run("vinbig", root, tmp_path / "out")


def test_the_wrong_table_of_siim(tmp_path: Path) -> None:
    root = siim(tmp_path / "siim", [])
    (root / "train-rle.csv").write_text("patientId,class\n1.2.3,Normal\n")
    with pytest.raises(
        ValueError, match=r"train-rle\.csv has no column 'EncodedPixels' .*'class' stands; the download's tr"
    ):
        run("siim", root, tmp_path / "out")


# --- films that no row lists, and names that no file can have --------------------------------------------------------


def test_every_film_that_was_not_used_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = films(tmp_path / "films", "a.png", "f.png", "ward/b.png", "ward/c.jpg", "d.tif", "lung.png")
    write_dicom(root / "e", film(3).astype(int).astype("uint16"))  # a hospital's file, without a suffix
    (root / "readme.txt").write_text("no film")
    table = write_text(tmp_path / "T.csv", ["image,outline", "a.png,lung.png", "f.png,nan"])
    out = root / "prepared"  # what is written is not found again
    for _ in range(2):
        cli(["prepare", "--dataset", "csv", "--root", str(root), "--table", str(table), "--out", str(out),
             "--mask-column", "outline", "--workers", "1"])  # fmt: skip
        unlisted = "an image file that the tables do not list"
        assert reasons(out) == dict.fromkeys(("d.tif", "e", "ward/b.png", "ward/c.jpg"), unlisted)
        assert "skipped 4: an image file that the tables do not list" in " ".join(capsys.readouterr().out.split())


def test_the_test_films_of_rsna_are_listed(tmp_path: Path) -> None:
    root = rsna(tmp_path / "rsna")
    write_dicom(root / "stage_2_test_images" / "tt.dcm", film(1).astype("uint8"))
    run("rsna", root, tmp_path / "out")
    assert reasons(tmp_path / "out")["stage_2_test_images/tt.dcm"] == "an image file that the tables do not list"


def test_a_name_that_no_file_can_have_costs_one_film(tmp_path: Path) -> None:
    root = films(tmp_path / "films", "a.png", f"{'long/' * 60}b.png", f"{'c' * 240}.png")
    rows = ["a.png", f"{'long/' * 60}b.png", f"{'c' * 240}.png", f"{'d' * 300}.png", "x" * 9000, "b.png"]
    table = write_text(tmp_path / "T.csv", ["image", *rows])
    result = run("csv", root, tmp_path / "out", table=table)
    assert len(result.index) == 3 and max(len(os.fsencode(name)) for name in result.index.names) < 210
    skipped = reasons(tmp_path / "out")
    assert len(skipped) == 3 and sum("File name too long" in reason for reason in skipped.values()) == 2
    again = run("csv", root, tmp_path / "out", table=table)
    assert again.converted == 0 and list(again.index.names) == list(result.index.names)


def test_one_preparation_at_a_time(tmp_path: Path) -> None:
    root = films(tmp_path / "films", "a.png", "b.png")
    table = write_text(tmp_path / "T.csv", ["image", "a.png", "b.png"])
    with folder_lock(tmp_path / "out"), pytest.raises(CommandError, match="out is in use: another command is at work"):
        run("csv", root, tmp_path / "out", table=table)
    assert not (tmp_path / "out").exists()
    assert len(run("csv", root, tmp_path / "out", table=table).index) == 2


# --- what is said before it is too late ------------------------------------------------------------------------------


def test_no_findings_and_no_patients_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = films(tmp_path / "films", *(f"{n}.png" for n in range(12)))
    table = write_text(tmp_path / "T.csv", ["image,who,Mass", *(f"{n}.png,p{n},{n % 2}" for n in range(12))])
    command = [
        "prepare",
        "--dataset",
        "csv",
        "--root",
        str(root),
        "--table",
        str(table),
        "--out",
        str(tmp_path / "out"),
    ]
    cli([*command, "--workers", "1"])
    text = " ".join(capsys.readouterr().out.split())
    assert "No findings, as --label-columns names no column: this set serves pretraining alone" in text
    assert "No --patient-column: every film counts as its own patient" in text
    untrained = ["--untrained", "--out", str(tmp_path / "eval")]
    for stage in (["evaluate", *untrained], ["xray", "--out", str(tmp_path / "xray")]):
        with pytest.raises(
            SystemExit, match="has no findings to evaluate: it was prepared without --label-columns; name"
        ):
            cli([stage[0], "--data", str(tmp_path / "out"), *stage[1:]])
        capsys.readouterr()
    assert not (tmp_path / "eval").exists() and not (tmp_path / "xray").exists()
    labelled = [*command, "--patient-column", "who", "--label-columns", "Mass"]
    with pytest.raises(
        SystemExit, match=r"different preparation \(patient_column is unset there and 'who' here\); choose an"
    ):
        cli(labelled)
    with pytest.raises(SystemExit, match=r"different preparation \(label_columns is unset there and Mass here\)"):
        cli([*command, "--label-columns", "Mass"])
    labelled[labelled.index("--out") + 1] = str(tmp_path / "labelled")
    cli([*labelled, "--workers", "1"])
    text = capsys.readouterr().out
    assert "No findings" not in text and "own patient" not in text


def test_a_folder_without_a_film_is_nobodys(tmp_path: Path) -> None:
    """A first command with a slip of the pen must not stand in the way of the second."""
    root = films(tmp_path / "films", "a.png", "b.png")
    table = write_text(tmp_path / "T.csv", ["image,path", "A,a.png", "B,b.png"])
    with pytest.raises(ValueError, match=r"not one image could be used\. Most often: an image file|no file"):
        run("csv", root, tmp_path / "out", table=table)
    assert len(run("csv", root, tmp_path / "out", table=table, image_column="path").index) == 2
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["options"]["image_column"] == "path"
    with pytest.raises(FileExistsError, match=r"image_column is 'path' there and 'image' here"):
        run("csv", root, tmp_path / "out", table=table)


def test_rows_keep_their_cells(tmp_path: Path) -> None:
    rows = read_rows(write_text(tmp_path / "T.csv", ['a,"b, c",', '"x\ny", 007 ,nan', "only"]))
    assert list(rows.columns) == ["a", "b, c", "column 3"]
    assert rows.values.tolist() == [["x\ny", "007", "nan"], ["only", "", ""]]
