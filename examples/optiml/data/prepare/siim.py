"""SIIM-ACR Pneumothorax: the first release, and Kaggle's stage 2."""

from __future__ import annotations

import csv
from pathlib import Path

from ..tables import table_text
from .listing import DICOM_SUFFIXES, IMAGE_SUFFIXES, Film, Listing, files_by_stem
from .settings import PrepareConfig

#: Table and folders of each release.
RELEASES = (
    ("train-rle.csv", ("dicom-images-train", "dicom-images-test")),
    # Stage 2 labels the films of stage 1, its test films too; stage_2_images holds the unlabelled ones in some copies.
    ("stage_2_train.csv", ("stage_2_images", "dicom-images-train", "dicom-images-test")),
)


def read_runs(table: Path) -> dict[str, tuple[str, ...]]:
    """Every image's run lengths, of which it has several where several regions are marked.

    Copies differ: a space before ``EncodedPixels`` and before values, a byte-order mark, no header line.
    """
    runs: dict[str, tuple[str, ...]] = {}
    for row in csv.reader(table_text(table)[0].split("\n")):
        if len(row) < 2 or row[0].strip() == "ImageId":
            continue
        name, text = row[0].strip(), row[1].strip()
        if not runs and not text.replace(" ", "").removeprefix("-").isdigit() and text:
            raise ValueError(
                f"{table} has no column 'EncodedPixels' of run lengths in the second place, where {text!r} stands; the "
                f"download's {table.name} has it"
            )
        runs[name] = runs.get(name, ()) + (() if text in ("", "-1") else (text,))
    return runs


def read_siim(config: PrepareConfig) -> Listing:
    """The release of which more images are in the folder; the first, if as many."""
    root = config.folder
    choices = []
    for name, folders in RELEASES:
        if (root / name).is_file():
            runs = read_runs(root / name)
            found = files_by_stem(root, folders, DICOM_SUFFIXES + IMAGE_SUFFIXES)
            choices.append((len(runs.keys() & found.keys()), root / name, runs, found))
    if not choices:
        raise FileNotFoundError(f"{root} has neither {RELEASES[0][0]} nor {RELEASES[1][0]}")
    _, table, runs, found = max(choices, key=lambda choice: choice[0])

    records: list[Film] = []
    skipped: list[tuple[str, str]] = []
    for name, parts in sorted(runs.items()):
        if name in found:
            labels = ("Pneumothorax",) if parts else ()
            masks = (("Pneumothorax", parts),) if parts else ()
            records.append(Film(f"{name}.png", found[name], labels=labels, masks=masks))
        else:
            skipped.append((name, "no image file"))
    return Listing(("Pneumothorax",), records, skipped, [table], [f"Read {table.name}."])
