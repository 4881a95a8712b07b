"""The first table of a comparison from a file of rows: every row's figures, and how far it is from the first row.

An interval here is for other pretraining seeds *and* other patients. Each seed's difference is one sample of what
pretraining gives, as each reader's is in a study of several readers who read the same cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..data.index import ChestIndex
from ..data.subsets import label_fraction
from ..downstream.arms import SUP1, SUP2
from ..downstream.finetune import usable_classes
from ..markdown import markdown_table
from ..metrics import Floats, class_aucs, macro, student_quantile, student_tails
from .differences import Arrays, Replicates, draws_with_original, paired

#: A row's epochs under each seed, as ``RowStore.curves`` has them.
Curves = list[list[dict[str, float]]]
#: The protocols in the order of their columns, and what the columns call them.
PROTOCOLS = {"linear": "frozen", "neighbours": "neighbours", "finetune": "fine-tuned"}
#: With this chance a study like this one finds the smallest difference that is said to be within its reach.
POWER = 0.8
BEGIN, END = "<!-- overview:begin -->", "<!-- overview:end -->"
MEANING = (
    "AUC in percent: mean over pretraining seeds ± deviation. In brackets: the row minus the first one under the same "
    "seeds, with its 95 % interval for other seeds and other patients (and the same subsets of labels), in bold where "
    "that leaves out 0, with a † where it also does after Holm's correction for the number of intervals. Rank: the "
    "effective rank of the pooled features at the end. Perplexity: of the marginals, at the end. Converged: share of "
    "the images whose transport did, over the whole run. Seconds: of a step, without its views."
)


@dataclass(frozen=True)
class Effect:
    """One row minus another over paired seeds, with a 95 % interval for other seeds and other patients.

    The squared standard error is the variance of the mean over seeds, plus that over resampled patients. What a seed
    has to do with a patient is in both, so that the interval is rather too wide. Degrees of freedom after
    Satterthwaite: n - 1 for the first part, where n is the number of seeds, and no limit for the second.
    """

    value: float
    seeds: int
    error: float = np.nan
    """Standard error; NaN for a single seed, which says nothing about others."""
    freedom: float = np.nan

    @classmethod
    def between(cls, a: Replicates, b: Replicates) -> Effect | None:
        """``a`` minus ``b``; None if they share no seed."""
        if (gaps := paired(a, b)) is None:
            return None
        value, count = float(gaps[:, 0].mean()), len(gaps)
        if count == 1:
            return cls(value, count)
        of_seeds, of_patients = float(gaps[:, 0].var(ddof=1)) / count, float(np.nanvar(gaps[:, 1:].mean(axis=0)))
        total = of_seeds + of_patients
        freedom = (count - 1) * (total / of_seeds) ** 2 if of_seeds > 0 else np.inf
        return cls(value, count, total**0.5, freedom)

    @property
    def interval(self) -> tuple[float, float]:
        """Its ends; NaN for a single seed."""
        if np.isnan(self.error):
            return np.nan, np.nan
        reach = student_quantile(0.975, self.freedom) * self.error
        return self.value - reach, self.value + reach

    @property
    def beyond(self) -> bool:
        """Whether 0 lies outside the interval."""
        low, high = self.interval
        return low > 0 or high < 0

    @property
    def probability(self) -> float:
        """Of a difference as large or larger if the true one is 0; NaN for a single seed."""
        if np.isnan(self.error):
            return np.nan
        if self.error == 0:
            return 1.0 if self.value == 0 else 0.0
        return student_tails(self.value / self.error, self.freedom)

    @property
    def detectable(self) -> float:
        """The smallest true difference whose interval would leave out 0 with a chance of :data:`POWER`."""
        if np.isnan(self.error):
            return np.nan
        return (student_quantile(0.975, self.freedom) + student_quantile(POWER, self.freedom)) * self.error

    def text(self) -> str:
        """The difference with its interval, to be put in brackets."""
        low, high = self.interval
        shown = f"{self.value:+.1f}" if np.isnan(low) else f"{self.value:+.1f} [{low:+.1f}, {high:+.1f}]"
        return f"**{shown}**" if self.beyond else shown


@dataclass(frozen=True)
class OverviewRow:
    """What the overview knows of a row."""

    arm: str
    title: str
    arrays: Arrays
    curves: Curves


class Overview(NamedTuple):
    """A comparison at a glance."""

    text: str
    """The table in Markdown between marks, by which a page can be compared with it, and what it can tell."""
    effects: dict[str, dict[str, Effect]]
    """By column and title, what a row differs by from the first one."""


def overview(
    index: ChestIndex, dataset: str, fractions: Sequence[float], draws: int, rows: list[OverviewRow]
) -> Overview:
    """The overview of these rows.

    Args:
        index: the films that were evaluated on.
        dataset: what records call them.
        fractions: shares of the labels.
        draws: number of resamples of the patients.
        rows: the one that the others are compared with first.
    """
    weights = draws_with_original(index.split("test").patients, draws)
    figures = dict[str, list[Replicates]]()  # of every row, by column
    for protocol, name in PROTOCOLS.items():
        for fraction in (1.0,) if protocol == "neighbours" else sorted(fractions):
            prefix = f"{dataset}/{protocol}-{fraction:g}-seed"
            found = [_aucs(index, prefix, fraction, row.arrays, weights) for row in rows]
            if any(found):
                share = "" if protocol == "neighbours" else ", all" if fraction == 1 else f" {100 * fraction:g} %"
                figures[name + share] = found
    effects = {
        name: [_difference(row, x, first) for row, x in zip(rows[1:], found, strict=True)]
        for name, (first, *found) in figures.items()
    }
    logs = [_log_cells(row.curves) for row in rows]
    logged = [name for name in logs[0] if any(log[name] for log in logs)]
    trained = [place for place, row in enumerate(rows[1:]) if row.arm != SUP1]
    of_trained = {name: [gaps[place] for place in trained] for name, gaps in effects.items()}
    holding = holm([gap for gaps in of_trained.values() for gap in gaps if gap])
    lines = []
    for place, row in enumerate(rows):
        gaps = [effects[name][place - 1] if place else None for name in figures]
        cells = [_cell(found[place], gap, gap in holding) for found, gap in zip(figures.values(), gaps, strict=True)]
        seeds = {seed for found in figures.values() for seed in found[place]}
        title = "untrained" if row.arm == SUP1 else row.title
        lines.append([title, str(len(seeds)), *cells, *(logs[place][name] for name in logged)])
    table = markdown_table(["", "seeds", *figures, *logged], lines, align="right")
    reach = _reach(of_trained, len(holding))
    by_title = {
        name: {line[0]: gap for line, gap in zip(lines[1:], gaps, strict=True) if gap} for name, gaps in effects.items()
    }
    return Overview("\n".join([BEGIN, MEANING, "", *table, "", reach, END, ""]), by_title)


def _difference(row: OverviewRow, figures: Replicates, first: Replicates) -> Effect | None:
    """A row minus the first one. ImageNet's weights are the same under every seed, and were scored under one."""
    if row.arm == SUP2 and figures:
        figures = dict.fromkeys(first, next(iter(figures.values())))
    return Effect.between(figures, first)


