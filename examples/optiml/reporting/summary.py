"""A run in a few lines: what was trained, and how far it is above an untrained network, each with its interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.index import ChestIndex
from ..data.masks import MaskSet
from ..data.subsets import label_fraction
from ..downstream.arms import SUP1
from ..downstream.dice import weighted_mean
from ..downstream.finetune import usable_classes
from ..downstream.result_files import Record
from ..downstream.scores import Scored
from ..markdown import markdown_table
from ..metrics import Estimate, Floats
from ..pretraining.callbacks import duration
from .differences import Difference, Replicates, draws_with_original

#: The smallest share of the labels whose figures the summary shows: of fewer films nothing can be said.
FRACTION = 0.1


@dataclass(frozen=True)
class Gain:
    """One figure of the untrained and of the pretrained network, in percent, and their paired difference.

    Means over label subsets (``seeds``); 95 % intervals resample the test patients, the same ones for both networks.
    """

    name: str
    untrained: Estimate
    pretrained: Estimate
    difference: Difference

    def cells(self) -> list[str]:
        """The three figures with their intervals."""
        sides = [f"{x.value:.1f} [{x.low:.1f}, {x.high:.1f}]" for x in (self.untrained, self.pretrained)]
        gap = self.difference
        return [*sides, f"{gap.value:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]"]

    def line(self) -> str:
        """Fits 80 columns."""
        return "{:<21}{:<19}{:<19}{}".format(self.name, *self.cells())


HEAD = "{:<21}{:<19}{:<19}{}".format("", "untrained", "pretrained", "gain [95 % interval]")


def gains(records: list[Record], index: ChestIndex, arm: str, draws: int, task: MaskSet | None = None) -> list[Gain]:
    """How far ``arm`` is above the untrained network, by everything that both have been scored by.

    Fractions of the labels below :data:`FRACTION` are left out.

    Args:
        records: of both, with their arrays beside them on the disk.
        index: the films that were evaluated on.
        task: the films that were segmented, where they were. The largest fraction of them counts.
    """
    test, train = index.split("test"), index.split("train")
    weights = draws_with_original(test.patients, draws)

    def auc(record: Record) -> Floats:
        usable = usable_classes(label_fraction(train, record["fraction"], record["seed"]))
        return 100 * Scored(test, _array(record, "scores").astype(float), usable).macro(False, weights)

    def dice(record: Record) -> Floats:
        assert task is not None
        per_film, patients = _array(record, "dice").astype(float), task.split("test").index.patients
        known = ~np.isnan(per_film)
        return 100 * weighted_mean(per_film[known], draws_with_original(patients, draws)[:, known])

    fractions = sorted({record["fraction"] for record in records if record["fraction"] >= FRACTION})
    wanted: list[tuple[str, Callable[[Record], Floats], dict[str, Any]]] = [
        (f"{name} AUC, {_share(fraction)}", auc, {"protocol": protocol, "fraction": fraction})
        for name, protocol in (("frozen", "linear"), ("fine-tuned", "finetune"))
        for fraction in fractions
    ]
    wanted.append(("neighbours' AUC", auc, {"protocol": "neighbours", "fraction": 1.0}))
    if task is not None:
        largest = max(record["fraction"] for record in records if record["stage"] == "segment")
        wanted.append((f"Dice, {task.label}", dice, {"stage": "segment", "label": task.label, "fraction": largest}))
    found = []
    for name, figure, keys in wanted:
        sides = [_replicates(records, side, keys, figure) for side in (SUP1, arm)]
        if difference := Difference.between(sides[1], sides[0]):
            found.append(Gain(name, *(_mean(side, sides[0].keys() & sides[1].keys()) for side in sides), difference))
    return found


def _share(fraction: float) -> str:
    return "all" if fraction == 1 else f"{100 * fraction:g} %"


def _array(record: Record, name: str) -> Floats:
    with np.load(Path(record["file"]).with_suffix(".npz")) as arrays:
        found: Floats = arrays[name]
    return found


def _replicates(
    records: list[Record], arm: str, keys: dict[str, Any], figure: Callable[[Record], Floats]
) -> Replicates:
    """By seed: the figure on the test films as they are, then on each drawn set of patients."""
    mine = [r for r in records if r["arm"] == arm and all(r.get(key) == value for key, value in keys.items())]
    return {record["seed"]: figure(record) for record in mine if _has_figure(record)}


def _has_figure(record: Record) -> bool:
    """Not so where no class could be learnt, or no test film has anything to outline."""
    figure = record["positives"]["value"] if record["stage"] == "segment" else record["macro_auc"]
    return figure is not None


def _mean(of_seeds: Replicates, seeds: Iterable[int]) -> Estimate:
    mean = np.mean([of_seeds[seed] for seed in seeds], axis=0)
    return Estimate.of(mean[0], mean[1:])


def gain_record(gain: Gain) -> dict[str, Any]:
    """A gain for a results file."""
    parts = {"untrained": gain.untrained, "pretrained": gain.pretrained, "difference": gain.difference}
    rounded = {
        name: {key: round(dataclasses.asdict(x)[key], 4) for key in ("value", "low", "high")}
        for name, x in parts.items()
    }
    return {"name": gain.name, **rounded, "label_seeds": gain.difference.seeds}


@dataclass(frozen=True)
class Training:
    """What was pretrained, for the summary's first lines."""

    method: str
    films: int
    epochs: int
    steps: int
    batch_size: int
    image_size: int
    seconds: float
    kind: str = "films"
    """What the films are called."""


