"""A user's own X-rays: any table with a row per image."""

from __future__ import annotations

from collections.abc import Container, Iterable
from pathlib import Path, PurePosixPath

import pandas as pd

from ..index import Box
from .listing import Film, Listing
from .settings import PrepareConfig

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
    rows = _read(table)
    labels = dict(_parse(column, rows) for column in config.label_columns)
    named = (config.patient_column, config.split_column, config.source_column, config.mask_column)
    _require(table, rows, (config.image_column, *filter(None, named), *labels))
    rows, left_out = _where(config, rows)
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
    boxes = _boxes(config, tuple(classes))
    records, skipped = [], left_out + [("", "no image path")] * int(blank.sum())
    unlisted = sorted(boxes.keys() - {_posix(image) for image in [*rows[config.image_column], *dict(left_out)]})
    skipped += [(image, "a box of an image that the table does not list") for image in unlisted]
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
        record = Film(
            names[i],
            root / _posix(image),
            patient=patient,
            split=split or "",
            labels=tuple(found),
            boxes=boxes.get(_posix(image), ()),
            box_space=config.box_space,
            masks=((config.mask_label, root / _posix(mask)),) if mask else (),
            source=row[config.source_column] if config.source_column else "",
        )
        records.append(record)
    return Listing(tuple(classes), records, skipped, [table, *filter(None, [config.box_table])])


def _read(table: Path) -> pd.DataFrame:
    """All cells as text, without spaces around them."""
    if not table.is_file():
        raise FileNotFoundError(f"no table {table}")
    rows = pd.read_csv(table, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    rows.columns = [str(column).strip() for column in rows.columns]
    return rows.map(str.strip)


def _require(table: Path, rows: pd.DataFrame, columns: Iterable[str]) -> None:
    for column in columns:
        if column not in rows:
            raise ValueError(f"{table} has no column {column!r}; it has {', '.join(map(repr, rows.columns))}")


def _where(config: PrepareConfig, rows: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The rows of which all conditions hold, and the images of the others with the first that does not."""
    assert config.table is not None
    holds, reasons = pd.Series(True, rows.index), pd.Series("", rows.index)
    for condition in config.where:
        column, _, value = (part.strip() for part in condition.partition("="))
        negated, column = column.endswith("!"), column.removesuffix("!").strip()
        _require(config.table, rows, (column,))
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
    rows = _read(config.box_table).rename(columns={"width": "w", "height": "h"})
    _require(config.box_table, rows, (config.image_column, "label", *"xywh"))
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
