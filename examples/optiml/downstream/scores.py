"""Test scores of one classifier, and the figures that are made of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from ..data.index import ChestIndex
from ..metrics import Estimate, Floats, class_aucs, macro, patient_draws

KINDS = ("raw", "within_source")


@dataclass(frozen=True)
class Scored:
    """Test scores of one classifier, with what belongs to them."""

    test: ChestIndex
    scores: Floats
    usable: NDArray[np.bool_]
    """Classes with positives and negatives in training; the others could not be learnt."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What was chosen on validation."""

    def macro(self, within: bool, weights: Floats | None = None) -> Floats:
        """Macro AUC per row of ``weights``; ``within`` counts only pairs of one source."""
        groups = self.test.sources if within else None
        return macro(class_aucs(self.scores, self.test.labels, groups, weights), self.usable)

    def per_class(self, within: bool) -> dict[str, float]:
        aucs = class_aucs(self.scores, self.test.labels, self.test.sources if within else None)[0]
        kept = zip(self.test.classes, aucs, self.usable, strict=True)
        return {name: round(float(auc), 4) for name, auc, ok in kept if ok and not np.isnan(auc)}

    def class_intervals(self, weights: Floats) -> dict[str, list[float]]:
        """95 % interval of each class's AUC over resampled patients."""
        replicates = class_aucs(self.scores, self.test.labels, None, weights)
        columns = {name: replicates[:, c] for c, name in enumerate(self.test.classes)}
        return {
            name: [round(float(end), 4) for end in np.nanpercentile(columns[name], (2.5, 97.5))]
            for name in self.per_class(within=False)
        }


def summarise(scored: Scored, draws: int) -> dict[str, Any]:
    """All figures of one classifier, ready for JSON; ``macro_auc`` is None where no class could be scored."""
    weights = patient_draws(scored.test.patients, draws)
    figures: dict[str, Any] = {"images": len(scored.test), **scored.notes}
    for key, within in zip(KINDS, (False, True), strict=True):
        if within and scored.test.sources is None:
            continue
        per_class = scored.per_class(within)
        if per_class:
            estimate = dataclasses.asdict(Estimate.of(scored.macro(within)[0], scored.macro(within, weights)))
        else:
            estimate = dict.fromkeys(("value", "low", "high"))
        figures[key] = {"macro": estimate, "classes": len(per_class), "per_class": per_class}
    figures["raw"]["intervals"] = scored.class_intervals(weights)
    figures["macro_auc"] = figures["raw"]["macro"]["value"]
    return figures


def mean_figures(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one setting over seeds: means of values, and of the ends of the bootstrap intervals."""
    figures: dict[str, Any] = {"images": records[0]["images"], "seeds": len(records)}
    for key in KINDS:
        parts = [record[key] for record in records if record.get(key, {}).get("per_class")]
        if not parts:
            continue
        classes = sorted({name for part in parts for name in part["per_class"]})
        figures[key] = {
            "macro": {end: float(np.mean([part["macro"][end] for part in parts])) for end in ("value", "low", "high")},
            "classes": len(classes),
            "per_class": {
                name: round(float(np.mean([p["per_class"][name] for p in parts if name in p["per_class"]])), 4)
                for name in classes
            },
        }
        if key == "raw":
            ends = {name: [p["intervals"][name] for p in parts if name in p["intervals"]] for name in classes}
            figures[key]["intervals"] = {name: np.mean(pairs, axis=0).round(4).tolist() for name, pairs in ends.items()}
    if "raw" not in figures:
        figures["raw"] = {"macro": dict.fromkeys(("value", "low", "high")), "classes": 0, "per_class": {}}
    figures["macro_auc"] = figures["raw"]["macro"]["value"]
    return figures


def figures_table(figures: dict[str, Any], title: str) -> Table:
    """AUCs per class and on average; within-source figures beside the raw ones where sources are known."""
    kinds = [key for key in KINDS if key in figures]

    def per_class(part: dict[str, Any], name: str) -> str:
        if name not in part["per_class"]:
            return ""
        low, high = part.get("intervals", {}).get(name, (None, None))
        return f"{part['per_class'][name]:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")

    table = Table("class", *(f"AUC {kind.replace('_', '-')}" for kind in kinds), title=title)
    for name in figures["raw"]["per_class"]:
        table.add_row(name, *(per_class(figures[k], name) for k in kinds))
    table.add_section()

    def interval(part: dict[str, Any]) -> str:
        if part["macro"]["value"] is None:
            return "no class in both training and test"
        return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**part["macro"])

    table.add_row("macro", *(interval(figures[k]) for k in kinds))
    if meta := figures.get("metadata_only"):
        table.add_row("macro, source alone (no pixels)", *(interval(meta[k]) for k in kinds))
    return table