def summary_lines(training: Training | None, index: ChestIndex, found: list[Gain], records: list[Record]) -> list[str]:
    """What was run and what came of it, at most 80 columns wide."""
    test, train = index.split("test"), index.split("train")
    scored = f"Scored on {len(test)} films of {len(np.unique(test.patients))} other patients:"
    lines = [scored]
    if training is not None:
        t = training
        lines = [
            f"{t.method}, pretrained without labels on {t.films:,} {t.kind}: {t.epochs} epochs of "
            f"{t.steps // t.epochs} steps",
            f"of {t.batch_size} films at {t.image_size} px, in {duration(t.seconds)}. {scored}",
        ]
    lines += ["", HEAD, *(gain.line() for gain in found), ""]
    shares = sorted({record["fraction"] for record in records if FRACTION <= record["fraction"] < 1})
    for share in shares:
        labelled = len(label_fraction(train, share, 0))
        rounded = round(labelled, -1) if labelled >= 100 else labelled
        lines.append(f"{_share(share)}: the labels of about {rounded} films were used. All figures are in percent;")
    return [*lines, "the intervals resample the test patients.", *_pointing(records)]


def _pointing(records: list[Record]) -> list[str]:
    """How often the heatmaps of both networks point at the finding, of the largest fraction that has any."""
    maps = [record for record in records if record["stage"] == "heatmap" and "pointing" in record]
    shown = [r for r in maps if r["fraction"] == max(m["fraction"] for m in maps)]
    before, after = ([r["pointing"]["value"] for r in shown if (r["arm"] == SUP1) == side] for side in (True, False))
    if not before or not after:
        return []
    chance = [r["chance"]["pointing"] for r in shown]
    mean = [f"{100 * float(np.mean(values)):.0f} %" for values in (after, before, chance)]
    return ["Grad-CAM points at {} of the boxes (untrained {}, chance {}).".format(*mean)]


def gains_section(found: list[Gain]) -> str:
    """The gains as a section of the report; empty without any."""
    if not found:
        return ""
    rows = [[gain.name, *gain.cells()] for gain in found]
    table = markdown_table(["percent", "untrained", "pretrained", "gain [95 %]"], rows)
    note = "Means over label subsets; the intervals resample the test patients, the same ones for both networks."
    return "\n".join(["## Gain by pretraining", "", note, "", *table, ""])


def seeds_table(results: list[dict[str, Any]]) -> str:
    """The results files of several seeds as a Markdown table, for the example's page."""
    names = list(dict.fromkeys(gain["name"] for result in results for gain in result["gains"]))
    rows = []
    for result in results:
        gains_of = {gain["name"]: gain for gain in result["gains"]}
        rows.append(
            [f"seed {result['seed']}", *(_gain_cell(gains_of[name]) if name in gains_of else "" for name in names)]
        )
    return "\n".join(markdown_table(["", *names], rows))


def _gain_cell(gain: dict[str, Any]) -> str:
    difference = gain["difference"]
    sides = f"{gain['untrained']['value']:.1f} → {gain['pretrained']['value']:.1f}"
    return f"{sides} ({difference['value']:+.1f} [{difference['low']:+.1f}, {difference['high']:+.1f}])"
