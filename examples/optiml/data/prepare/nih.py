"""NIH ChestX-ray14 (and phantoms, which are written in its layout)."""

from __future__ import annotations

import numpy as np

from ..index import entry_file, mask_path, nih_entries, read_index
from ..nih_format import BOX_FILE, ENTRY_FILE, ORIGIN_FILE, TEST_FILE, TRAIN_FILE
from ..nih_writer import PhantomConfig, write_phantoms
from .listing import Film, Listing
from .settings import PrepareConfig


def read_nih(config: PrepareConfig) -> Listing:
    """Labels, official lists, boxes, and masks where the folder has them (phantoms do).

    The training list is not divided here: validation is cut from it on reading, as from the raw folder.
    """
    root = config.folder
    entries = nih_entries(root)
    index = read_index(root, val_fraction=0.0, quiet=True)
    skipped = [(str(name), "no image file under images*/") for name in entries["name"][entries["path"].isna()]]
    unlisted = entries["name"][entries["path"].notna() & entries["split"].isna()]
    skipped += [(str(name), f"on neither {TRAIN_FILE} nor {TEST_FILE}") for name in unlisted]

    outlined = [folder.name for folder in sorted((root / "masks").glob("*")) if folder.is_dir()]
    records = []
    for row, name in enumerate(index.names.tolist()):
        masks = ((label, mask_path(root, label, name)) for label in outlined)
        boxes = index.boxes.get(name, [])
        record = Film(
            name,
            index.paths[row],
            patient=str(index.patients[row]),
            split=str(index.splits[row]),
            labels=tuple(index.classes[c] for c in np.flatnonzero(index.labels[row])),
            boxes=tuple(boxes),
            box_space=1,  # the index has them as fractions
            masks=tuple((label, path) for label, path in masks if path.is_file()),
            source="" if index.sources is None else str(index.sources[row]),
        )
        records.append(record)
    notes = ["The validation films are taken out of train when the data set is read, by patient."]
    tables = [entry_file(root), *(root / name for name in (TRAIN_FILE, TEST_FILE, BOX_FILE, "labels.csv"))]
    return Listing(index.classes, records, skipped, [table for table in tables if table.is_file()], notes)


def read_phantom(config: PrepareConfig) -> Listing:
    """Phantoms, drawn first where the root does not hold them yet."""
    drawing = PhantomConfig(
        config.folder, config.phantom_train, config.phantom_test, config.phantom_size, config.phantom_seed
    )
    if not (config.folder / ENTRY_FILE).is_file():
        write_phantoms(drawing)
    elif (config.folder / ORIGIN_FILE).read_text() != drawing.origin():
        raise FileExistsError(f"{config.folder} holds phantoms drawn with other options; choose another folder")
    listing = read_nih(config)
    listing.notes.append("Phantoms are drawings: figures made from them say nothing about patients.")
    return listing
