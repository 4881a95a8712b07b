"""The errors by which a stage says that it cannot go on."""

from __future__ import annotations

import errno
from pathlib import Path

#: What the system says of a disk that is full, of a quota that is used up, and of a disk that has become read-only.
NO_ROOM, READ_ONLY = (errno.ENOSPC, errno.EDQUOT), (errno.EROFS,)


class CommandError(Exception):
    """Something that the user can put right; its message says what. The command line prints it and exits with 1."""


class DiskError(CommandError):
    """Nothing more can be written, so that whatever else the command would do fails too."""

    @classmethod
    def of(cls, error: OSError, folder: Path, state: str = "") -> DiskError | None:
        """What to say of a disk that stopped a command at work in ``folder``; None for another error."""
        folder = Path(error.filename).parent if isinstance(error.filename, str) else folder
        if error.errno in NO_ROOM:
            what, cure = f"no space left on the disk of {folder}", "When there is room"
        elif error.errno in READ_ONLY:
            what, cure = f"the disk of {folder} is read-only", "When it can be written again"
        else:
            return None
        return cls(f"Stopped: {what}. {state + ' ' if state else ''}{cure}, the same command goes on from there.")
