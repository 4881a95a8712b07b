"""The ``prepare`` command: list, convert what is left to convert, write the index last."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ...atomic import atomic_path, write_json
from ...errors import DiskError
from ...locking import LOCK, folder_lock
from ..index import BOXES_FILE, IMAGE_FOLDER, INDEX_FILE, PREPARED_FILE, SPLITS, ChestIndex, read_index
from . import reader
from .convert import Done, convert_all, forget_progress, read_progress, still_to_do
from .listing import DamagedSource, Film, Listing, unlisted
from .settings import PrepareConfig
from .split import draw_splits, match_to_nih

SKIPPED_FILE = "skipped.csv"


@dataclass(frozen=True)
class Prepared:
    """What came of a preparation."""

    index: ChestIndex
    skipped: list[tuple[str, str]]
    notes: list[str]
    converted: int
    """Images read in this run; the others were there already."""


def prepare(config: PrepareConfig, tick: Callable[[int, int], None] = lambda done, total: None) -> Prepared:
    """Prepare a data set; goes on where an earlier run of the same preparation stopped."""
    _check_out(config)
    with folder_lock(config.out):
        return _prepare(config, tick)


def _prepare(config: PrepareConfig, tick: Callable[[int, int], None]) -> Prepared:
    listing = reader(config.dataset)(config)
    if config.dataset in ("rsna", "siim"):
        listing = match_to_nih(listing, config)
    listing.skipped += unlisted(config.folder, listing, config.out)
    root = Path(os.path.realpath(config.folder))
    records = []
    for record in listing.records:
        if reason := _refusal(record, root):
            listing.skipped.append((record.name, reason))
        else:
            records.append(record)

    identity = _identity(config, listing)
    _claim(config.out, identity)
    done = read_progress(config.out)
    todo = still_to_do(records, done, config.out)
    if todo:  # the folder is unfinished until the new index is written, and reading it says so
        (config.out / INDEX_FILE).unlink(missing_ok=True)
    tick(len(records) - len(todo), len(records))
    pixels = listing.pixels(todo) if listing.pixels and todo else None
    try:
        for number, result in enumerate(convert_all(todo, config.out, config.size, config.workers, pixels), 1):
            done[result.name] = result
            tick(len(records) - len(todo) + number, len(records))
    except DamagedSource:
        forget_progress(config.out)
        raise

    skipped = list(listing.skipped)
    kept: list[tuple[Film, Done]] = []
    for record in records:
        result = done[record.name]
        if result.error:
            skipped.append((record.name, f"unreadable: {result.error}"))
        else:
            kept.append((record, result))
    if dropped := sum(result.dropped_boxes for _, result in kept):
        listing.notes.append(f"{dropped} boxes lie outside their image or are empty, and were left out.")
    _write_table(config.out / SKIPPED_FILE, ("item", "reason"), sorted(skipped))
    if not kept:
        common = Counter(reason for _, reason in skipped).most_common(1) or [("the tables list none", 0)]
        raise ValueError(f"{config.folder}: not one image could be used. Most often: {common[0][0]}")
    _write_index(config, kept)
    index = read_index(config.out, val_fraction=0.0)
    listing.notes += _lacking(index)
    summary = {
        "fingerprint": index.fingerprint(),
        "source": str(root),
        "splits": tally(index),
        "skipped": len(skipped),
        "notes": listing.notes,
    }
    write_json(config.out / PREPARED_FILE, {**identity, **summary})
    return Prepared(index, skipped, listing.notes, sum(not done[record.name].error for record in todo))


def _check_out(config: PrepareConfig) -> None:
    out = config.out
    if config.dataset != "phantom" and out.resolve() == config.folder.resolve():
        raise ValueError(f"out must not be the data set's own folder {out}")
    foreign = out.is_dir() and any(entry.name not in ("drawn", LOCK) for entry in os.scandir(out))
    if foreign and not (out / PREPARED_FILE).is_file():
        raise FileExistsError(f"{out} is not empty and was not made by prepare; choose another --out")


def _refusal(record: Film, root: Path) -> str:
    """Why a record must not be read: tables and links may point anywhere."""
    paths = (record.path, *(origin for _, origin in record.masks if isinstance(origin, Path)))
    return next((reason for path in paths if (reason := _reason(path, root))), "")


def _reason(path: Path, root: Path) -> str:
    try:
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(root):
            return f"refused: {path} leaves {root}"
        return "" if real.is_file() else f"no file: {path}"
    except (OSError, ValueError) as error:  # a name that no file can have
        return f"no file: {str(path)[:80]} ... ({getattr(error, 'strerror', None) or error})"


def _identity(config: PrepareConfig, listing: Listing) -> dict[str, Any]:
    """What makes two preparations the same: options, and the contents of the tables."""
    return {
        "dataset": config.dataset,
        "options": config.identity(),
        "classes": list(listing.classes),
        "tables": {
            **{path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in listing.tables},
            **listing.digests,
        },
    }


def _claim(out: Path, identity: dict[str, Any]) -> None:
    """Make the folder this preparation's, or refuse because it is another's. One without a film is nobody's."""
    path, images = out / PREPARED_FILE, out / IMAGE_FOLDER
    if path.is_file():
        saved = json.loads(path.read_text())
        differences = [text for key in identity for text in _differences(key, saved.get(key), identity[key])]
        if differences and ((out / INDEX_FILE).is_file() or (images.is_dir() and any(images.iterdir()))):
            raise FileExistsError(
                f"{out} holds a different preparation ({differences[0]}); choose another --out or delete it"
            )
        if differences:
            forget_progress(out)
            path.unlink()
    images.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_json(path, identity)


