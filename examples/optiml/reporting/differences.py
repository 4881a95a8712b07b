"""Paired differences between rows, over the same seeds and the same resampled test patients.

A row is named by its title here, as in the report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.index import ChestIndex
from ..data.masks import MaskSet
from ..downstream.dice import weighted_mean
from ..downstream.finetune import usable_classes
from ..markdown import markdown_table
from ..metrics import Estimate, Floats, class_aucs, comparable_patients, macro, patient_draws
from .tables import Cell, Row, Section, Summary, Table

#: The average over firm classes leaves out a class with fewer positive patients that its within-source AUC can use.
FEW_PATIENTS = 10
#: The note above the tables of differences.
MEANING = (
    "Mean over the pretraining seeds of which both rows' test scores are kept ± deviation over these, 95 % interval "
    "over resampled test patients (of these seeds: it does not say what other seeds would give), and the number of "
    f"seeds. Firm classes: those of which {FEW_PATIENTS} test patients or more have a film that its source has a "
    "negative for."
)
#: A figure of one row, by pretraining seed: first on the test films as they are, then on each resample of patients.
Replicates = dict[int, Floats]
#: The stored arrays of one row, by pretraining seed, then by DATASET/RECORD/ARRAY.
Arrays = dict[int, dict[str, NDArray[Any]]]


def paired(a: Replicates, b: Replicates) -> Floats | None:
    """``a`` minus ``b`` under each seed that both have, one seed a row; None if they share none."""
    seeds = sorted(a.keys() & b.keys())
    return np.stack([a[seed] - b[seed] for seed in seeds]) if seeds else None


@dataclass(frozen=True)
class Difference(Summary):
    """One row minus another."""

    agreed: bool
    """Whether it has the same sign under every seed."""

    @classmethod
    def between(cls, a: Replicates, b: Replicates) -> Difference | None:
        """``a`` minus ``b`` over the seeds that both have; None if they share no seed, or the figure is not defined."""
        if (gaps := paired(a, b)) is None:
            return None
        mean = gaps.mean(axis=0)
        if np.isnan(mean[0]):  # nothing to find among the test films
            return None
        deviation = gaps[:, 0].std(ddof=1) if len(gaps) > 1 else 0.0
        found = Estimate.of(mean[0], mean[1:])
        agreed = len(set(np.sign(gaps[:, 0]))) == 1
        return cls(found.value, float(deviation), found.low, found.high, len(gaps), agreed)

    def text(self, digits: int) -> str:
        spread = f" ± {self.deviation:.{digits}f}" if self.seeds > 1 else ""
        return f"{self.value:+.{digits}f}{spread} [{self.low:+.{digits}f}, {self.high:+.{digits}f}] ({self.seeds})"

    @property
    def beyond(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """The difference. In bold, with its direction, if 0 lies outside the interval and the seeds agree in sign."""
        word = ("above " if self.low > 0 else "below ") if self.beyond and self.agreed else ""
        return f"**{word}{self.text(3)}**" if word else self.text(3)


@dataclass(frozen=True)
class Measure:
    """A figure by which rows are compared, and how to compute it from stored arrays."""

    section: str
    column: str
    record: str
    """How the keys of its arrays begin."""
    array: str
    """How the keys of its arrays end. Several arrays, one for each of the task's own seeds, are averaged."""
    of: Callable[[NDArray[Any]], Floats]
    """Computes the figure from an array: on the test films as they are, then on each resample of patients."""

    def replicates(self, arrays: Arrays) -> Replicates:
        """The figure of one row, under each seed that has arrays for it."""
        found = {
            seed: [x for key, x in sorted(kept.items()) if key.startswith(self.record) and key.endswith(self.array)]
            for seed, kept in arrays.items()
        }
        return {seed: np.mean([self.of(x) for x in all_of], axis=0) for seed, all_of in found.items() if all_of}


#: The figures of all rows: by measure, then by title.
Replicated = dict[Measure, dict[str, Replicates]]


