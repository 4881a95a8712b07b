"""What the cells of a user's label columns mean: yes and no, or findings in words."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..tables import some
from .settings import PrepareConfig

YES = {"1", "1.0", "true", "t", "yes", "y", "positive", "pos", "present"}
NO = {"0", "0.0", "false", "f", "no", "n", "negative", "neg", "absent"}
UNCERTAIN = {"-1", "-1.0", "uncertain"}
#: Nobody said anything.
BLANK = {"", "nan", "na", "n/a", "n.a.", "null", "none", "#n/a"}
#: Words for "nothing found" in a column of findings, unless ``--nothing`` names others.
NOTHING = {
    "no finding", "no findings", "normal", "healthy", "negative", "nothing", "nil", "unremarkable", "no abnormality",
}  # fmt: skip
#: That one of these stands in a column says that the others answer yes or no as well.
ANSWERS = {"0", "0.0", "1", "1.0", "true", "false", "yes", "no", "y", "n", "-1", "-1.0"}


@dataclass(frozen=True)
class Labels:
    """What the label columns say, row by row."""

    classes: tuple[str, ...]
    found: list[list[str]]
    left_out: list[str]
    """Why a row has to be left out; blank where it has not."""


def read_labels(config: PrepareConfig, rows: pd.DataFrame, columns: Mapping[str, str]) -> Labels:
    """Columns of yes and no are a finding each, by the name given here; of others the words are."""
    assert config.table is not None
    binary = [column for column in columns if _is_binary(config.table, rows[column])]
    words = {column: _words(config, rows[column]) for column in columns if column not in binary}
    spelling = _spelling(words)
    classes = dict.fromkeys(columns[column] for column in binary)
    for cells in words.values():
        classes.update(dict.fromkeys(sorted({spelling[word.lower()] for cell in cells for word in cell})))
    if bad := next((name for name in classes if "|" in name), None):
        raise ValueError(f"the finding {bad!r} holds a |, which separates findings")
    found: list[list[str]] = [[] for _ in range(len(rows))]
    left_out = [""] * len(rows)
    for column in columns:
        for row, (cell, image) in enumerate(zip(rows[column], rows[config.image_column], strict=True)):
            said = "blank" if cell.lower() in BLANK else "uncertain" if cell.lower() in UNCERTAIN else ""
            if column in words:
                found[row] += [spelling[word.lower()] for word in words[column][row]]
                meaning = config.meaning_of_blank or "negative" if said == "blank" else ""
            else:
                meaning = "positive" if cell.lower() in YES else "negative"
                if said:
                    meaning = (config.meaning_of_blank if said == "blank" else config.meaning_of_uncertain) or "refuse"
                if meaning == "positive":
                    found[row].append(columns[column])
            if meaning == "skip":
                left_out[row] = f"no label in column {column!r}"
            if meaning == "refuse" or (meaning == "positive" and column in words):
                detail = "" if meaning == "refuse" else ", but positive it cannot be in a column of words"
                raise ValueError(
                    f"{config.table}: column {column!r} is {cell!r} for {image!r}; say what that means with "
                    f"--{said}{detail}"
                )
    return Labels(tuple(classes), [list(dict.fromkeys(names)) for names in found], left_out)


def _is_binary(table: Path, column: pd.Series[str]) -> bool:
    """Whether all cells answer yes or no; an error where some do and some do not, and for other numbers."""
    cells = {cell.lower(): cell for cell in column}
    strange = sorted(cells.keys() - YES - NO - UNCERTAIN - BLANK)
    if not strange:
        return True
    values = some(sorted(set(column)), 12)
    answers = sorted(cells.keys() & ANSWERS)
    if answers:
        what = "0 and 1" if answers[0].strip("-").replace(".", "").isdigit() else "yes and no"
        raise ValueError(f"{table}: column {column.name!r} holds {cells[strange[0]]!r} among {what}: {values}")
    if number := next((word for word in strange if _is_number(word)), None):
        raise ValueError(
            f"{table}: column {column.name!r} holds {cells[number]!r}, but a label column holds 0 and 1 or "
            f"names of findings; it has {values}"
        )
    return False


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _words(config: PrepareConfig, column: pd.Series[str]) -> list[list[str]]:
    """The findings that each cell names."""
    cells = [_split(cell, config.separator) for cell in column]
    if config.separator is None:
        cells = _split_at_commas(config, column, cells)
    nothing = {word.lower() for word in config.nothing} | BLANK if config.nothing else NOTHING | BLANK
    tidy = ([" ".join(word.split()) for word in cell] for cell in cells)
    return [[word for word in cell if word.lower() not in nothing] for cell in tidy]


def _split(cell: str, separator: str | None) -> list[str]:
    """A list as Python or JSON writes it, or what stands between bars, semicolons or the separator named."""
    if cell[:1] + cell[-1:] in ("[]", "()", "{}"):
        try:
            value = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = [word.strip(" '\"") for word in cell[1:-1].split(",")]
        if isinstance(value, (list, tuple, set)):
            return sorted(map(str, value)) if isinstance(value, set) else [str(word) for word in value]
    if separator is not None:
        return cell.split(separator)
    return cell.replace(";", "|").split("|")


def _split_at_commas(config: PrepareConfig, column: pd.Series[str], cells: list[list[str]]) -> list[list[str]]:
    """At commas, if all that stands between them is found elsewhere in the column; else nobody can know."""
    parts = {word: [part.strip() for part in word.split(",")] for cell in cells for word in cell if "," in word}
    if not parts:
        return cells
    alone = {word.strip().lower() for cell in cells for word in cell} | NOTHING | BLANK
    often = Counter(part.lower() for several in parts.values() for part in {part.lower(): part for part in several})
    for word, several in parts.items():
        if any(part.lower() not in alone and often[part.lower()] < 2 for part in several):
            raise ValueError(
                f"{config.table}: column {column.name!r} holds {word!r}, which may be one finding or several: say "
                f"--separator ',' or --separator '|'; it has {some(sorted(set(column)), 12)}"
            )
    return [[part for word in cell for part in parts.get(word, [word])] for cell in cells]


def _spelling(words: Mapping[str, list[list[str]]]) -> dict[str, str]:
    """Of words that differ in capitals alone, the one that is written most often."""
    counts = Counter(word for cells in words.values() for cell in cells for word in cell)
    return {word.lower(): word for word, _ in sorted(counts.items(), key=lambda item: (item[1], item[0]))}
