"""VinBig / VinDr-CXR in both distributions: Kaggle's challenge, and PhysioNet's vindr-cxr 1.0.0."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..index import Box
from ..tables import numbers, read_rows, require_columns
from .listing import DICOM_SUFFIXES, Film, Listing, files_by_stem, require
from .settings import PrepareConfig

#: Kaggle's findings, in the order of their class_id; the fourteen that the paper counts.
VINBIG_CLASSES = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Consolidation", "ILD", "Infiltration",
    "Lung Opacity", "Nodule/Mass", "Other lesion", "Pleural effusion", "Pleural thickening", "Pneumothorax",
    "Pulmonary fibrosis",
)  # fmt: skip
NO_FINDING = "No finding"
#: PhysioNet's two tables differ in this word.
SPELLING = {"Other diseases": "Other disease"}
CORNERS = ["x_min", "y_min", "x_max", "y_max"]


def read_vinbig(config: PrepareConfig) -> Listing:
    """PhysioNet's 15,000 + 3,000 where the folder has them, else Kaggle's 15,000."""
    root = config.folder
    listing = _physionet(config) if (root / "annotations").is_dir() else _kaggle(config)
    listing.notes.append(
        f"A training image has a finding when {config.votes} of its readers name it; boxes are those of all readers "
        "who did. VinBig does not say which images are of one patient: every image counts as its own."
    )
    return listing


def _kaggle(config: PrepareConfig) -> Listing:
    root = config.folder
    (table,) = require(root, "train.csv")
    if config.vinbig_classes == "all":
        raise ValueError("vinbig_classes='all' needs PhysioNet's distribution: Kaggle's has the 14 findings only")
    rows = _boxes(table, "Kaggle's train.csv", "rad_id")
    found = files_by_stem(root, ["train"], DICOM_SUFFIXES)
    readers = rows[["image_id", "rad_id", "class_name"]].drop_duplicates()
    records, skipped = _records(config, readers, rows, found, "", VINBIG_CLASSES)
    return Listing(VINBIG_CLASSES, records, skipped, [table])


def _physionet(config: PrepareConfig) -> Listing:
    root = config.folder
    names = [f"annotations/{kind}_{part}.csv" for part in ("train", "test") for kind in ("image_labels", "annotations")]
    tables = require(root, *names)
    classes: tuple[str, ...] = VINBIG_CLASSES
    records, skipped = [], []
    for part, label_table, box_table in (("train", tables[0], tables[1]), ("test", tables[2], tables[3])):
        wide = read_rows(label_table, ["image_id"]).rename(columns=SPELLING)
        require_columns(label_table, wide, ("image_id", *VINBIG_CLASSES, NO_FINDING), f"PhysioNet's {label_table.name}")
        findings = [c for c in wide.columns if c not in ("image_id", "rad_id", NO_FINDING)]
        if config.vinbig_classes == "all":
            if part == "test" and set(classes) != set(findings):
                raise ValueError(f"{label_table} and its training table name different findings")
            classes = classes if part == "test" else tuple(findings)
        if "rad_id" not in wide:
            wide["rad_id"] = "consensus"
        readers = wide.melt(["image_id", "rad_id"], [*findings, NO_FINDING], "class_name", "on")
        readers = readers[readers["on"].isin(("1", "1.0"))]
        # An image without a single 1 is still an image, seen by its readers.
        seen = wide[["image_id", "rad_id"]].assign(class_name=NO_FINDING)
        boxes = _boxes(box_table, f"PhysioNet's {box_table.name}")
        boxes["class_name"] = boxes["class_name"].replace(SPELLING)
        readers = pd.concat([readers, seen], ignore_index=True)[["image_id", "rad_id", "class_name"]].drop_duplicates()
        found = files_by_stem(root, [part], DICOM_SUFFIXES)
        more, gone = _records(config, readers, boxes, found, part, classes)
        records += more
        skipped += gone
    return Listing(classes, records, skipped, tables)


def _boxes(table: Path, holder: str, *more: str) -> pd.DataFrame:
    """A table with a finding and a box in each row; corners are NaN where there is no box."""
    rows = read_rows(table, ["image_id"])
    require_columns(table, rows, ("image_id", "class_name", *more, *CORNERS), holder)
    return rows.assign(**{corner: numbers(table, rows, corner) for corner in CORNERS})


def _records(
    config: PrepareConfig,
    readers: pd.DataFrame,
    boxes: pd.DataFrame,
    found: dict[str, Path],
    split: str,
    classes: tuple[str, ...],
) -> tuple[list[Film], list[tuple[str, str]]]:
    """One record per image of ``readers`` (image, reader, finding): its findings by vote, and their boxes."""
    needed = 1 if split == "test" else config.votes  # the test set's labels are a consensus already
    votes = readers[readers["class_name"].isin(classes)].groupby(["image_id", "class_name"]).size()
    named: dict[str, list[str]] = {}
    for image, label in votes[votes >= needed].index:
        named.setdefault(image, []).append(label)
    drawn: dict[str, list[Box]] = {}
    boxes = boxes.dropna(subset=CORNERS)[["image_id", "class_name", *CORNERS]]
    for image, label, *corners in boxes.itertuples(index=False):
        if label in named.get(image, ()):
            x0, y0, x1, y1 = (float(corner) for corner in corners)
            drawn.setdefault(image, []).append(Box(label, x0, y0, x1 - x0, y1 - y0))
    records: list[Film] = []
    skipped: list[tuple[str, str]] = []
    for image in sorted(readers["image_id"].unique()):
        if image not in found:
            skipped.append((image, f"no .dicom file under {split or 'train'}/"))
            continue
        labels = tuple(label for label in classes if label in named.get(image, ()))
        records.append(Film(f"{image}.png", found[image], image, split, labels, tuple(drawn.get(image, ()))))
    return records, skipped
