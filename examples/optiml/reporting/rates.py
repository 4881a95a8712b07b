"""Which learning rate each method gets in the comparison: the best that was tried, on films that are not test films.

    python -m examples.optiml.reporting.rates RATES.rows RESULTS > METHODS.rows

A row of RATES.rows is named after its method and its rate, such as ``simclr-0.0005``. Its score is the mean of three
AUCs: of the frozen features with 10 % and with all of the labels, and of the nearest neighbours. The best row of each
method is printed as it stands there. Last comes ``sup2``: ImageNet's weights, where they are at hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..downstream.arms import SUP2

#: What the score is the mean of: protocol and share of the labels.
COLUMNS = (("linear", 0.1), ("linear", 1.0), ("neighbours", 1.0))


def score(runs: Path, name: str) -> float | None:
    """The mean AUC of a row over its seeds; None if a record is missing."""
    found = []
    for path in sorted(runs.glob(f"{name}-seed*.json")):
        if path.stem.rpartition("-seed")[0] != name:
            continue
        records = json.loads(path.read_text())["records"].values()
        for protocol, fraction in COLUMNS:
            aucs = [r["macro_auc"] for r in records if (r["protocol"], r["fraction"]) == (protocol, fraction)]
            if not aucs:
                return None
            found.append(float(np.mean(aucs)))
    return float(np.mean(found)) if found else None


def by_method(rows: Path) -> dict[str, list[tuple[str, str]]]:
    """The names and lines of a file of rows, by method."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in rows.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            name = line.split()[0]
            if not (match := re.fullmatch(r"(.+)-(\d*\.\d+)", name)):
                raise ValueError(f"{rows}: a row is named METHOD-RATE, not {name}")
            found.setdefault(match[1], []).append((name, line))
    return found


def chosen(rows: Path, runs: Path) -> Iterator[str]:
    """The lines of the comparison's file of rows."""
    yield "# Each method under the best of its learning rates, chosen on films that are not test films. Written by"
    yield f"# methods.sh from {rows.name}. In brackets: the mean AUC in percent of every rate, by which it was chosen."
    for method, candidates in by_method(rows).items():
        scores = [score(runs, name) for name, _ in candidates]
        if any(x is None for x in scores):
            yield f"# {method}: not all rates have been tried; the middle one."
            yield candidates[len(candidates) // 2][1]
            continue
        known = np.array(scores, dtype=float)
        tried = [f"{name.rpartition('-')[2]} ({100 * x:.1f})" for (name, _), x in zip(candidates, known, strict=True)]
        yield f"# {method}: {', '.join(tried)}."
        yield candidates[int(known.argmax())][1]
    yield SUP2


if __name__ == "__main__":
    print("\n".join(chosen(Path(sys.argv[1]), Path(sys.argv[2]) / "runs")))
