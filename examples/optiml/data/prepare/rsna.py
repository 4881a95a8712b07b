"""RSNA Pneumonia Detection Challenge (Kaggle, stage 2)."""

from __future__ import annotations

from ..index import Box
from ..nih_format import BOX_SPACE
from ..tables import numbers, read_rows, require_columns
from .listing import DICOM_SUFFIXES, IMAGE_SUFFIXES, Film, Listing, files_by_stem, require
from .settings import PrepareConfig

LABELS_FILE = "stage_2_train_labels.csv"
IMAGE_FOLDER = "stage_2_train_images"
SIDES = ("x", "y", "width", "height")


def read_rsna(config: PrepareConfig) -> Listing:
    """Target 1 is Pneumonia; 0 is healthy *or* otherwise abnormal. One row of the table is one box."""
    root = config.folder
    (table,) = require(root, LABELS_FILE)
    rows = read_rows(table, ["patientId"])
    require_columns(table, rows, ("patientId", "Target", *SIDES), f"the download's {LABELS_FILE}")
    rows = rows.assign(**{name: numbers(table, rows, name) for name in ("Target", *SIDES)})
    if len(strange := rows["Target"][~rows["Target"].isin((0, 1))]):
        raise ValueError(f"{table}: column 'Target' holds {strange.iloc[0]:g}, which is neither 0 nor 1")
    found = files_by_stem(root, [IMAGE_FOLDER], DICOM_SUFFIXES + IMAGE_SUFFIXES)
    records: list[Film] = []
    skipped: list[tuple[str, str]] = []
    for name, group in rows.groupby("patientId"):
        if name not in found:
            skipped.append((str(name), f"no image file under {IMAGE_FOLDER}/"))
            continue
        positive = group[group["Target"] == 1]
        boxes = tuple(
            Box("Pneumonia", x, y, w, h) for x, y, w, h in positive[list(SIDES)].dropna().itertuples(index=False)
        )
        labels = ("Pneumonia",) if len(positive) else ()
        # PatientID in the header repeats the image's id; the true patient is known through nih_match only.
        records.append(Film(f"{name}.png", found[name], str(name), labels=labels, boxes=boxes, box_space=BOX_SPACE))
    notes = ["Label 0 holds both 'Normal' and 'No Lung Opacity / Not Normal' films."]
    return Listing(("Pneumonia",), records, skipped, [table], notes)