def auc_measures(index: ChestIndex, dataset: str, draws: int) -> list[Measure]:
    """Macro AUC with all labels, frozen, then fine-tuned: within sources, if they are known, and raw."""
    test, usable = index.split("test"), usable_classes(index.split("train"))
    weights = draws_with_original(test.patients, draws)

    def auc(groups: NDArray[np.str_] | None, classes: NDArray[np.bool_]) -> Callable[[NDArray[Any]], Floats]:
        return lambda x: macro(class_aucs(x.astype(float), test.labels, groups, weights), classes)

    kinds = {}
    if test.sources is not None:
        kinds["within source"] = auc(test.sources, usable)
        patients = comparable_patients(test.labels, test.sources, test.patients)
        firm = usable & (patients >= FEW_PATIENTS)
        if firm.any() and (usable & (patients > 0) & ~firm).any():
            kinds[f"within source, firm classes ({firm.sum()})"] = auc(test.sources, firm)
    kinds["raw"] = auc(None, usable)
    return [
        Measure(dataset, f"{name} AUC, {kind}", f"{dataset}/{protocol}-1-", "/ranks", of)
        for protocol, name in (("linear", "frozen"), ("finetune", "fine-tuned"))
        for kind, of in kinds.items()
    ]


def dice_measure(task: MaskSet, dataset: str, fraction: float, draws: int) -> Measure:
    """Mean Dice over the films with an outline; the others have NaN in the array."""
    weights = draws_with_original(task.split("test").index.patients, draws)

    def dice(x: NDArray[Any]) -> Floats:
        known = ~np.isnan(x)
        return weighted_mean(x[known].astype(float), weights[:, known])

    return Measure(
        f"{dataset}, {task.label}", "Dice, positives", f"{dataset}/segment-{task.label}-{fraction:g}-", "/dice", dice
    )


def replicated(measures: list[Measure], rows: dict[str, Arrays]) -> Replicated:
    """The figures of all ``rows``, without the measures for which no row has arrays. ``rows``: by title."""
    found = {measure: {title: measure.replicates(arrays) for title, arrays in rows.items()} for measure in measures}
    return {measure: of_rows for measure, of_rows in found.items() if any(of_rows.values())}


def difference_table(first: str, found: Replicated) -> Table:
    """The row with the title ``first`` minus each other row; one section per data set."""
    sections = []
    for section, columns in _by_section(found):
        titles = dict.fromkeys(title for of_rows in columns.values() for title in of_rows if title != first)
        lines = [
            Row(
                f"− {title}",
                [Cell(column, None, Difference.between(x.get(first, {}), x[title])) for column, x in columns.items()],
            )
            for title in titles
        ]
        sections.append(Section(section, lines, MEANING, 3, True))
    return Table("differences", f"{first} minus each row: paired differences [95 %]", [s for s in sections if s.rows])


def verdicts(untrained: str, found: Replicated) -> str:
    """Each row minus the untrained network: one table in Markdown per data set. ``untrained``: its title."""
    lines = ["## Each row minus the untrained network", ""]
    lines += [f"{MEANING} In bold where that leaves out 0 and all seeds, if there are several, agree in the sign.", ""]
    for section, columns in _by_section(found):
        rows = []
        for title in (title for title in next(iter(columns.values())) if title != untrained):
            gaps = [Difference.between(x[title], x.get(untrained, {})) for x in columns.values()]
            rows.append([title, *(gap.verdict if gap else "" for gap in gaps)])
        lines += [*markdown_table([section, *columns], rows), ""]
    return "\n".join(lines)


def beyond_zero(table: Table) -> str:
    """How many intervals leave out 0, and how many would by chance."""
    cells = [cell.ours for section in table.sections for row in section.rows for cell in row.cells]
    gaps = [gap for gap in cells if isinstance(gap, Difference)]
    if not gaps:
        return ""
    found = sum(gap.beyond for gap in gaps)
    return (
        f"Of the {len(gaps)} intervals of {table.title.partition(':')[0]}, {found} leave out 0. They are not corrected "
        f"for their number: about {len(gaps) / 20:.2g} would even if these networks were all equally good, and more if "
        "the methods were, as seeds scatter.\n"
    )


def _by_section(found: Replicated) -> list[tuple[str, dict[str, dict[str, Replicates]]]]:
    """Each section with its columns; a column holds the figures of all rows."""
    sections = dict.fromkeys(measure.section for measure in found)
    return [(name, {m.column: of_rows for m, of_rows in found.items() if m.section == name}) for name in sections]


def draws_with_original(patients: NDArray[np.str_], draws: int) -> Floats:
    """Weights of the test films: all 1, which is the test set as it is, then those of each resample of patients."""
    return np.concatenate([np.ones((1, len(patients))), patient_draws(patients, draws)])
