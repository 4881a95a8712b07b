"""A user's own X-rays: any table with a row per image."""

from __future__ import annotations

import hashlib
from collections.abc import Container
from pathlib import Path, PurePosixPath

import pandas as pd

from ..index import Box
from ..tables import NOTE, read_rows, require_columns
from .cells import BLANK, read_labels
from .listing import Film, Listing
from .settings import PrepareConfig

SPLITS = {
    "train": "train", "training": "train", "train_val": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
#: Longest name of a file to write, in bytes; file systems take 255, and a name is written with an addition first.
LONGEST = 200


def read_table(config: PrepareConfig) -> Listing:
    """Rows in the table's own terms: paths relative to the root, columns as the options name them."""
    table, root = config.table, config.folder
    assert table is not None  # PrepareConfig asks for it
    rows = read_rows(table, [config.image_column])
    notes = [rows.attrs[NOTE]] if NOTE in rows.attrs else []
    columns = dict(_parse(column, rows) for column in config.label_columns)
    named = (config.patient_column, config.split_column, config.source_column, config.mask_column)
    require_columns(table, rows, (config.image_column, *filter(None, named), *columns))
    rows, left_out = _where(config, rows)
    blank = rows[config.image_column] == ""
    rows = rows[~blank].reset_index(drop=True)

    labels = read_labels(config, rows, columns)
    names = _names(table, rows[config.image_column])
    boxes = _boxes(config, labels.classes)
    records, skipped = [], left_out + [("", "no image path")] * int(blank.sum())
    unlisted = sorted(boxes.keys() - {_posix(image) for image in [*rows[config.image_column], *dict(left_out)]})
    skipped += [(image, "a box of an image that the table does not list") for image in unlisted]
    for i, row in enumerate(rows.to_dict("records")):
        image, reason = row[config.image_column], labels.left_out[i]
        split = SPLITS.get(row[config.split_column].lower()) if config.split_column else ""
        if split is None:
            reason = f"split {row[config.split_column or '']!r} is none of {', '.join(SPLITS)}"
        patient = row[config.patient_column] if config.patient_column else names[i]
        if patient.lower() in BLANK:
            reason = "no patient"
        if reason:
            skipped.append((image, reason))
            continue
        mask = row[config.mask_column] if config.mask_column else ""
        record = Film(
            names[i],
            root / _posix(image),
            patient=patient,
            split=split or "",
            labels=tuple(labels.found[i]),
            boxes=boxes.get(_posix(image), ()),
            box_space=config.box_space,
            masks=((config.mask_label, root / _posix(mask)),) if mask.lower() not in BLANK else (),
            source=row[config.source_column] if config.source_column else "",
        )
        records.append(record)
    if not config.label_columns:
        notes.append(
            "No findings, as --label-columns names no column: this set serves pretraining alone, and evaluate, which "
            "needs findings, will refuse it."
        )
    if config.patient_column is None:
        notes.append(
            "No --patient-column: every film counts as its own patient. If patients come back, their films stand in "
            "several splits and figures are too good; name the column then."
        )
    return Listing(labels.classes, records, skipped, [table, *filter(None, [config.box_table])], notes)


def _where(config: PrepareConfig, rows: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The rows of which all conditions hold, and the images of the others with the first that does not."""
    assert config.table is not None
    holds, reasons = pd.Series(True, rows.index), pd.Series("", rows.index)
    for condition in config.where:
        column, _, value = (part.strip() for part in condition.partition("="))
        negated, column = column.endswith("!"), column.removesuffix("!").strip()
        require_columns(config.table, rows, (column,))
        equal = rows[column] == value
        if not equal.any():  # a slip of the pen must not take every row
            known = ", ".join(map(repr, sorted(set(rows[column]))[:5]))
            raise ValueError(f"--where {condition}: no row has {value!r} in column {column!r}, but {known}")
        reasons[holds & (equal == negated)] = f"not {condition}"
        holds &= equal != negated
    return rows[holds], list(zip(rows.loc[~holds, config.image_column], reasons[~holds], strict=True))


def _boxes(config: PrepareConfig, classes: tuple[str, ...]) -> dict[str, tuple[Box, ...]]:
    """The boxes of every image, by its path as the tables have it."""
    if config.box_table is None:
        return {}
    rows = read_rows(config.box_table, [config.image_column]).rename(columns={"width": "w", "height": "h"})
    require_columns(config.box_table, rows, (config.image_column, "label", *"xywh"))
    known = set(rows["label"])
    taken = dict(_parse(option, known) for option in config.box_labels) or {name: name for name in classes}
    if config.box_labels and (strange := sorted(taken.keys() - known)):
        has = ", ".join(map(repr, sorted(known)))
        raise ValueError(f"{config.box_table} has no box of {strange[0]!r}; it has {has}")
    boxes: dict[str, tuple[Box, ...]] = {}
    for row in rows[rows["label"].isin(taken.keys()) & (rows["x"] != "")].to_dict("records"):
        image = _posix(row[config.image_column])
        try:
            box = Box(taken[row["label"]], *(float(row[side]) for side in "xywh"))
        except ValueError as error:
            raise ValueError(f"{config.box_table}: {error} in a box of {image!r}") from error
        boxes[image] = (*boxes.get(image, ()), box)
    return boxes


def _parse(option: str, known: Container[str]) -> tuple[str, str]:
    """``COLUMN=NAME`` or ``COLUMN``, likewise of labels; one that is known is not taken apart."""
    column, _, name = option.rpartition("=")
    return (column, name) if column and option not in known else (option, option)


def _posix(path: str) -> str:
    return path.replace("\\", "/")


def _names(table: Path, images: pd.Series[str]) -> list[str]:
    """A flat file name for every path: as short as keeps them apart."""
    paths = [PurePosixPath(_posix(path)) for path in images]
    for names in (
        [path.stem for path in paths],
        ["__".join(path.with_suffix("").parts) if path.name else "" for path in paths],
        ["__".join(path.parts) for path in paths],
    ):
        if len({name.lower() for name in names}) == len(names):
            return [f"{_shortened(name.strip('/'))}.png" for name in names]
    twice = images[images.duplicated()]
    raise ValueError(
        f"{table} lists an image twice, e.g. {twice.iloc[0] if len(twice) else images.iloc[0]!r}: give each image one "
        "row, with its findings joined as Mass|Nodule"
    )


def _shortened(name: str) -> str:
    """A name that a file system takes; of a longer one the beginning, and a digest of all of it."""
    name = name.replace("/", "_").replace("\0", "_")
    if len(name.encode()) <= LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{name.encode()[: LONGEST - 17].decode(errors='ignore')}-{digest}"
