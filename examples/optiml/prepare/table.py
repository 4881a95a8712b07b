"""A user's own X-rays: any table with a row per image."""

from __future__ import annotations

from pathlib import PurePosixPath

import pandas as pd

from .config import PrepareConfig
from .listing import Listing, Record

SPLITS = {
    "train": "train", "training": "train", "train_val": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
NUMBERS = {
    "0": 0, "0.0": 0, "false": 0, "no": 0,
    "1": 1, "1.0": 1, "true": 1, "yes": 1,
    "": -1, "nan": -1, "-1": -1, "-1.0": -1,
}  # fmt: skip
#: Words for "nothing found" in a column of findings.
NOTHING = ("", "no finding", "no findings")


def read_table(config: PrepareConfig) -> Listing:
    """Rows in the table's own terms: paths relative to the root, columns as the options name them."""
    table, root = config.table, config.folder
    assert table is not None  # PrepareConfig asks for it
    if not table.is_file():
        raise FileNotFoundError(f"no table {table}")
    rows = pd.read_csv(table, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    rows.columns = [str(column).strip() for column in rows.columns]
    rows = rows.map(str.strip)
    labels = dict(_parse(column, rows) for column in config.label_columns)
    named = (config.patient_column, config.split_column, config.source_column, config.mask_column)
    for column in (config.image_column, *filter(None, named), *labels):
        if column not in rows:
            raise ValueError(f"{table} has no column {column!r}; it has {', '.join(map(repr, rows.columns))}")
    blank = rows[config.image_column] == ""
    rows = rows[~blank].reset_index(drop=True)

    binary = {column: name for column, name in labels.items() if _is_binary(rows[column])}
    words = [_words(rows[column]) for column in labels if column not in binary]
    classes = dict.fromkeys(binary.values())
    for cells in words:
        classes.update(dict.fromkeys(sorted({word for cell in cells for word in cell})))
    if bad := next((name for name in classes if "|" in name), None):
        raise ValueError(f"the finding {bad!r} holds a |, which separates findings")

    names = _names(rows[config.image_column])
    records, skipped = [], [("", "no image path")] * int(blank.sum())
    for i, row in enumerate(rows.to_dict("records")):
        image = row[config.image_column]
        found = [word for cells in words for word in cells[i]]
        reason = ""
        for column, name in binary.items():
            value = NUMBERS[row[column].lower()]
            if value < 0 and config.uncertain == "refuse":
                raise ValueError(
                    f"{table}: column {column!r} is {row[column]!r} for {image!r}; say what that means with --uncertain"
                )
            if value < 0 and config.uncertain == "skip":
                reason = f"no label in column {column!r}"
            if value == 1 or (value < 0 and config.uncertain == "positive"):
                found.append(name)
        split = SPLITS.get(row[config.split_column].lower()) if config.split_column else ""
        if split is None:
            reason = f"split {row[config.split_column or '']!r} is none of {', '.join(SPLITS)}"
        patient = row[config.patient_column] if config.patient_column else names[i]
        if not patient:
            reason = "no patient"
        if reason:
            skipped.append((image, reason))
            continue
        mask = row[config.mask_column] if config.mask_column else ""
        record = Record(
            names[i],
            root / _posix(image),
            patient=patient,
            split=split or "",
            labels=tuple(found),
            masks=((config.mask_label, root / _posix(mask)),) if mask else (),
            source=row[config.source_column] if config.source_column else "",
        )
        records.append(record)
    return Listing(tuple(classes), records, skipped, [table])


def _parse(option: str, rows: pd.DataFrame) -> tuple[str, str]:
    """``COLUMN=NAME`` or ``COLUMN``."""
    column, _, name = option.rpartition("=")
    return (column, name) if column and option not in rows else (option, option)


def _is_binary(column: pd.Series[str]) -> bool:
    """Whether these are 0 and 1; an error for a number among them that is neither."""
    values = set(column.str.lower())
    strange = sorted(values - set(NUMBERS))
    if strange and values & {"0", "0.0", "1", "1.0"}:
        raise ValueError(f"column {column.name!r} holds {strange[0]!r} among 0 and 1")
    return not strange


def _words(column: pd.Series[str]) -> list[list[str]]:
    split = ([word.strip() for word in cell.split("|")] for cell in column)
    return [[word for word in words if word.lower() not in NOTHING] for words in split]


def _posix(path: str) -> str:
    return path.replace("\\", "/")


def _names(images: pd.Series[str]) -> list[str]:
    """A flat file name for every path: as short as keeps them apart."""
    paths = [PurePosixPath(_posix(path)) for path in images]
    for names in (
        [path.stem for path in paths],
        ["__".join(path.with_suffix("").parts) for path in paths],
        ["__".join(path.parts) for path in paths],
    ):
        if len({name.lower() for name in names}) == len(names):
            return [f"{name.strip('/')}.png" for name in names]
    twice = images[images.duplicated()]
    raise ValueError(f"the table lists an image twice, e.g. {twice.iloc[0] if len(twice) else images.iloc[0]!r}")
