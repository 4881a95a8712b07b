"""Sections of README.md between markers, written from results files."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def write_section(name: str, text: str) -> None:
    """Replace what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = README.read_text().split(begin)
    README.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")
