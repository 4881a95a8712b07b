"""Options of the ``report`` command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ReportConfig:
    """Collect records into the paper's tables and figures: Markdown, CSV and PNG."""

    runs: tuple[Path, ...]
    """Folders to search for records, at any depth, or the records.json of an earlier report."""
    out: Path
    """Folder to write report.md, *.csv and *.png to."""
