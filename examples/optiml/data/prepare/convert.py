"""The work on one image: read, reduce, write image and masks. Runs in many processes, and only once per image."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..images import resize_mask
from ..index import IMAGE_FOLDER, MASK_FOLDER, Box, mask_path
from .grey import Grey, check_contrast
from .listing import Film
from .pixels import decode_runs, fitted_size, read_grey, read_mask, resize

PROGRESS_FILE = "progress.jsonl"


@dataclass(frozen=True)
class Done:
    """What became of one record."""

    name: str
    stamp: str
    """Sizes and times of the image and its masks: what has changed since is read again."""
    patient: str = ""
    boxes: tuple[tuple[str, float, float, float, float], ...] = ()
    masks: tuple[str, ...] = ()
    dropped_boxes: int = 0
    error: str = ""


@dataclass(frozen=True)
class Job:
    """A record and where it goes."""

    record: Film
    out: Path
    size: int
    pixels: Grey | None = None
    """Its grey values, where it has no file of its own."""


def convert(job: Job) -> Done:
    """Write the image and its masks; a file that cannot be read is an answer, a full disk is an error."""
    record = job.record
    stamp = stamp_of(record)
    try:
        image, patient = read_grey(record.path) if job.pixels is None else (job.pixels, "")
        check_contrast(image)
        rows, columns = image.shape
        masks = {}
        for label, origin in record.masks:
            mask = read_mask(origin, columns, rows) if isinstance(origin, Path) else decode_runs(origin)
            masks[label] = resize_mask(mask, fitted_size(columns, rows, job.size))
        small = resize(image, fitted_size(columns, rows, job.size))
    except Exception as error:  # decoders raise whatever they like
        return Done(record.name, stamp, error=" ".join(f"{type(error).__name__}: {error}".split()))
    written = {mask_path(job.out, label, record.name): mask for label, mask in masks.items()}
    try:
        for path, mask in written.items():
            _save(mask.astype(np.uint8) * 255, path)
        for folder in (job.out / MASK_FOLDER).glob("*"):
            if (path := folder / record.name) not in written:
                path.unlink(missing_ok=True)  # an outline that has been taken back
        _save(small, job.out / IMAGE_FOLDER / record.name)
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL):
            raise
        return Done(record.name, stamp, error=f"{record.name[:80]} ... cannot be written: {error.strerror}")
    width, height = (columns, rows) if record.box_space is None else (record.box_space,) * 2
    boxes = [clipped for box in record.boxes if (clipped := _clip(box, width, height))]
    return Done(
        record.name, stamp, record.patient or patient, tuple(boxes), tuple(masks), len(record.boxes) - len(boxes)
    )


def stamp_of(record: Film) -> str:
    """Changes when the image does, or a mask, or which masks there are."""
    masks = (
        f"{label} {_stamp(origin) if isinstance(origin, Path) else sha256(' '.join(origin).encode()).hexdigest()[:16]}"
        for label, origin in record.masks
    )
    return "; ".join((_stamp(record.path), *masks))


def _stamp(path: Path) -> str:
    """A file's size and time."""
    try:
        stat = path.stat()
    except OSError:
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _save(image: NDArray[np.uint8], path: Path) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{sha256(os.fsencode(path.name)).hexdigest()[:16]}.{os.getpid()}.part")
    try:
        Image.fromarray(image).save(part, format="PNG")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _clip(box: Box, width: int, height: int) -> tuple[str, float, float, float, float] | None:
    """As fractions within the image; ``None`` where nothing of the box is on it."""
    left, top = max(box.x / width, 0.0), max(box.y / height, 0.0)
    right, bottom = min((box.x + box.width) / width, 1.0), min((box.y + box.height) / height, 1.0)
    if not (right > left and bottom > top):
        return None
    return box.label, left, top, right - left, bottom - top


def read_progress(out: Path) -> dict[str, Done]:
    """What earlier runs finished, by name; a last line torn by an interruption is left out."""
    done: dict[str, Done] = {}
    path = out / PROGRESS_FILE
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        row["boxes"] = tuple(tuple(box) for box in row["boxes"])
        done[row["name"]] = Done(**{**row, "masks": tuple(row["masks"])})
    return done


def forget_progress(out: Path) -> None:
    """Nothing is finished: every image will be read again."""
    (out / PROGRESS_FILE).unlink(missing_ok=True)


def still_to_do(records: list[Film], done: dict[str, Done], out: Path) -> list[Film]:
    """Records without a finished, unchanged and present image. Failures are tried again: the file may be whole now."""
    present = {entry.name for entry in os.scandir(out / IMAGE_FOLDER)}

    def finished(record: Film) -> bool:
        before = done.get(record.name)
        return (
            before is not None
            and not before.error
            and before.name in present
            and before.stamp == stamp_of(record)
            and all(mask_path(out, label, record.name).is_file() for label in before.masks)
        )

    return [record for record in records if not finished(record)]


def convert_all(
    records: list[Film], out: Path, size: int, workers: int, pixels: Iterator[Grey] | None = None
) -> Iterator[Done]:
    """Convert in ``workers`` processes (0: one per CPU), noting every result on disk as it comes.

    ``pixels`` gives the grey values of ``records`` in their order; without it each film is read from its own file.
    """
    if pixels is None:
        jobs = (Job(record, out, size) for record in records)
    else:
        jobs = (Job(record, out, size, grey) for record, grey in zip(records, pixels, strict=True))
    workers = min(workers or os.cpu_count() or 1, max(len(records), 1))
    with (out / PROGRESS_FILE).open("a") as log:

        def note(done: Done) -> Done:
            log.write(json.dumps(asdict(done)) + "\n")
            log.flush()
            return done

        log.write("\n")  # ends a line that an interruption tore
        if workers == 1:
            yield from map(note, map(convert, jobs))
            return
        pool = ProcessPoolExecutor(workers, initializer=_begin_worker, initargs=(os.getpid(),))
        try:
            yield from map(note, _map_ahead(pool, jobs, min(16, -(-len(records) // workers)), 4 * workers))
        finally:
            pool.shutdown(cancel_futures=True)


def _map_ahead(pool: ProcessPoolExecutor, jobs: Iterable[Job], batch: int, ahead: int) -> Iterator[Done]:
    """``convert`` of each, in order. At most ``ahead`` batches wait, since jobs may hold pixels: ``map`` takes all."""
    pending: deque[Future[list[Done]]] = deque()
    jobs = iter(jobs)
    while some := list(islice(jobs, batch)):
        with _interrupts_wait():
            pending.append(pool.submit(_convert_batch, some))
        if len(pending) > ahead:
            yield from pending.popleft().result()
    while pending:
        yield from pending.popleft().result()


def _convert_batch(jobs: list[Job]) -> list[Done]:
    return [convert(job) for job in jobs]


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """A process that starts within is not interrupted before ``_begin_worker``; this one is, but after it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(parent: int) -> None:
    """Interrupts are the parent's business. A worker whose parent was killed would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
