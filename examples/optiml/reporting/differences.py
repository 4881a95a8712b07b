"""Paired differences between rows: the same seeds, the same resampled test patients, averaged over the seeds."""

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
from ..metrics import Estimate, Floats, class_aucs, comparable_patients, macro, patient_draws
from .tables import Cell, Row, Section, Summary, Table

#: A class whose within-source AUC rests on fewer positive patients is left out of the firmer of the two averages.
FEW_PATIENTS = 10
#: What stands beside a difference.
MEANING = (
    "Mean over the pretraining seeds of which both rows' test scores are kept ± deviation over these, 95 % interval "
    "over resampled test patients (of these seeds: it does not say what other seeds would give), and the number of "
    f"seeds. Firm classes: those of which {FEW_PATIENTS} test patients or more have a film that its source has a "
    "negative for."
)
#: Of one row, by pretraining seed: its figure on the test films as they are, then on each drawn set of patients.
Replicates = dict[int, Floats]
#: Of one row, by pretraining seed: what was kept of its test films, by DATASET/RECORD/ARRAY.
Arrays = dict[int, dict[str, NDArray[Any]]]


@dataclass(frozen=True)
class Difference(Summary):
    """One row minus another."""

    agreed: bool
    """Whether it has one sign under every seed."""

    @classmethod
    def between(cls, a: Replicates, b: Replicates) -> Difference | None:
        """Over the seeds that both have; None where there are none, or no figure."""
        seeds = sorted(a.keys() & b.keys())
        if not seeds:
            return None
        gaps = np.stack([a[seed] - b[seed] for seed in seeds])
        mean = gaps.mean(axis=0)
        if np.isnan(mean[0]):  # nothing to find among the test films
            return None
        deviation = gaps[:, 0].std(ddof=1) if len(seeds) > 1 else 0.0
        found = Estimate.of(mean[0], mean[1:])
        agreed = len(set(np.sign(gaps[:, 0]))) == 1
        return cls(found.value, float(deviation), found.low, found.high, len(seeds), agreed)

    def text(self, digits: int) -> str:
        spread = f" ± {self.deviation:.{digits}f}" if self.seeds > 1 else ""
        return f"{self.value:+.{digits}f}{spread} [{self.low:+.{digits}f}, {self.high:+.{digits}f}] ({self.seeds})"

    @property
    def beyond(self) -> bool:
        """Whether its interval leaves out 0."""
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """The difference, in bold where its interval and all seeds say that the first row is above or below."""
        word = ("above " if self.low > 0 else "below ") if self.beyond and self.agreed else ""
        return f"**{word}{self.text(3)}**" if word else self.text(3)


@dataclass(frozen=True)
class Measure:
    """A figure that rows are compared by."""

    section: str
    column: str
    record: str
    """What the keys of its arrays begin with ..."""
    array: str
    """... and end with; several (the seeds of a task) are averaged."""
    of: Callable[[NDArray[Any]], Floats]
    """The figure of an array, as it is and on each drawn set of patients."""

    def replicates(self, arrays: Arrays) -> Replicates:
        found = {
            seed: [x for key, x in sorted(kept.items()) if key.startswith(self.record) and key.endswith(self.array)]
            for seed, kept in arrays.items()
        }
        return {seed: np.mean([self.of(x) for x in all_of], axis=0) for seed, all_of in found.items() if all_of}


#: By measure, then row.
Replicated = dict[Measure, dict[str, Replicates]]


def auc_measures(index: ChestIndex, dataset: str, draws: int) -> list[Measure]:
    """Macro AUC with all labels, frozen, then fine-tuned: within sources, where these are known, and raw."""
    test, usable = index.split("test"), usable_classes(index.split("train"))
    weights = with_itself(test.patients, draws)

    def auc(groups: NDArray[np.str_] | None, classes: NDArray[np.bool_]) -> Callable[[NDArray[Any]], Floats]:
        return lambda x: macro(class_aucs(x.astype(float), test.labels, groups, weights), classes)

    kinds = {}
    if test.sources is not None:
        kinds["within source"] = auc(test.sources, usable)
        founded = comparable_patients(test.labels, test.sources, test.patients)
        firm = usable & (founded >= FEW_PATIENTS)
        if firm.any() and (usable & (founded > 0) & ~firm).any():
            kinds[f"within source, firm classes ({firm.sum()})"] = auc(test.sources, firm)
    kinds["raw"] = auc(None, usable)
    return [
        Measure(dataset, f"{name} AUC, {kind}", f"{dataset}/{protocol}-1-", "/ranks", of)
        for protocol, name in (("linear", "frozen"), ("finetune", "fine-tuned"))
        for kind, of in kinds.items()
    ]


def dice_measure(task: MaskSet, dataset: str, fraction: float, draws: int) -> Measure:
    """Dice over films that have something to find; others are NaN."""
    weights = with_itself(task.split("test").index.patients, draws)

    def dice(x: NDArray[Any]) -> Floats:
        known = ~np.isnan(x)
        return weighted_mean(x[known].astype(float), weights[:, known])

    return Measure(
        f"{dataset}, {task.label}", "Dice, positives", f"{dataset}/segment-{task.label}-{fraction:g}-", "/dice", dice
    )


def replicated(measures: list[Measure], rows: dict[str, Arrays]) -> Replicated:
    """Every row by every measure that any row has."""
    found = {measure: {name: measure.replicates(arrays) for name, arrays in rows.items()} for measure in measures}
    return {measure: of_rows for measure, of_rows in found.items() if any(of_rows.values())}


def difference_table(first: str, found: Replicated) -> Table:
    """Row ``first`` minus each other one, a section per data set; rows by the names in the report."""
    sections = []
    for title, here in _by_section(found):
        names = dict.fromkeys(name for of_rows in here.values() for name in of_rows if name != first)
        lines = [
            Row(
                f"− {name}",
                [Cell(column, None, Difference.between(x.get(first, {}), x[name])) for column, x in here.items()],
            )
            for name in names
        ]
        sections.append(Section(title, lines, MEANING, 3, True))
    return Table("differences", f"{first} minus each row: paired differences [95 %]", [s for s in sections if s.rows])


def verdicts(untrained: str, found: Replicated) -> str:
    """A table in Markdown per data set, a line per row: this minus the untrained network."""
    lines = ["## Each row minus the untrained network", ""]
    lines += [f"{MEANING} In bold where that leaves out 0 and all seeds, if there are several, agree in the sign.", ""]
    for section, here in _by_section(found):
        lines += [f"| {section} | {' | '.join(here)} |", f"| --- |{' --- |' * len(here)}"]
        for name in (name for name in next(iter(here.values())) if name != untrained):
            gaps = [Difference.between(x[name], x.get(untrained, {})) for x in here.values()]
            texts = [gap.verdict if gap else "" for gap in gaps]
            lines.append(f"| {name} | {' | '.join(texts)} |")
        lines.append("")
    return "\n".join(lines)


def beyond_zero(table: Table) -> str:
    """How many intervals leave out 0, which some do by chance."""
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
    """Each data set's title, and by the columns of its measures all rows."""
    titles = dict.fromkeys(measure.section for measure in found)
    return [(title, {m.column: of_rows for m, of_rows in found.items() if m.section == title}) for title in titles]


def with_itself(patients: NDArray[np.str_], draws: int) -> Floats:
    """The test films as they are, then every drawn set."""
    return np.concatenate([np.ones((1, len(patients))), patient_draws(patients, draws)])
