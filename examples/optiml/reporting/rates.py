"""Which learning rate each method gets in the comparison: the best that was tried, on films that are not test films.

    python -m examples.optiml.reporting.rates RATES.rows RESULTS > METHODS.rows

A row of RATES.rows is named after its method and its rate, such as ``simclr-0.0005``. Its score is the mean of three
AUCs: of the frozen features with 10 % and with all of the labels, and of the nearest neighbours. The best row of each
method is printed as it stands there. After OPTiML's come the rows of the paper's Table III, with the same rate. Last
comes ``sup2``: ImageNet's weights, where they are at hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..downstream.arms import SUP2
from .comparison_rows import RECOMMENDED

#: Table III: OPTiML without some of its parts. Invariance goes with variance and covariance: without these, a constant
#: embedding would minimise it.
ABLATION = {
    "no-var-cov": "--optiml.beta 0 --optiml.eta 0 --optiml.invariance 0",
    "no-cv-sim": "--optiml.marginals uniform",
    "no-var-cov-no-cv-sim": "--optiml.beta 0 --optiml.eta 0 --optiml.invariance 0 --optiml.marginals uniform",
}
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
        scores = np.array([np.nan if (x := score(runs, name)) is None else x for name, _ in candidates])
        if np.isnan(scores).any():
            best = len(candidates) // 2
            yield f"# {method}: not all rates have been tried; the middle one."
        else:
            best = int(scores.argmax())
            rates = [name.rpartition("-")[2] for name, _ in candidates]
            tried = [f"{rate} ({100 * x:.1f})" for rate, x in zip(rates, scores, strict=True)]
            yield f"# {method}: {', '.join(tried)}."
        name, line = candidates[best]
        yield line
        if method == RECOMMENDED:
            yield from (f"{row} {name} {flags}" for row, flags in ABLATION.items())
    yield SUP2


if __name__ == "__main__":
    print("\n".join(chosen(Path(sys.argv[1]), Path(sys.argv[2]) / "runs")))
