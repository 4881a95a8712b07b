"""Result files: JSON, written at once or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
FULL, QUICK = FOLDER / "cpu.json", FOLDER / "cpu-quick.json"


def load(path: Path) -> dict[str, Any]:
    """What is known so far; empty where there is no file.

    Raises:
        SystemExit: the file is no results file.
    """
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path} cannot be read ({error}); delete it or restore it") from error


def save(path: Path, results: dict[str, Any]) -> None:
    """Replace the file; a reader sees the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)


def put(path: Path, section: str, name: str, entry: Any) -> None:
    """Set one entry of one section and keep all others."""
    results = load(path)
    results.setdefault(section, {})[name] = entry
    save(path, results)
