"""Tables as programs save them: every cell as text, and one line on what cannot be read."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable
from pathlib import Path

import pandas as pd

csv.field_size_limit(2**31 - 1)  # outlines as run lengths may be long; a lost quote is found in another way

#: The first bytes of Excel's workbooks, new and old.
WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
SEPARATORS = (",", ";", "\t")
#: Where a table was read in another way than UTF-8, ``attrs`` of its rows say so under this name.
NOTE = "note"


def table_text(path: Path) -> tuple[str, str]:
    """A text file whatever its encoding, and a note where that had to be guessed."""
    if not path.is_file():
        raise FileNotFoundError(f"no table {path}")
    raw = path.read_bytes()
    if raw.startswith(WORKBOOKS):
        raise ValueError(f"{path} is a workbook of Excel, which is not read: save it there as CSV UTF-8")
    note = ""
    try:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            text = raw.decode("utf-16")
        else:
            try:
                text = raw.decode("utf-8-sig")
            except UnicodeDecodeError:
                text = raw.decode("cp1252")
                note = f"{path.name} is not UTF-8 and was read as Windows-1252; if names look wrong, save it as UTF-8."
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text that can be read ({error.reason}): save it as CSV UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{path} is no text that can be read (it holds zero bytes): save it as CSV UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n"), note


def read_rows(path: Path, wanted: Collection[str] = ()) -> pd.DataFrame:
    """All cells as text, without spaces around them; blank rows are left out.

    Commas, semicolons or tabs stand between cells: whichever gives the header the columns ``wanted``, or else most
    columns.
    """
    text, note = table_text(path)
    lines = text.split("\n")
    first = next((number for number, line in enumerate(lines) if line.strip()), None)
    if first is None:
        raise ValueError(f"{path} is empty")
    separator = ""
    if lines[first].lower().startswith("sep=") and len(lines[first]) == 5:  # Excel's own line
        separator, first = lines[first][4], first + 1
    separator = separator or _separator("\n".join(lines[first : first + 1]), wanted)
    reader = csv.reader((f"{line}\n" for line in lines[first:]), delimiter=separator, strict=True)
    rows: list[list[str]] = []
    columns: list[str] = []
    done = 0
    try:
        for cells in reader:
            done = reader.line_num
            row = [cell.strip() for cell in cells]
            if not any(row):
                continue
            if not columns:
                columns = _columns(path, row)
                continue
            while len(row) > len(columns) and not row[-1]:
                row.pop()
            if len(row) > len(columns):
                raise ValueError(
                    f"{path}, line {first + reader.line_num}: {len(row)} cells under a header of {len(columns)}; "
                    f"put quotes around a cell that holds {separator!r}"
                )
            rows.append(row + [""] * (len(columns) - len(row)))
    except csv.Error as error:
        raise ValueError(
            f"{path}, the row that begins in line {first + done + 1}: {error}; correct its quotes"
        ) from error
    frame = pd.DataFrame(rows, columns=columns, dtype=object)
    if note:
        frame.attrs[NOTE] = note
    return frame


def _separator(header: str, wanted: Collection[str]) -> str:
    def columns(separator: str) -> list[str]:
        return [cell.strip() for cell in next(csv.reader([header], delimiter=separator))]

    for separator in SEPARATORS:
        if wanted and set(wanted) <= set(columns(separator)):
            return separator
    return max(SEPARATORS, key=lambda separator: len(columns(separator)))


def _columns(path: Path, header: list[str]) -> list[str]:
    if twice := next((name for name in header if name and header.count(name) > 1), None):
        raise ValueError(f"{path} has two columns {twice!r}: rename one")
    return [name or f"column {number}" for number, name in enumerate(header, 1)]


def require_columns(path: Path, rows: pd.DataFrame, columns: Iterable[str], holder: str = "") -> None:
    """Raise unless the table has these columns; ``holder`` is the file of a download that should have them."""
    for column in columns:
        if column in rows:
            continue
        beside = [other.name for other in sorted(path.parent.glob("*.csv")) if other != path and _has(other, column)]
        hint = f"; {beside[0]} beside it has one" if beside else f"; {holder} has it" if holder else ""
        raise ValueError(f"{path} has no column {column!r}; it has {some(rows.columns)}{hint}")


def _has(path: Path, column: str) -> bool:
    """Whether the first line names a column, as far as it can be read quickly."""
    with path.open("rb") as file:
        header = file.readline(100_000).decode("utf-8-sig", "replace").strip()
    return any(column in [cell.strip(' "') for cell in header.split(separator)] for separator in SEPARATORS)


def numbers(path: Path, rows: pd.DataFrame, column: str) -> pd.Series[float]:
    """A column as numbers, NaN where it is blank."""
    values = pd.to_numeric(rows[column].where(rows[column] != ""), errors="coerce")
    if len(bad := rows[column][values.isna() & (rows[column] != "")]):
        raise ValueError(f"{path}: column {column!r} holds {bad.iloc[0]!r}, which is no number")
    return values.astype(float)


def some(values: Iterable[str], most: int = 30) -> str:
    """Values in quotes, the first of many."""
    values = list(values)
    return ", ".join(map(repr, values[:most])) + (f" and {len(values) - most} more" if len(values) > most else "")