def _aucs(index: ChestIndex, prefix: str, fraction: float, arrays: Arrays, weights: Floats) -> Replicates:
    """By pretraining seed the macro AUC in percent, a mean over the subsets of labels."""
    test, train, found = index.split("test"), index.split("train"), Replicates()
    for seed, kept in arrays.items():
        aucs = []
        for key, ranked in sorted(kept.items()):
            label_seed, _, name = key.removeprefix(prefix).partition("/")
            if key.startswith(prefix) and name == "ranks":
                usable = usable_classes(label_fraction(train, fraction, int(label_seed)))
                aucs.append(100 * macro(class_aucs(ranked.astype(float), test.labels, None, weights), usable))
        if aucs:
            found[seed] = np.mean(aucs, axis=0)
    return found


def holm(effects: list[Effect]) -> list[Effect]:
    """Those that are beyond 0 by Holm's rule: with 95 % certainty none of them all is there by chance."""
    known = sorted((gap for gap in effects if not np.isnan(gap.error)), key=lambda gap: gap.probability)
    for place, gap in enumerate(known):
        if gap.probability > 0.05 / (len(known) - place):
            return known[:place]
    return known


def _cell(of_seeds: Replicates, gap: Effect | None, holds: bool) -> str:
    if not of_seeds:
        return ""
    values = [x[0] for x in of_seeds.values()]
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}" + (f" ({gap.text()})" + "†" * holds if gap else "")


def _log_cells(curves: Curves) -> dict[str, str]:
    """Figures of the pretraining's log, means over seeds; blank where the method has no such figure."""
    last = [{name: x for name, x in run[-1].items() if np.isfinite(x)} for run in curves]
    whole = [[epoch["converged"] for epoch in run if "converged" in epoch] for run in curves]
    times = [[epoch["seconds"] for epoch in run if "seconds" in epoch] for run in curves]
    figures = {
        "rank": ([x["effective_rank"] for x in last if "effective_rank" in x], "{:.1f}"),
        "perplexity": ([x["perplexity"] for x in last if "perplexity" in x], "{:.0f}"),
        "converged": ([100 * float(np.mean(x)) for x in whole if x], "{:.1f} %"),
        "seconds": ([float(np.median(x)) for x in times if x], "{:.2f}"),
    }
    return {name: form.format(np.mean(x)) if x else "" for name, (x, form) in figures.items()}


def _reach(effects: dict[str, list[Effect | None]], holding: int) -> str:
    """How many intervals between pretrained rows leave out 0, and which differences were within reach."""
    known = {name: [gap for gap in gaps if gap and not np.isnan(gap.error)] for name, gaps in effects.items()}
    found = [gap.beyond for gaps in known.values() for gap in gaps]
    if not found:
        return "One seed says nothing about others, so there is no interval yet."
    within = [f"{name} {np.median([gap.detectable for gap in gaps]):.1f}" for name, gaps in known.items() if gaps]
    return (
        f"Of the {len(found)} intervals of pretrained rows {sum(found)} leave out 0; of as many differences that are "
        f"truly 0, {len(found) / 20:.2g} would. After Holm's correction {holding} do. A true difference of this many "
        f"points is found with a chance of {100 * POWER:.0f} % (median over rows): {', '.join(within)}."
    )
