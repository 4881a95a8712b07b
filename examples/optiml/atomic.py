"""Atomic writes: a file is written beside its place then renamed over it, so that an interrupted write does no harm."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``. Rename it over ``path`` on success, delete it on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON with sorted keys, atomically."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def torch_save_atomic(content: Any, path: Path) -> None:
    """``torch.save``, atomically. The file is on the disk when this returns."""
    import torch  # configurations write JSON with this module, and must not wait seconds for PyTorch

    buffer = io.BytesIO()  # PyTorch's own writer says of a full disk only that it failed
    torch.save(content, buffer)
    with atomic_path(path) as part, part.open("wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
