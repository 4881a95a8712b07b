"""Choose each method's learning rate from a comparison of rates, and write the rows that are compared with it.

Nothing else is chosen here, and every method has as many rates to choose from.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import atomic_path
from ..errors import CommandError
from ..pretraining.settings import PretrainConfig
from .comparison_rows import RECOMMENDED, ComparisonRow, methods
from .row_files import TITLE, read_rows
from .row_store import RowStore
from .settings import ChooseConfig

#: What the choice is made by: protocols and shares of the labels.
FIGURES = (("linear", 0.1), ("linear", 1.0), ("neighbours", 1.0))
RULE = (
    "The rule: of a method's rates, the one with the highest mean of three macro AUCs on the scored part of the films",
    "that are no test films: frozen with 10 % of the labels (mean over their subsets), frozen with all of them, and",
    "nearest neighbours.",
)
SEED = 0
PRINTED = "optiml-printed"
#: Table III's parts, and variance and covariance by themselves: what a row is called, its title, and its flags.
#: Invariance goes with the variance: without this, a constant embedding would minimise it.
PARTS = {
    "no-cvsim": ("without CV-SIM", "--optiml.marginals uniform"),
    "no-variance": ("without variance", "--optiml.beta 0 --optiml.invariance 0"),
    "no-covariance": ("without covariance", "--optiml.eta 0"),
    "no-varcov": ("without variance and covariance", "--optiml.beta 0 --optiml.eta 0 --optiml.invariance 0"),
    "neither": (
        "without variance, covariance and CV-SIM",
        "--optiml.beta 0 --optiml.eta 0 --optiml.invariance 0 --optiml.marginals uniform",
    ),
}


@dataclass(frozen=True)
class Rated:
    """One method under several rates."""

    name: str
    rates: dict[str, ComparisonRow]
    """Its rows, by rate from the lowest up."""
    scores: dict[str, float]
    """The figure that decides, in percent, of the rates that have records."""

    @property
    def rate(self) -> str:
        """The best rate; the middle one unless all have records."""
        if len(self.scores) < len(self.rates):
            return list(self.rates)[len(self.rates) // 2]
        return max(self.scores, key=self.scores.__getitem__)

    @property
    def arm(self) -> str:
        return f"{self.name}-tuned"

    @property
    def title(self) -> str:
        """The method's, as built-in comparisons print it."""
        return next((row.title for row in methods() if row.arm == self.name), self.name)

    def lines(self) -> list[str]:
        """The row with the rate, after a comment that says how it was chosen."""
        found = [f"{score:.2f} at {rate}" for rate, score in self.scores.items()]
        if missing := [rate for rate in self.rates if rate not in self.scores]:
            found.append(f"no records yet at {', '.join(missing)}, so the middle rate")
        flags = self.rates[self.rate].flags
        return [f"# {self.title}: {'; '.join(found)}.", shlex.join([self.arm, TITLE, self.title, *flags])]


def rated(rows: list[ComparisonRow], runs: Path) -> list[Rated]:
    """The methods with their scores. ``rows``: named METHOD-RATE. ``runs``: the folder with their records."""
    of_methods = defaultdict[str, dict[str, ComparisonRow]](dict)
    for row in rows:
        name, _, rate = row.arm.rpartition("-")
        if not name or row.overrides.get("optim.lr") != _number(rate):
            raise CommandError(f"a row must be named METHOD-RATE after its --optim.lr, not {row.arm!r}")
        of_methods[name][rate] = row
    result = []
    for name, by_rate in of_methods.items():
        rates = dict(sorted(by_rate.items(), key=lambda item: float(item[0])))
        scores = {rate: score(row, RowStore(runs, f"{row.arm}-seed{SEED}")) for rate, row in rates.items()}
        result.append(Rated(name, rates, {rate: x for rate, x in scores.items() if x is not None}))
    return result


def score(row: ComparisonRow, files: RowStore) -> float | None:
    """What the rate is chosen by, in percent; None where a record is missing or is of other settings than the row's."""
    records = [r for r in files.records.values() if r["stage"] == "evaluate" and r["macro_auc"] is not None]
    found = [[r["macro_auc"] for r in records if (r["protocol"], r["fraction"]) == figure] for figure in FIGURES]
    if not all(found) or _settings(files.pretraining) != _settings(_identity(row)):
        return None
    return 100 * float(np.mean([np.mean(of_subsets) for of_subsets in found]))


def _identity(row: ComparisonRow) -> dict[str, Any]:
    return row.apply(PretrainConfig(Path(), Path(), row.method or "")).identity()


def _settings(identity: dict[str, Any]) -> dict[str, Any]:
    """What a row or a preset says of a pretraining; sizes and what ``compare`` sets for short runs are left out."""
    kept = {name: identity[name] for name in ("method", "optim", "expander", "augment", "init", "norm")}
    return kept | {name: x for name, x in identity["options"].items() if name not in ("queue", "momentum")}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def methods_file(found: list[Rated], imagenet: bool) -> str:
    """The rows of the main table, OPTiML's recommended settings first."""
    lines = [
        "# Every method at the learning rate that was chosen for it: the rows of `examples/optiml/methods.sh table`.",
        "# `python -m examples.optiml choose` makes this file from the records in examples/optiml/results/rates.",
        *(f"# {line}" for line in RULE),
    ]
    for method in found:
        lines += method.lines()
    return "\n".join([*lines, *(["sup2"] if imagenet else [])]) + "\n"


def ablation_file(found: list[Rated]) -> str:
    """The rows of Table III and of variance and covariance by themselves, of OPTiML and of the objective as printed."""
    lines = [
        "# OPTiML without some of its parts, at the rates of methods.rows, which is made with this file.",
        "# Invariance goes with the variance: without this, a constant embedding would minimise it.",
    ]
    for method in (method for name in (RECOMMENDED, PRINTED) for method in found if method.name == name):
        lines += method.lines()
        for part, (title, flags) in PARTS.items():
            shown = f"{method.title} {title}" if method.name == RECOMMENDED else f"printed, {title}"
            lines.append(f"{method.arm}-{part} {method.arm} {TITLE} '{shown}' {flags}")
    return "\n".join(lines) + "\n"


def main(config: ChooseConfig) -> None:
    """The ``choose`` command."""
    try:
        rows = [row for row in read_rows(config.rows) if row.method]
    except ValueError as error:
        raise CommandError(str(error)) from error
    found = rated(rows, config.results / "runs")
    for name, text in (("methods", methods_file(found, config.imagenet)), ("ablation", ablation_file(found))):
        with atomic_path(config.out / f"{name}.rows") as part:
            part.write_text(text)
    for method in found:
        print(f"{method.title}: {method.rate}")
    print(f"Written: {config.out / 'methods.rows'}, {config.out / 'ablation.rows'}")
