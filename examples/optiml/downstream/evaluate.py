"""How good the features are: frozen under a linear probe, or fine-tuned, with few or all labels, over seeds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ..atomic import write_json
from ..data.index import SPLITS, ChestIndex, with_findings
from ..data.subsets import label_fraction, write_ids
from ..pretraining.features import extract
from ..pretraining.monitor import knn_scores
from ..pretraining.network import Backbone
from ..pretraining.settings import MonitorConfig
from .finetune import finetune, predict, save_classifier, usable_classes
from .probe import fit_probe
from .result_files import Record, read_if_current, write_record
from .scores import Scored, figures_table, mean_figures, summarise
from .settings import EvaluateConfig
from .starting_weights import Start, default_out, resolve


def split_features(backbone: Backbone, index: ChestIndex, image_size: int) -> dict[str, Tensor]:
    """Frozen features of each split."""
    return {name: extract(backbone, index.split(name), image_size) for name in SPLITS}


class FrozenFeatures:
    """Frozen features of a start's films, computed when they are first asked for, and kept for the last seed."""

    def __init__(self, start: Start, index: ChestIndex) -> None:
        self.start, self.index = start, index
        self._kept: tuple[int, dict[str, Tensor]] | None = None

    def of(self, seed: int) -> dict[str, Tensor]:
        """Features per split; a new seed means new ones only where weights are random."""
        key = seed if self.start.random else 0
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, split_features(self.start.backbone(key), self.index, self.start.image_size))
        return self._kept[1]


def labelled_features(index: ChestIndex, x: dict[str, Tensor], train: ChestIndex) -> Tensor:
    """Features of the training films whose labels may be used."""
    return x["train"][torch.from_numpy(np.flatnonzero(np.isin(index.split("train").names, train.names)))]


def probe_scores(index: ChestIndex, x: dict[str, Tensor], train: ChestIndex | None = None) -> Scored:
    """Fit on train (or on the part of it whose labels may be used), choose on val, score test."""
    train = train or index.split("train")
    y = {"train": train.labels, "val": index.split("val").labels}
    y_train, y_val = (torch.from_numpy(labels) for labels in y.values())
    probe = fit_probe(labelled_features(index, x, train), y_train, x["val"], y_val)
    # Rounded, so that images with equal features tie, which the last bits of a matrix product may deny them.
    scores = probe.scores(x["test"]).numpy().round(9)
    return Scored(index.split("test"), scores, usable_classes(train), {"penalty": probe.penalty})


def neighbour_scores(index: ChestIndex, x: dict[str, Tensor], train: ChestIndex) -> Scored:
    """Score test films by the labels of their nearest films among ``train``, as the monitor does; nothing is chosen."""
    vote = MonitorConfig()
    labels, bank = torch.from_numpy(train.labels), labelled_features(index, x, train)
    scores = knn_scores(bank, labels, x["test"], vote.neighbours, vote.temperature)
    notes = {"neighbours": vote.neighbours, "temperature": vote.temperature}
    return Scored(index.split("test"), scores.double().numpy().round(9), usable_classes(train), notes)


def score_metadata(index: ChestIndex) -> Scored | None:
    """The same probe on the source of each image and no pixel: what confounding alone is worth."""
    if index.sources is None:
        return None
    names = np.unique(index.sources)
    columns: dict[str, Tensor] = {}
    for name in SPLITS:
        sources = index.split(name).sources
        assert sources is not None
        columns[name] = torch.from_numpy((sources[:, None] == names[None]).astype(np.float64))
    return probe_scores(index, columns)


def source_record(index: ChestIndex, dataset: str, out: Path, draws: int) -> Record | None:
    """What the probe gets from each film's source alone, as a row of the report; None where sources are unknown."""
    path, identity = out / "source-alone.json", {"data": index.fingerprint(), "draws": draws, "image_size": 0}
    if known := read_if_current(path, identity):
        return known
    scored = score_metadata(index)
    if scored is None:
        return None
    record = {
        "stage": "evaluate", "arm": "source alone, no pixels", "dataset": dataset, "pretraining": {}, "seed": 0,
        "protocol": "linear", "fraction": 1.0, "identity": identity, "train_images": len(index.split("train")),
        **summarise(scored, draws),
    }  # fmt: skip
    return write_record(path, record)


