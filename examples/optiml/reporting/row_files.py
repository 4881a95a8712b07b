"""Rows of a comparison from a file: a line for each, with its name and the flags of ``pretrain`` in which it differs.

    # What follows a # is not read. The first row is what the others are compared with.
    positions               --optiml.match position --optiml.dense 256
    positions-value         positions --optiml.objective value
    vicreg                  --title "VICReg, tuned" --method vicreg

A row above may stand before the flags: its own flags then come first, and the last of two equal ones counts.
``--title`` says how the report prints the row; unset, by its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import re
import shlex
from pathlib import Path
from typing import Any

import tyro

from ..downstream.arms import SUP1
from ..errors import CommandError
from ..pretraining.settings import PretrainConfig
from .comparison_rows import BUILT_IN, RECOMMENDED, ComparisonRow, rows

#: What a row may set. All else is the same for all rows, and given to ``compare``.
FREE = ("method", "preset", "init", "imagenet_weights", "norm", "options", "optim", "expander", "augment")

#: How the report prints a row; no flag of ``pretrain``.
TITLE = "--title"


def comparison_rows(kind: str) -> list[ComparisonRow]:
    """The rows of a built-in comparison, or of a file."""
    return rows(kind) if kind in BUILT_IN else read_rows(Path(kind))


def reference(kind: str) -> str:
    """The arm that the others are compared with."""
    return RECOMMENDED if kind in BUILT_IN else read_rows(Path(kind))[1].arm


def read_rows(path: Path) -> list[ComparisonRow]:
    """The untrained network, then the rows of a file in its order. A ValueError names the line that is wrong."""
    if not path.is_file():
        raise ValueError(f"rows must be {', '.join(BUILT_IN)} or a file of rows, not {path}")
    found, flags_of = [ComparisonRow(SUP1)], dict[str, list[str]]()
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            name, *flags = shlex.split(line, comments=True) or [""]
            if not name:
                continue
            if flags and not flags[0].startswith("-"):
                if flags[0] not in flags_of:
                    raise ValueError(f"there is no row {flags[0]!r} above")
                flags[:1] = flags_of[flags[0]]
            title = _take_title(flags)
            flags_of[name], row = flags, _row(name, flags, title)
            if row.arm in [other.arm for other in found]:
                raise ValueError(f"there are two rows {row.arm!r}")
            if row.title in [other.title for other in found]:
                raise ValueError(f"there are two rows under the title {row.title!r}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        found.append(row)
    if len(found) == 1:
        raise ValueError(f"{path} has no row")
    return found


def _take_title(flags: list[str]) -> str:
    """Remove the title from the flags and return it; empty if there is none."""
    if TITLE not in flags:
        return ""
    place = flags.index(TITLE)
    title = "".join(flags[place + 1 : place + 2])
    if not title or title.startswith("-"):
        raise ValueError(f"{TITLE} lacks its value")
    del flags[place : place + 2]
    return title


def _row(name: str, flags: list[str], title: str) -> ComparisonRow:
    if not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", name):
        raise ValueError(f"a row is named in small letters, digits, - and ., not {name!r}")
    config = _parsed(*flags)
    overrides = _differences(config, PretrainConfig(config.data, config.out))
    if fixed := next((path for path in overrides if path.partition(".")[0] not in FREE), None):
        raise ValueError(f"--{fixed.replace('_', '-')} is the same for all rows; give it to compare")
    overrides.pop("method", None)
    row = ComparisonRow(name, config.method, overrides, title, tuple(flags))
    known = next((other for kind in BUILT_IN for other in rows(kind) if other.arm == name), None)
    if known is None:
        return row
    if title:
        raise ValueError(f"{name!r} is a row of another comparison, with a title of its own")
    if known.method is None and not flags:  # ImageNet's weights
        return known
    if (known.method, known.overrides) != (row.method, row.overrides):
        raise ValueError(f"{name!r} is a row of another comparison, with other settings; take another name")
    return known


@functools.cache  # a command reads its rows several times, and this takes a fifth of a second
def _parsed(*flags: str) -> PretrainConfig:
    """The flags as ``pretrain`` reads them; what it says of wrong ones, in one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            config = tyro.cli(PretrainConfig, args=["--data", ".", "--out", ".", *flags])
        config.resolve()
    except SystemExit:
        words = re.sub("[╭╮╰╯│─]", " ", said.getvalue()).split()
        raise ValueError(f"pretrain does not take {shlex.join(flags)} ({' '.join(words)[:300]})") from None
    except CommandError as error:
        raise ValueError(str(error)) from error
    return config


def _differences(node: Any, usual: Any, path: str = "") -> dict[str, Any]:
    """By dotted path the values in which one configuration differs from another."""
    found = {}
    for field in dataclasses.fields(node):
        value, other = getattr(node, field.name), getattr(usual, field.name)
        if dataclasses.is_dataclass(value):
            found |= _differences(value, other, f"{path}{field.name}.")
        elif value != other:
            found[path + field.name] = value
    return found
