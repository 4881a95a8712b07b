"""The loader of ChestX-ray14's official layout, on a miniature and on real films."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pydicom", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from xray_layouts import film, nih

from examples.optiml.data.images import ImageStore
from examples.optiml.data.index import NIH_CLASSES, read_index
from examples.optiml.downstream.evaluate import score_metadata


def test_the_loader_reads_nih_as_users_have_it(tmp_path: Path) -> None:
    root = nih(tmp_path / "nih")
    with pytest.warns(UserWarning, match="1 of 6 entries"):
        index = read_index(root, val_fraction=0.0)
    assert list(index.names) == [f"0000000{p}_00{v}.png" for p, v in ((1, 0), (1, 1), (2, 0), (3, 0), (4, 0))]
    assert list(index.patients) == ["1", "1", "2", "3", "4"]
    assert list(index.splits) == ["train"] * 4 + ["test"]
    found = [{NIH_CLASSES[c] for c in np.flatnonzero(row)} for row in index.labels]
    assert found == [{"Cardiomegaly"}, {"Cardiomegaly", "Emphysema"}, set(), {"Hernia"}, {"Infiltration", "Nodule"}]
    box = index.boxes["00000004_000.png"][0]
    assert (box.label, box.x, box.y, box.width, box.height) == ("Infiltration", 0.25, 0.5, 0.125, 0.0625)
    for limit in (0, 100):  # read each time, and kept in memory
        assert ImageStore(index.paths, size=16, limit_mb=limit)[0].size == (16, 16)
        images = ImageStore(index.paths, size=64, limit_mb=limit)
        for row, patient in enumerate(index.patients):
            assert images[row].mode == "L" and np.array_equal(np.asarray(images[row]), film(int(patient)))


def test_kaggles_copy_of_nih_has_another_name_for_the_table(tmp_path: Path) -> None:
    root = nih(tmp_path / "nih")
    official = read_index(root, quiet=True)
    (root / "Data_Entry_2017_v2020.csv").rename(root / "Data_Entry_2017.csv")
    assert read_index(root, quiet=True).fingerprint() == official.fingerprint()


def test_the_loader_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Data_Entry_2017_v2020\.csv is missing"):
        read_index(tmp_path)
    root = nih(tmp_path / "nih")
    (root / "test_list.txt").write_text("00000001_001.png\n00000004_000.png\n")
    (root / "train_val_list.txt").write_text("00000001_000.png\n00000002_000.png\n")
    with pytest.warns(UserWarning, match="no split"), pytest.raises(ValueError, match="patients have images on both"):
        read_index(root)


def test_the_wrong_table_is_named(tmp_path: Path) -> None:
    root = nih(tmp_path / "nih")
    entry, boxes = root / "Data_Entry_2017_v2020.csv", root / "BBox_List_2017.csv"
    right = entry.read_text()
    for content in ("patientId,class\naa,Lung\n", "a,b,c,d\n1.png,Mass,0,M\n", "a,b,c,d\n1.png,,0,4\n"):
        entry.write_text(content)
        with pytest.raises(
            ValueError, match=r"v2020\.csv is not NIH's table of labels, which begins with Image"
        ) as caught:
            read_index(root, quiet=True)
        assert "\n" not in str(caught.value)
    entry.write_text(right)
    boxes.write_text("Image,Label,x,y,w,h\n00000004_000.png,Mass,1,2,3,wide\n")
    with pytest.raises(ValueError, match=r"BBox_List_2017\.csv is not NIH's table of boxes.*wide"):
        read_index(root, quiet=True)


# --- real films ----------------------------------------------------------------------------------------------

REAL = Path(os.environ.get("OTLOSS_DATA", Path(__file__).parents[2] / "shared" / "data")) / "cxr-dev"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}; set OTLOSS_DATA to the folder that holds cxr-dev")
def test_real_films_load_and_are_confounded_by_source() -> None:
    index = read_index(REAL)
    assert len(index) == 2476 and (index.splits == "test").sum() == 521
    assert 1600 < (index.splits == "train").sum() < 1760
    positives = index.split("test").labels.sum(axis=0)
    assert dict(zip(NIH_CLASSES, positives.tolist(), strict=True))["Pneumonia"] == 156
    assert index.sources is not None and len(np.unique(index.sources)) >= 5
    image = np.asarray(ImageStore(index.paths[:3], 64)[0])
    assert image.shape == (64, 64) and image.std() > 20

    metadata = score_metadata(index)
    assert metadata is not None
    assert metadata.macro(within=False)[0] > 0.55  # knows the source, has seen no pixel
    assert metadata.per_class(within=False)["Pneumonia"] > 0.95
    assert metadata.macro(within=True)[0] == 0.5
