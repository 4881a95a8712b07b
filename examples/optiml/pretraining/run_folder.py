"""Whose a run folder is: one run's, whatever process works in it, and nobody's before its first step."""

from __future__ import annotations

import json
from typing import Any

from ..atomic import write_json
from ..errors import CommandError
from ..locking import is_empty
from .settings import CONFIG, PretrainConfig


def check_run_folder(config: PretrainConfig, fingerprint: str) -> None:
    """End the command where the folder holds another run, or something else."""
    path, mine = config.out / CONFIG, _identity(config, fingerprint)
    if path.exists():
        theirs = json.loads(path.read_text())
        changed = [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]
        if changed:
            detail = "; ".join(f"{key}: {theirs.get(key)} there, {mine.get(key)} now" for key in sorted(changed))
            raise CommandError(f"{config.out} holds a different run ({detail}). Choose another --out or delete it.")
    elif not is_empty(config.out):
        raise CommandError(f"{config.out} is not empty and holds no {CONFIG}. Choose another --out.")


def claim_run_folder(config: PretrainConfig, fingerprint: str) -> None:
    """Write ``config.json``, unless it is there and says the same."""
    check_run_folder(config, fingerprint)
    if not (config.out / CONFIG).exists():
        write_json(config.out / CONFIG, _identity(config, fingerprint))


def _identity(config: PretrainConfig, fingerprint: str) -> dict[str, Any]:
    return {**config.identity(), "data_fingerprint": fingerprint}
