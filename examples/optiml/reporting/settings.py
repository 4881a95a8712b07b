"""Options of the commands ``report`` and ``choose``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class ReportConfig:
    """Collect records into the paper's tables and figures: Markdown, CSV and PNG."""

    runs: tuple[Path, ...]
    """Folders to search for records, at any depth, or the records.json of an earlier report."""
    out: Path
    """Folder to write report.md, *.csv and *.png to."""


@dataclass(frozen=True)
class ChooseConfig:
    """Choose each method's learning rate from a comparison of rates; write methods.rows and ablation.rows with them."""

    rows: Path = PACKAGE / "rates.rows"
    """What was compared: rows named METHOD-RATE."""
    results: Path = PACKAGE / "results" / "rates"
    """Where ``compare`` put the records."""
    out: Path = PACKAGE
    """Folder to write methods.rows and ablation.rows to."""
    imagenet: bool = False
    """Also a row with ImageNet's weights, for ``compare --imagenet-weights FILE``."""
