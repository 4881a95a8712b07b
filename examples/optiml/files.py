"""Files that are written whole or not at all: beside the old one, then in its place."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what is to take the place of ``path``: a full disk or a stop leaves the old file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Readable, with sorted keys."""
    with whole(path) as part:
        part.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def save_whole(content: Any, path: Path) -> None:
    """``torch.save``, on disk for certain when it returns."""
    buffer = io.BytesIO()  # PyTorch's own writer says of a full disk only that it failed
    torch.save(content, buffer)
    with whole(path) as part, part.open("wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
