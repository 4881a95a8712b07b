"""``prepare --dataset csv``: a user's own table, paths that lead elsewhere, and splits that are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="the example needs otloss[examples]")
pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from PIL import Image
from xray_layouts import column, film, findings, reasons, run, write_png, write_text

from examples.optiml.data.index import Box, read_index
from examples.optiml.data.prepare import split


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


def test_csv_part_of_a_table(tmp_path: Path) -> None:
    table = own(
        tmp_path / "own",
        "a/x.png,p1,,h1,,1,0,",
        "b/x.png,p1,,h2,,0,0,",
        "c.png,p2,,h1,,0,0,Edema",
        "d.png,p3,,h1,,?,0,",  # not asked what that means
    )
    some = {**OWN, "split_column": None, "where": ("hospital!=h2", "mass=0")}
    result = run("csv", table.parent, tmp_path / "out", table=table, **some)
    assert set(findings(result.index)) == {"c"}
    assert reasons(tmp_path / "out") == {
        "b/x.png": "not hospital!=h2", "a/x.png": "not mass=0", "d.png": "not mass=0",
        **dict.fromkeys(("e.png", "link.png", "m.png", "wide.png"), "an image file that the tables do not list"),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"has no column 'ward'; it has 'file', "):
        run("csv", table.parent, tmp_path / "bad", table=table, **{**some, "where": ("ward=3",)})
    for mistyped in ("hospital!=H2", "hospital!==h2", "hospital=="):
        with pytest.raises(ValueError, match=r"no row has '=?(H2|h2)?' in column 'hospital', but 'h1', 'h2'"):
            run("csv", table.parent, tmp_path / "bad", table=table, **{**some, "where": ("mass=0", mistyped)})
    with pytest.raises(ValueError, match="where is for csv, not for nih"):
        run("nih", table.parent, tmp_path / "bad", where=("mass=0",))
    with pytest.raises(ValueError, match="where must be COLUMN=VALUE or COLUMN!=VALUE, not 'h1'"):
        run("csv", table.parent, tmp_path / "bad", table=table, **{**some, "where": ("h1",)})


def test_csv_mistakes_are_named(tmp_path: Path) -> None:
    table = own(tmp_path / "own", "c.png,1,a|b", "d.png,2,", header="image,mass,x")
    for labels, message in (
        (("mass",), "column 'mass' holds '2' among 0 and 1"),
        (("mess",), "no column 'mess'; it has 'image'"),
    ):
        with pytest.raises(ValueError, match=message):
            run("csv", table.parent, tmp_path / "out", table=table, label_columns=labels)
    assert not (tmp_path / "out").exists()


def test_csv_boxes(tmp_path: Path) -> None:
    table = own(tmp_path / "own", "a/x.png,1", "b/x.png,0", "c.png,1", "d.png,", header="file,mass")
    boxes = write_text(
        tmp_path / "boxes.csv",
        [
            "file,origin,label,x,y,w,h", "a\\x.png,NIH,Mass,256,512,128.0,64", "a/x.png,RSNA,Lump,0,0,1024,512",
            "c.png,NIH,Mass,900,0,200,1024", "c.png,NIH,Mass,,,,", "c.png,NIH,Edema,1,1,1,1", "d.png,NIH,Mass,1,1,5,5",
            "gone.png,NIH,Mass,1,1,5,5",
        ],
    )  # fmt: skip
    options: dict[str, Any] = {
        "table": table, "image_column": "file", "label_columns": ("mass=Mass",), "blank": "skip",
        "box_table": boxes, "box_space": 1024,
    }  # fmt: skip
    index = run("csv", table.parent, tmp_path / "out", **options).index
    quarter = Box("Mass", 0.25, 0.5, 0.125, 0.0625)  # Edema is no finding here, of d there is no label
    assert index.boxes == {"a__x.png": [quarter], "c.png": [Box("Mass", 0.878906, 0, 0.121094, 1)]}
    assert "a box of an image" in reasons(tmp_path / "out")["gone.png"]
    options["box_labels"] = ("Lump=Mass",)
    assert run("csv", table.parent, tmp_path / "b", **options).index.boxes == {"a__x.png": [Box("Mass", 0, 0, 1, 0.5)]}
    with pytest.raises(ValueError, match=r"boxes\.csv has no box of 'Lumps'; it has 'Edema', 'Lump', 'Mass'"):
        run("csv", table.parent, tmp_path / "c", **{**options, "box_labels": ("Lumps=Mass",)})
    options = {**options, "box_labels": (), "box_space": None}  # the file's own 40 pixels
    write_text(boxes, ["file,label,x,y,width,height", "a/x.png,Mass,10,20,20,10"])
    pixels = run("csv", table.parent, tmp_path / "d", **options).index.boxes
    assert pixels == {"a__x.png": [Box("Mass", 0.25, 0.5, 0.5, 0.25)]}
    with pytest.raises(FileExistsError, match=r"boxes\.csv is"):  # another table than out was made from
        run("csv", table.parent, tmp_path / "out", **{**options, "box_space": 1024})
    for header, row, message in (("x,y,w", "1,2,3", "no column 'h'"), ("x,y,w,h", "1,a,2,3", "'a' in a box of 'c")):
        write_text(boxes, [f"file,label,{header}", f"c.png,Mass,{row}"])
        with pytest.raises(ValueError, match=message):
            run("csv", table.parent, tmp_path / "e", **options)


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
    assert len(result.index) == 2 and len(skipped) == 8 and {"a/x.png", "m.png"} < skipped.keys()
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.png")}
    assert written == {"own", "out", "secret.png"}


def test_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    table = own(tmp_path / "own", "c.png,p1,train", "d.png,p1,test", header="image,who,part")
    with pytest.raises(ValueError, match="patient 'p1' has images in test and train"):
        run("csv", table.parent, tmp_path / "out", table=table, patient_column="who", split_column="part")


def numbered(root: Path, patients: int) -> tuple[list[str], Path]:
    """Films of so many patients, a third of whom have one film; and their table."""
    rows = [f"{p}_{visit}.png,{p},{p % 2}" for p in range(patients) for visit in range(1 + p % 3)]
    for number, row in enumerate(rows):
        write_png(root / row.split(",")[0], number, side=8)
    return rows, write_text(root / "T.csv", ["image,who,mass", *rows])


def test_many_patients_are_drawn_each_by_himself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "MANY", 40)
    root = tmp_path / "own"
    rows, table = numbered(root, 60)
    options: dict[str, Any] = {"table": table, "patient_column": "who", "val_fraction": 0.2, "test_fraction": 0.3}
    index = run("csv", root, tmp_path / "out", **options).index
    groups = [set(index.patients[index.splits == name]) for name in ("train", "val", "test")]
    assert sum(map(len, groups)) == 60 == len(set.union(*groups))
    assert 20 < len(groups[0]) < 40 and 5 < len(groups[1]) < 20 and 10 < len(groups[2]) < 27
    assert read_index(tmp_path / "out", 0.9, 7).fingerprint() == index.fingerprint()  # it is on disk
    other = run("csv", root, tmp_path / "other", **options, split_seed=1).index
    assert not np.array_equal(other.splits, index.splits)
    # A patient's split does not depend on who else is there.
    write_text(table, ["image,who,mass", *rows[36:]])
    fewer = run("csv", root, tmp_path / "fewer", **options).index
    assert len(np.unique(fewer.patients)) >= 40
    before = dict(zip(index.names.tolist(), index.splits.tolist(), strict=True))
    assert all(before[name] == split for name, split in zip(fewer.names.tolist(), fewer.splits.tolist(), strict=True))


@pytest.mark.parametrize(("patients", "expected"), [(45, (32, 4, 9)), (10, (7, 1, 2)), (3, (1, 1, 1)), (2, (2, 0, 0))])
def test_few_patients_are_drawn_by_count(tmp_path: Path, patients: int, expected: tuple[int, ...]) -> None:
    """70/10/20 of 45 patients are 32, 4 and 9 (4.5 is rounded to even), whatever their hashes say."""
    root = tmp_path / "own"
    _, table = numbered(root, patients)
    options: dict[str, Any] = {"table": table, "patient_column": "who", "label_columns": ("mass",)}
    drawn = [run("csv", root, tmp_path / str(seed), **options, split_seed=seed) for seed in range(3)]
    for result in drawn:
        groups = [set(result.index.patients[result.index.splits == name]) for name in ("train", "val", "test")]
        assert tuple(map(len, groups)) == expected and len(set.union(*groups)) == patients
        for name in ("train", "val", "test"):
            of_split = result.index.splits == name
            lacks = of_split.any() and not result.index.labels[of_split].any()
            assert lacks == any(f"No film in {name} has mass: " in note for note in result.notes)
    if patients >= 10:
        assert len({result.index.fingerprint() for result in drawn}) == 3  # the seed decides who
