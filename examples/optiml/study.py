"""The recorded comparison: untrained, VICReg and OPTiML on real films, over seeds; one resumable command.

Every run leaves one file in ``results/``. The table in the README is written from those files, so no number
in it was ever typed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from .callbacks import epoch_means, read_log
from .config import MethodOptions, PretrainConfig
from .data import ChestIndex, open_index
from .evaluate import score_backbone, score_metadata
from .files import write_json
from .metrics import Estimate, Floats, class_aucs, macro, patient_draws
from .pretrain import LOG, pretrain
from .provenance import provenance
from .scores import summarise
from .study_table import write_report

HERE = Path(__file__).parent
MARGINALS = ("perplexity", "learned", "detached", "uniform")


@dataclass(frozen=True)
class StudyConfig:
    """Run what is missing of the comparison, then rewrite the README's table. Interrupt and repeat at will."""

    data: Path
    """Folder in the layout of NIH ChestX-ray14, with ``labels.csv`` for within-source figures."""
    out: Path = Path("runs/study")
    """Run folders (large, not part of the repository)."""
    results: Path = HERE / "results"
    readme: Path = HERE / "README.md"
    seeds: tuple[int, ...] = (0, 1, 2)
    marginals: tuple[str, ...] = ("perplexity",)
    """OPTiML's policies to run."""
    match: tuple[str, ...] = ("channel",)
    """What OPTiML matches."""
    vicreg: bool = True
    """Also run VICReg."""
    epochs: int = 10
    batch_size: int = 64
    image_size: int = 64
    draws: int = 2000
    """Bootstrap replicates."""
    workers: int = 0
    report_only: bool = False
    """Only rewrite the table from the result files."""


@dataclass(frozen=True)
class Arm:
    """One line of the comparison; ``method`` None is the untrained network."""

    name: str
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def arms(config: StudyConfig) -> list[Arm]:
    """What is compared, the yardsticks first."""
    bad = set(config.marginals) - set(MARGINALS)
    if bad:
        raise SystemExit(f"marginals must be among {', '.join(MARGINALS)}, not {', '.join(sorted(bad))}")
    result = [Arm("untrained")] + ([Arm("vicreg", "vicreg")] if config.vicreg else [])
    for match in config.match:
        for policy in config.marginals:
            options = {"marginals": policy, "match": match}
            result.append(Arm(f"optiml-{policy}" + ("" if match == "channel" else f"-{match}"), "optiml", options))
    return result


def run_config(config: StudyConfig, arm: Arm, seed: int) -> PretrainConfig:
    """The pretraining of an arm under a seed; its folder name changes with anything its result depends on."""
    options = MethodOptions()
    if arm.options:
        chosen = dataclasses.replace(getattr(options, str(arm.method)), **arm.options)
        options = dataclasses.replace(options, **{str(arm.method): chosen})
    run = PretrainConfig(
        config.data, config.out, arm.method or "vicreg", epochs=config.epochs, batch_size=config.batch_size,
        image_size=config.image_size, seed=seed, options=options, workers=config.workers,
    )  # fmt: skip
    key = hashlib.sha256(json.dumps(run.identity(), sort_keys=True).encode()).hexdigest()[:8]
    return dataclasses.replace(run, out=config.out / f"{arm.name}-seed{seed}-{key}")


def main(config: StudyConfig) -> None:
    """The ``study`` command."""
    console = Console()
    if not config.report_only:
        index = open_index(config.data)
        config.results.mkdir(parents=True, exist_ok=True)
        _metadata(config, index)
        plan = [(arm, seed) for seed in config.seeds for arm in arms(config)]  # all arms of a seed, then the next
        for number, (arm, seed) in enumerate(plan, 1):
            console.rule(f"{number}/{len(plan)}  {arm.name}, seed {seed}")
            _one(config, index, arm, seed, console)
        _differences(config, index)
    write_report(config.results, config.readme)
    console.print(f"Table in {config.readme}")


def _metadata(config: StudyConfig, index: ChestIndex) -> None:
    scored = score_metadata(index)
    if scored is not None:
        write_json(config.results / "metadata.json", {"arm": "metadata", **summarise(scored, config.draws)})


def _one(config: StudyConfig, index: ChestIndex, arm: Arm, seed: int, console: Console) -> None:
    """Pretrain and score one arm under one seed, unless its result is there and was made the same way."""
    run = run_config(config, arm, seed)
    identity: dict[str, Any] = {**run.identity(), "data_fingerprint": index.fingerprint()}
    if arm.method is None:
        identity = {
            key: identity[key] for key in ("image_size", "seed", "val_fraction", "split_seed", "data_fingerprint")
        }
    path, scores = config.results / f"{arm.name}-seed{seed}.json", _scores_file(config, arm, seed)
    if path.exists() and scores.exists() and json.loads(path.read_text())["config"] == identity:
        console.print(f"{path.name} is there")
        return
    weights, record = None, {"arm": arm.name, "seed": seed, "config": identity}
    if arm.method is not None:
        weights = pretrain(run, console)
        if weights is None:
            raise SystemExit(f"{run.out} did not finish")
        log = read_log(run.out / LOG)
        first, last = epoch_means(log, 1), epoch_means(log, config.epochs)
        record["training"] = {"first_epoch": first, "last_epoch": last, "step_seconds": _seconds_per_step(log)}
    scored = score_backbone(index, weights, config.image_size, seed)
    scores.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(scores, scores=scored.scores, names=scored.test.names)
    write_json(path, {**record, **summarise(scored, config.draws), **provenance()})


def _seconds_per_step(log: list[dict[str, float]]) -> float:
    return float(np.median([row["seconds"] for row in log]))


def _differences(config: StudyConfig, index: ChestIndex) -> None:
    """Each OPTiML arm minus each yardstick: same seeds, same resampled patients, averaged over seeds."""
    test = index.split("test")
    weights = patient_draws(test.patients, config.draws)
    usable = index.split("train").labels.max(axis=0) > 0

    def replicates(arm: Arm, within: bool) -> Floats:
        """The macro AUC as it is (first) and in every replicate, mean over seeds."""
        everything = np.concatenate([np.ones((1, len(test))), weights])
        rows = []
        for seed in config.seeds:
            scores = np.load(_scores_file(config, arm, seed))["scores"]
            rows.append(macro(class_aucs(scores, test.labels, test.sources if within else None, everything), usable))
        return np.mean(rows, axis=0)

    result = []
    kinds = [("raw", False)] + ([("within_source", True)] if test.sources is not None else [])
    known = {(arm.name, kind): replicates(arm, within) for arm in arms(config) for kind, within in kinds}
    names = [arm.name for arm in arms(config)]
    yardsticks = [name for name in ("untrained", "vicreg") if name in names]
    for name in names:
        for other in yardsticks:
            if name != other and name != "untrained":
                row: dict[str, Any] = {"arm": name, "minus": other, "seeds": list(config.seeds)}
                for kind, _ in kinds:
                    gap = known[name, kind] - known[other, kind]
                    row[kind] = dataclasses.asdict(Estimate.of(gap[0], gap[1:]))
                result.append(row)
    write_json(config.results / "differences.json", {"arm": "differences", "draws": config.draws, "rows": result})


def _scores_file(config: StudyConfig, arm: Arm, seed: int) -> Path:
    return config.out / "scores" / f"{arm.name}-seed{seed}.npz"
