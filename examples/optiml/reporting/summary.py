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

#: The share of the labels whose figures the summary shows.
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

    def line(self) -> str:
        """Fits 80 columns."""
        sides = (f"{x.value:.1f} [{x.low:.1f}, {x.high:.1f}]" for x in (self.untrained, self.pretrained))
        gap = f"{self.difference.value:+.1f} [{self.difference.low:+.1f}, {self.difference.high:+.1f}]"
        return "{:<21}{:<19}{:<19}{}".format(f"{self.name}", *sides, gap)


HEAD = "{:<21}{:<19}{:<19}{}".format("", "untrained", "pretrained", "gain [95 % interval]")


def gains(records: list[Record], index: ChestIndex, arm: str, draws: int, task: MaskSet | None = None) -> list[Gain]:
    """How far ``arm`` is above the untrained network, by everything that both have been scored by.

    Args:
        records: of both, with their arrays beside them on the disk.
        index: the films that were evaluated on.
        task: the films that were segmented, where they were.
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

    percent = f"{FRACTION:.0%}".replace("%", " %")
    wanted: list[tuple[str, Callable[[Record], Floats], dict[str, Any]]] = [
        (f"frozen AUC, {percent}", auc, {"protocol": "linear", "fraction": FRACTION}),
        (f"fine-tuned AUC, {percent}", auc, {"protocol": "finetune", "fraction": FRACTION}),
        ("neighbours' AUC", auc, {"protocol": "neighbours", "fraction": 1.0}),
    ]
    if task is not None:
        wanted.append((f"Dice, {task.label}", dice, {"stage": "segment", "label": task.label}))
    found = []
    for name, figure, keys in wanted:
        sides = [_replicates(records, side, keys, figure) for side in (SUP1, arm)]
        if difference := Difference.between(sides[1], sides[0]):
            found.append(Gain(name, *(_mean(side, sides[0].keys() & sides[1].keys()) for side in sides), difference))
    return found


def _array(record: Record, name: str) -> Floats:
    with np.load(Path(record["file"]).with_suffix(".npz")) as arrays:
        found: Floats = arrays[name]
    return found


def _replicates(
    records: list[Record], arm: str, keys: dict[str, Any], figure: Callable[[Record], Floats]
) -> Replicates:
    """By seed: the figure on the test films as they are, then on each drawn set of patients."""
    mine = [r for r in records if r["arm"] == arm and all(r.get(key) == value for key, value in keys.items())]
    return {record["seed"]: figure(record) for record in mine}


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


def summary_lines(training: Training, index: ChestIndex, found: list[Gain], report: Path) -> list[str]:
    """The last screen of a run on phantoms, at most 25 lines of 80 columns."""
    t, test = training, index.split("test")
    labelled = round(FRACTION * len(index.split("train")), -1)
    return [
        f"{t.method}, pretrained without labels on {t.films:,} drawn films: {t.epochs} epochs of "
        f"{t.steps // t.epochs} steps",
        f"of {t.batch_size} films at {t.image_size} px, in {duration(t.seconds)}. Scored on {len(test)} films of "
        f"{len(np.unique(test.patients))} other patients:",
        "",
        HEAD,
        *(gain.line() for gain in found),
        "",
        f"10 %: the labels of about {labelled:.0f} films were used. All figures are in percent;",
        "the intervals resample the test patients.",
        "",
        f"Report with its figures   {report}",
        "",
        "Next, on real films: NIH's 112,120 in one file (where to get it, and how to use",
        "your own films: examples/optiml/DATA.md), then",
        "  python -m examples.optiml prepare --dataset medmnist \\",
        "      --root chestmnist_64.npz --out data/chestmnist",
        "  make example-xray DATA=data/chestmnist",
    ]


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
