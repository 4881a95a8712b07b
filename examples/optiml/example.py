"""The whole story in a few minutes on a laptop: phantoms, OPTiML, and how its features compare."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .config import AugmentConfig, PretrainConfig
from .data import read_index
from .evaluate import score_backbone
from .layout import PhantomConfig, write_phantoms
from .metrics import Estimate, patient_draws
from .pretrain import pretrain
from .provenance import provenance
from .scores import Scored, summarise

TRAIN, TEST, PHANTOM_SIZE, IMAGE_SIZE = 2000, 600, 96, 64
DRAWS = 1000


@dataclass(frozen=True)
class ExampleConfig:
    """Draw phantoms, pretrain OPTiML, and compare untrained, OPTiML and supervised features."""

    out: Path = Path("runs/example")
    """Working folder; a second call goes on where the first was stopped."""
    method: str = "optiml"
    epochs: int = 5
    """Epochs of pretraining."""
    supervised_epochs: int = 12
    """Epochs of supervised training; 0 leaves it out."""
    seed: int = 0
    json: Path | None = None
    """Also write the figures here."""


def phantoms(out: Path, seed: int, console: Console) -> Path:
    """The example's phantom folder, drawn at the first call."""
    if not (out / "Data_Entry_2017_v2020.csv").exists():
        with Progress(console=console) as progress:
            task = progress.add_task("drawing phantoms", total=TRAIN + TEST)
            config = PhantomConfig(out, TRAIN, TEST, PHANTOM_SIZE, seed)
            write_phantoms(config, lambda done, _: progress.update(task, completed=done))
    return out


def main(config: ExampleConfig) -> None:
    """The ``example`` command."""
    console, started = Console(), time.monotonic()
    data = phantoms(config.out / f"phantoms-{config.seed}", config.seed, console)
    rows: dict[str, Scored] = {}
    index = read_index(data)

    console.rule("1. untrained network")
    rows["untrained, frozen"] = score_backbone(index, None, IMAGE_SIZE, config.seed)
    console.rule(f"2. pretraining with {config.method}, no labels")
    # Crops below a third of the film would often miss a finding of this size altogether.
    run = PretrainConfig(
        data, config.out / f"{config.method}-{config.epochs}epochs-{config.seed}", config.method, epochs=config.epochs,
        image_size=IMAGE_SIZE, seed=config.seed, augment=AugmentConfig(min_scale=0.3),
    )  # fmt: skip
    backbone = pretrain(run, console)
    rows[f"{config.method}, frozen"] = score_backbone(index, backbone, IMAGE_SIZE, config.seed)
    if config.supervised_epochs:
        console.rule("3. supervised training, as a ceiling")
        rows["supervised, end to end"] = train_supervised(
            index, IMAGE_SIZE, config.supervised_epochs, config.seed,
            tick=lambda epoch, loss: console.print(f"  epoch {epoch}/{config.supervised_epochs}  loss {loss:.4f}"),
        )  # fmt: skip
    console.print(auc_table(rows))
    seconds = time.monotonic() - started
    console.print(f"{seconds:.0f} s. Run folder: {run.out}")
    if config.json:
        figures = {name: summarise(scored, DRAWS)["raw"] for name, scored in rows.items()}
        films = {"train": int((index.splits == "train").sum()), "test": len(index.split("test")), "px": IMAGE_SIZE}
        record = {"arm": "example", "films": films, "seconds": round(seconds), "rows": figures, **provenance()}
        config.json.write_text(json.dumps(record, indent=1) + "\n")


def auc_table(rows: dict[str, Scored]) -> Table:
    """AUC of each class, and the macro AUC with its 95 % interval over test patients."""
    first = next(iter(rows.values()))
    weights = patient_draws(first.test.patients, DRAWS)
    per_class = [scored.per_class(within=False) for scored in rows.values()]
    table = Table("AUC", *rows, title=f"Test AUC on {len(first.test)} phantoms")
    for name in per_class[0]:
        table.add_row(name, *(f"{aucs[name]:.3f}" for aucs in per_class))
    table.add_section()
    macros = [Estimate.of(scored.macro(False)[0], scored.macro(False, weights)) for scored in rows.values()]
    table.add_row("macro", *(f"{macro.value:.3f}" for macro in macros))
    table.add_row("95 % interval", *(f"{macro.low:.3f} – {macro.high:.3f}" for macro in macros))
    return table
