"""Result files in JSON. A file is replaced as a whole, so a stopped run never leaves half of one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
FULL, QUICK = FOLDER / "cpu.json", FOLDER / "cpu-quick.json"
CORRECTNESS, STATIC = FOLDER / "correctness.json", FOLDER / "gpu_static.json"
CAPABILITIES = FOLDER / "capabilities.json"


def load(path: Path) -> Any:
    """What the file holds; an empty dict where there is no file.

    Raises:
        SystemExit: the file is not JSON.
    """
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path} cannot be read ({error}); delete it or restore it") from error


def save(path: Path, results: dict[str, Any]) -> None:
    """Replace the file. A reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)


def put(path: Path, section: str, name: str, entry: Any) -> None:
    """Set one entry of one section; all other entries stay."""
    results = load(path)
    results.setdefault(section, {})[name] = entry
    save(path, results)
