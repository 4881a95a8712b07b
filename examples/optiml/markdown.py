"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], align: Literal["left", "right"] = "left"
) -> list[str]:
    """The lines of a table; ``align`` is for all columns but the first, which is aligned left."""
    first, *others = head
    rules = ["---", *("---:" if align == "right" else "---" for _ in others)]
    lines = [" | ".join(cells) for cells in ([first, *others], rules, *rows)]
    if not first:
        lines[0] = lines[0][1:]  # "| | second |": one space stands for the empty corner
    return [f"| {line} |" for line in lines]
