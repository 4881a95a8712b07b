"""Result files: one JSON per run of a stage, written whole or not at all, and never made twice.

A record says what it is (``stage``, ``arm``, ``dataset``, ``seed`` ...), what its figures depend on
(``identity``), the figures, and where they were made. The report is built from records and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..atomic import write_json
from ..errors import CommandError
from ..provenance import provenance

Record = dict[str, Any]


def write_record(path: Path, record: Record) -> Record:
    """Add where and when, then write."""
    record = {**record, **provenance()}
    write_json(path, record)
    return {**record, "file": str(path)}


def read_if_current(path: Path, identity: Record) -> Record | None:
    """The record at ``path`` if it was made from the same things, else None."""
    if not path.exists():
        return None
    record: Record = json.loads(path.read_text())
    return {**record, "file": str(path)} if record.get("identity") == json.loads(json.dumps(identity)) else None


def read_records(folders: Iterable[Path]) -> list[Record]:
    """Every record below ``folders``, in the order of their paths, or in a report's ``records.json``.

    Also those that a comparison keeps, all of a row and seed in one file. ``file`` says where each stands.
    """
    records: list[Record] = []
    for folder in folders:
        if folder.is_file():
            records += json.loads(folder.read_text())
            continue
        if not folder.is_dir():
            raise CommandError(f"{folder} is neither a folder nor a file")
        for path in sorted(folder.rglob("*.json")):
            content = json.loads(path.read_text())
            if isinstance(content, dict) and "stage" in content:
                records.append({**content, "file": str(path)})
            elif isinstance(content, dict) and "records" in content:
                shared = {"pretraining": content["pretraining"]}
                records += [{**r, **shared, "file": f"{path}/{key}"} for key, r in content["records"].items()]
    return records
