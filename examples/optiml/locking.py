"""One process at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import CommandError, DiskError

#: Left behind by every command that works in a folder; it holds nothing, and the system frees it however one ends.
LOCK = ".lock"


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold ``folder``, or end the command because another process does. A folder that stays empty is removed again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise CommandError(
            f"{folder} is in use: another command is at work there. Let it end, or choose another --out."
        ) from None
    except OSError as error:
        raise DiskError(f"cannot write to {folder} ({error.strerror}); choose another --out") from error
    try:
        yield
    finally:
        if is_empty(folder):
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        for path in made:
            with suppress(OSError):  # it holds something now
                path.rmdir()


def is_empty(folder: Path) -> bool:
    """Whether nothing lies there but the lock and files that were not finished."""
    return not folder.is_dir() or all(path.name == LOCK or path.suffix == ".part" for path in folder.iterdir())