class Evaluation:
    """One backbone on one data set; frozen features are computed once per set of weights."""

    def __init__(
        self,
        config: EvaluateConfig,
        console: Console,
        start: Start | None = None,
        features: FrozenFeatures | None = None,
    ) -> None:
        """``start``: what ``config`` would else be resolved to; ``features``: of that start, shared with others."""
        self.config, self.console = config, console
        self.start: Start = start or resolve(config)
        self.index = with_findings(self.start.index())
        self.out = config.out or default_out(config.run, self.start)
        self.features = features or FrozenFeatures(self.start, self.index)
        self.kept_fractions = config.keep if config.keep is not None else (0.01,) if self.index.boxes else ()

    def plan(self) -> list[tuple[float, int]]:
        """Fractions and seeds; all labels under a frozen trained network leave nothing to chance, so once."""
        sure = self.config.protocol != "finetune" and not self.start.random
        seeds = {f: self.config.seeds_of(f)[: 1 if sure and f == 1.0 else None] for f in self.config.fractions}
        # Seed by seed, since features of random weights are kept for one seed only.
        return [(f, s) for s in dict.fromkeys(sum(seeds.values(), ())) for f in seeds if s in seeds[f]]

    def records(self) -> list[Record]:
        """All records, made or found."""
        return [self.one(fraction, seed) for fraction, seed in self.plan()]

    def identity(self, fraction: float, seed: int) -> Record:
        """What a record's figures depend on."""
        identity = {
            **self.start.identity(), "protocol": self.config.protocol, "fraction": fraction, "seed": seed,
            "data": self.index.fingerprint(), "draws": self.config.draws,
        }  # fmt: skip
        if self.config.protocol == "finetune":
            identity["train"] = dataclasses.asdict(self.config.train)
        return identity

    def one(self, fraction: float, seed: int, keep: bool | None = None) -> Record:
        """``keep``: whether a fine-tuned network must be there too; unset: as the configuration says."""
        protocol, identity = self.config.protocol, self.identity(fraction, seed)
        path = self.out / f"{protocol}-{fraction:g}-seed{seed}.json"
        keep = protocol == "finetune" and (fraction in self.kept_fractions if keep is None else keep)
        model_path = path.with_suffix(".pth") if keep else None
        known = read_if_current(path, identity)
        if known is not None and (model_path is None or model_path.exists()):
            return known
        self.start.ensure_weights()
        train = label_fraction(self.index.split("train"), fraction, seed)
        write_ids(train, self.out / "subsets", fraction, seed)
        if protocol == "linear":
            scored = probe_scores(self.index, self.features.of(seed), train)
        elif protocol == "neighbours":
            scored = neighbour_scores(self.index, self.features.of(seed), train)
        else:
            scored = self.finetuned(train, seed, path, identity, model_path)
        record = {
            "stage": "evaluate", **self.start.labels(), "protocol": protocol, "fraction": fraction, "seed": seed,
            "identity": identity, "train_images": len(train), "train_patients": len(np.unique(train.patients)),
            **summarise(scored, self.config.draws),
        }  # fmt: skip
        np.savez_compressed(path.with_suffix(".npz"), scores=scored.scores.astype(np.float32), names=scored.test.names)
        auc = record["macro_auc"]
        shown = "no class to score" if auc is None else f"AUC {auc:.3f}"
        self.console.print(
            f"{self.start.shown}, {protocol}, {fraction:.0%} of labels ({len(train)} films), seed {seed}: {shown}",
            highlight=False,
        )
        record = write_record(path, record)
        path.with_suffix(".ckpt").unlink(missing_ok=True)
        return record

    def finetuned(self, train: ChestIndex, seed: int, path: Path, identity: Record, keep: Path | None) -> Scored:
        val, test = self.index.split("val"), self.index.split("test")
        size, backbone = self.start.image_size, self.start.backbone(seed)
        with self.console.status(f"fine-tuning, {self.start.shown}, with {len(train)} labelled films, seed {seed}"):
            model, fitted = finetune(
                backbone, train, val, size, self.config.train, seed, path.with_suffix(".ckpt"), identity
            )
        # A network of other settings must not stand beside the record to come, nor this one beside another record.
        if read_if_current(path, identity) is None:
            path.unlink(missing_ok=True)
        if keep is not None:
            save_classifier(model, train, size, keep)
        else:
            path.with_suffix(".pth").unlink(missing_ok=True)
        return Scored(test, predict(model, test, size), usable_classes(train), dataclasses.asdict(fitted))


def evaluate(
    config: EvaluateConfig,
    console: Console | None = None,
    start: Start | None = None,
    features: FrozenFeatures | None = None,
) -> list[Record]:
    """Every fraction and seed that is asked for; those that are there are read. See :class:`Evaluation`."""
    return Evaluation(config, console or Console(), start, features).records()


def main(config: EvaluateConfig) -> None:
    """The ``evaluate`` command."""
    console = Console()
    evaluation = Evaluation(config, console)
    records = evaluation.records()
    largest = [record for record in records if record["fraction"] == max(config.fractions)]
    figures: dict[str, Any] = mean_figures(largest)
    if metadata := score_metadata(evaluation.index):
        figures["metadata_only"] = summarise(metadata, config.draws)
    title = f"{evaluation.start.shown}, {config.protocol}, {max(config.fractions):.0%} of the labels"
    console.print(figures_table(figures, f"{title}, {figures['images']} test images, {len(largest)} seeds"))
    console.print(f"Records: {evaluation.out}")
    if kept := list(evaluation.out.glob("finetune-*.pth")):
        console.print(
            f"Kept there for heatmaps: {len(kept)} fine-tuned networks of 45 MB; --keep says of which fractions."
        )
    if config.json:
        write_json(config.json, {**evaluation.start.labels(), "protocol": config.protocol, **figures, "runs": records})