def _differences(key: str, theirs: Any, mine: Any) -> list[str]:
    """Option by option; one that is not set is none, so a folder stays what it is when ``prepare`` learns another."""
    pairs = {key: (theirs, mine)}
    if isinstance(mine, dict) and isinstance(theirs, dict):
        pairs = {name: (theirs.get(name), mine.get(name)) for name in {**mine, **theirs}}
    stated = {name: [None if value in (None, []) else value for value in pair] for name, pair in pairs.items()}
    return [
        f"{name} is {_shown(there)} there and {_shown(here)} here"
        for name, (there, here) in stated.items()
        if there != here
    ]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value[:3])) + (f" and {len(value) - 3} more" if len(value) > 3 else "")
    return "unset" if value is None else repr(value)


def _write_index(config: PrepareConfig, kept: list[tuple[Film, Done]]) -> None:
    """``boxes.csv``, then ``index.csv``."""
    kept = sorted(kept, key=lambda pair: pair[0].name)
    patients = [result.patient or Path(record.name).stem for record, result in kept]
    given: defaultdict[str, list[str]] = defaultdict(list)
    for patient, (record, _) in zip(patients, kept, strict=True):
        given[patient].append(record.split)
    splits = draw_splits(given, config)
    boxes = [(result.name, label, *(f"{v:.6f}" for v in rect)) for _, result in kept for label, *rect in result.boxes]
    _write_table(config.out / BOXES_FILE, ("name", "label", "x", "y", "width", "height"), boxes)
    rows = [
        (record.name, patient, splits[patient], "|".join(record.labels), record.source)
        for patient, (record, _) in zip(patients, kept, strict=True)
    ]
    _write_table(config.out / INDEX_FILE, ("name", "patient", "split", "labels", "source"), rows)


def _write_table(path: Path, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    # Names of files may hold bytes that are no text.
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def tally(index: ChestIndex) -> dict[str, dict[str, Any]]:
    """Per split: images, patients, and images with each finding."""
    result = {}
    for name in SPLITS:
        rows = index.splits == name
        if rows.any():
            positives = index.labels[rows].sum(axis=0).tolist()
            result[name] = {
                "images": int(rows.sum()),
                "patients": len(np.unique(index.patients[rows])),
                "findings": dict(zip(index.classes, positives, strict=True)),
            }
    return result


def _lacking(index: ChestIndex) -> list[str]:
    """A note for each split in which no film has a finding that others have."""
    counts = {name: part["findings"] for name, part in tally(index).items()}
    notes = []
    for name, findings in counts.items():
        lacking = [label for label in findings if not findings[label] and any(c[label] for c in counts.values())]
        if lacking:
            cannot = {"train": "cannot be learnt", "val": "have no say in what is chosen", "test": "are not scored"}[
                name
            ]
            notes.append(f"No film in {name} has {', '.join(lacking)}: these findings {cannot}.")
    return notes


def report(prepared: Prepared, config: PrepareConfig, console: Console) -> None:
    """The summary on screen."""
    index = prepared.index
    counts = tally(index)
    table = Table("", *counts)
    for row in ("images", "patients"):
        table.add_row(row, *(str(part[row]) for part in counts.values()), end_section=row == "patients")
    absent = [label for label in index.classes if not any(part["findings"][label] for part in counts.values())]
    for label in (label for label in index.classes if label not in absent):
        table.add_row(label, *(str(part["findings"][label]) for part in counts.values()))
    console.print(f"{config.dataset} in {config.out}", soft_wrap=True)
    console.print(table)
    console.print(f"{prepared.converted} images read now, {len(index) - prepared.converted} were there already.")
    kinds = Counter(reason.split(":")[0] for _, reason in prepared.skipped)
    for reason, count in kinds.most_common(8):
        console.print(f"[yellow]skipped {count}[/]: {escape(reason)}", highlight=False)
    if kinds:
        console.print(f"Every one of them, with the reason: {config.out / SKIPPED_FILE}", soft_wrap=True)
    for note in prepared.notes:
        console.print(f"• {escape(note)}", soft_wrap=True)


def main(config: PrepareConfig) -> None:
    """The ``prepare`` command."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        # Without a refreshing thread, since worker processes are forked while the bar is up.
        with Progress(*columns, console=console, auto_refresh=False) as progress:
            task = progress.add_task(f"preparing {config.dataset}", total=None)
            shown = 0.0

            def tick(done: int, total: int) -> None:
                nonlocal shown
                progress.update(task, completed=done, total=total)
                if time.monotonic() - shown > 0.2:
                    progress.refresh()
                    shown = time.monotonic()

            prepared = prepare(config, tick)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None
    except (ValueError, OSError, BrokenProcessPool) as error:
        stopped = DiskError.of(error, config.out) if isinstance(error, OSError) else None
        raise SystemExit(str(stopped or f"prepare: {error}")) from error
    report(prepared, config, console)
