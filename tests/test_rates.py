"""The comparison of methods: its command from the films to the tables, and the rate that each method gets."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("segmentation_models_pytorch", reason="the example needs otloss[examples]")
pytest.importorskip("captum", reason="the example needs otloss[examples]")

from PIL import Image

from examples.optiml.__main__ import cli
from examples.optiml.data.index import read_index
from examples.optiml.downstream.arms import SUP1
from examples.optiml.errors import CommandError
from examples.optiml.pretraining.methods import METHODS
from examples.optiml.pretraining.settings import PretrainConfig
from examples.optiml.reporting.comparison_rows import PRINTED, ComparisonRow, rows
from examples.optiml.reporting.overview import BEGIN, END
from examples.optiml.reporting.rates import FIGURES, ablation_file, methods_file, rated, score
from examples.optiml.reporting.row_files import read_rows
from examples.optiml.reporting.row_store import RowStore

FOLDER = Path(__file__).parents[1] / "examples" / "optiml"
RATES = [row for row in read_rows(FOLDER / "rates.rows") if row.method]
NAMES = [*dict.fromkeys(row.arm.rpartition("-")[0] for row in RATES)]


def commands(folder: Path, *arguments: str, script: str = "methods.sh") -> list[list[str]]:
    """What the script would run, each command without the program's name. ``folder``: for a file of notes."""
    recorder, notes = folder / "recorder", folder / "notes"
    recorder.write_text(f"#!/usr/bin/env bash\nprintf '%q ' \"${{@:3}}\" >> '{notes}'\necho >> '{notes}'\n")
    recorder.chmod(0o755)
    notes.write_text("")
    environment = {**os.environ, "PYTHON": str(recorder)}
    subprocess.run(["bash", FOLDER / script, *arguments], env=environment, check=True)
    return [shlex.split(line) for line in notes.read_text().splitlines()]


def option(command: list[str], name: str) -> list[str]:
    """The values after the last flag of this name."""
    place = len(command) - command[::-1].index(name)
    end = next((i for i in range(place, len(command)) if command[i].startswith("--")), len(command))
    return command[place:end]


def test_the_parts_follow_each_other(tmp_path: Path) -> None:
    everything = commands(tmp_path, "DATA", "--precision", "bf16-mixed")
    assert [command[0] for command in everything] == [
        "prepare", "compare", "choose", "prepare", "compare", "prepare", "compare",
    ]  # fmt: skip
    parts = ("rates", "choose", "table", "ablation")
    assert everything == [x for part in parts for x in commands(tmp_path, part, "DATA", "--precision", "bf16-mixed")]
    compared = [command for command in everything if command[0] == "compare"]
    assert [option(command, "--seeds") for command in compared] == [["0"], ["0", "1", "2"], ["0", "1", "2"]]
    assert all(option(command, "--precision") == ["bf16-mixed"] for command in compared)
    (choice,) = commands(tmp_path, "choose", "DATA", "--imagenet-weights", "w.pth")
    assert choice[-1] == "--imagenet" and "--imagenet" not in everything[2]


def test_no_rate_is_chosen_on_test_films_and_sizes_are_the_studys(tmp_path: Path) -> None:
    (films, rates), (all_films, table) = (commands(tmp_path, part, "DATA") for part in ("rates", "table"))
    study_films, study = commands(tmp_path, "DATA", script="study.sh")
    assert sorted(films) == sorted(study_films)
    assert option(films, "--where") == ["split!=test"] and option(films, "--out") == option(rates, "--data")
    assert option(all_films, "--split-column") == ["split"] and "--where" not in all_films
    different = ("--data", "--rows", "--seeds", "--out", "--results")
    names = {word for word in study if word.startswith("--")} - set(different)
    assert all(option(study, name) == option(x, name) for name in names for x in (rates, table))
    assert {word for x in (rates, table) for word in x if word.startswith("--")} == names | set(different)


def test_every_method_has_the_same_three_rates() -> None:
    assert set(NAMES) == {*METHODS, "optiml-printed"} and len(RATES) == 3 * len(NAMES)
    built_in = {row.arm: row for row in rows("methods")}
    for name in NAMES:
        three = [row for row in RATES if row.arm.rpartition("-")[0] == name]
        assert [row.overrides["optim.lr"] for row in three] == [2e-4, 5e-4, 1.5e-3]
        for row in three:
            assert row.method == built_in[name].method
            rest = {path: x for path, x in row.overrides.items() if path != "optim.lr"}
            assert rest == {"optim.warmup_epochs": 3, **built_in[name].overrides}
    assert built_in["optiml-printed"].overrides == PRINTED


def record(protocol: str, fraction: float, seed: int, auc: float) -> dict[str, Any]:
    return {
        "stage": "evaluate", "dataset": "set", "protocol": protocol, "fraction": fraction, "seed": seed,
        "macro_auc": auc, "identity": {"start": "a", "image_size": 64},
    }  # fmt: skip


def write_records(runs: Path, row: ComparisonRow, aucs: dict[tuple[str, float], list[float]]) -> None:
    files = RowStore(runs, f"{row.arm}-seed0")
    files.pretraining = row.apply(PretrainConfig(Path(), Path(), row.method or "", epochs=15)).identity()
    for (protocol, fraction), values in aucs.items():
        for seed, auc in enumerate(values):
            files.records[f"set/{protocol}-{fraction:g}-seed{seed}"] = record(protocol, fraction, seed, auc)
    files.write()


def test_the_best_rate_is_taken(tmp_path: Path) -> None:
    """By hand: 0.6, 0.8 and 0.7; 0.5, 0.9 and 0.76; 0.61, 0.8 and 0.7. Frozen at 1 % counts nothing."""
    three = [row for row in RATES if row.arm.startswith("simclr")]
    for row, (tenth, everything, near) in zip(
        three, (([0.5, 0.7], 0.8, 0.7), ([0.5, 0.5], 0.9, 0.76), ([0.61, 0.61], 0.8, 0.7)), strict=True
    ):
        aucs = dict(zip(FIGURES, (tenth, [everything], [near]), strict=True))
        write_records(tmp_path, row, {**aucs, ("linear", 0.01): [0.99 if row is three[0] else 0.1]})
    (found,) = rated(three, tmp_path)
    assert found.rate == "0.0005" and found.scores == pytest.approx({"0.0002": 70, "0.0005": 72, "0.0015": 70.3333})
    comment, line = found.lines()
    assert comment == "# SimCLR: 70.00 at 0.0002; 72.00 at 0.0005; 70.33 at 0.0015."
    assert line == "simclr-tuned --title SimCLR --method simclr --optim.lr 0.0005 --optim.warmup-epochs 3"
    write_records(tmp_path, three[2], {figure: [0.9] for figure in FIGURES})
    (found,) = rated(three, tmp_path)
    assert found.rate == "0.0015" and "--optim.lr 0.0015" in found.lines()[1]


def test_without_all_its_records_a_method_keeps_the_middle_rate(tmp_path: Path) -> None:
    three = [row for row in RATES if row.arm.startswith("byol")]
    write_records(tmp_path, three[2], {figure: [0.9] for figure in FIGURES})
    write_records(tmp_path, three[0], {figure: [0.9] for figure in FIGURES[:2]})  # stopped before the neighbours
    (found,) = rated(three, tmp_path)
    assert found.rate == "0.0005" and found.scores.keys() == {"0.0015"}
    assert found.lines()[0] == "# BYOL: 90.00 at 0.0015; no records yet at 0.0002, 0.0005, so the middle rate."
    other = dataclasses.replace(three[2], overrides={**three[2].overrides, "options.byol.dim": 8})
    assert score(other, RowStore(tmp_path, f"{three[2].arm}-seed0")) is None  # the records are of other settings
    with pytest.raises(CommandError, match="named METHOD-RATE after its"):
        rated([dataclasses.replace(three[0], arm="byol-1")], tmp_path)


def test_the_committed_rows_are_what_the_committed_records_give() -> None:
    """Without records every method has the middle rate, and its comment says so."""
    found = rated(RATES, FOLDER / "results" / "rates" / "runs")
    committed = (FOLDER / "methods.rows").read_text()
    assert committed == methods_file(found, "sup2" in committed.splitlines())
    assert (FOLDER / "ablation.rows").read_text() == ablation_file(found)


def test_the_committed_rows_are_those_of_the_tables() -> None:
    table, ablation = ([row for row in read_rows(FOLDER / f"{x}.rows") if row.method] for x in ("methods", "ablation"))
    assert [row.arm for row in table] == [f"{name}-tuned" for name in NAMES] and table[0].title == "OPTiML"
    assert [row.title for row in table] == [{r.arm: r.title for r in rows("methods")}[name] for name in NAMES]
    assert ablation[0] == table[0] and len({str(row.overrides) for row in ablation}) == len(ablation)
    of_table3 = {row.arm: row for row in rows("ablation")}
    chosen = {path: table[0].overrides[path] for path in ("optim.lr", "optim.warmup_epochs")}
    for name in ("no-cvsim", "no-varcov", "neither"):
        (row,) = (row for row in ablation if row.arm == f"optiml-tuned-{name}")
        assert row.overrides == {**of_table3[f"optiml-{name}"].overrides, **chosen}


def test_from_the_films_to_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts at a tiny size, for some rows; the rates without a test film there to be read."""
    films, lines = tmp_path / "DATA" / "cxr-pneumonia", ["image,patient_id,split,Normal,Bacterial,Viral"]
    (films / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(60):
        split, kind = ("train", "train", "val", "test")[number % 4], np.eye(3, dtype=int)[number // 4 % 3]
        lines.append(f"images/{number}.png,p{number},{split},{','.join(map(str, kind))}")
        pixels = rng.integers(0, 100, (16, 16)) + 70 * int(kind.argmax())
        Image.fromarray(pixels.astype(np.uint8)).save(films / "images" / f"{number}.png")
    (films / "labels.csv").write_text("\n".join(lines) + "\n")
    example = tmp_path / "examples" / "optiml"
    example.mkdir(parents=True)
    shutil.copy(FOLDER / "rates.rows", example)
    monkeypatch.chdir(tmp_path)
    of_tests = films / "of-tests"
    (films / "images").rename(of_tests)
    (films / "images").mkdir()
    for line in lines[1:]:
        if ",test," not in line:
            shutil.copy(of_tests / Path(line.partition(",")[0]).name, films / "images")

    tiny = (
        "--epochs 1 --image-size 32 --batch-size 16 --draws 20 --precision 32-true --fractions 0.1 1.0 "
        "--large-seeds 0 --seeds 0"
    )

    def run(part: str, *only: str) -> None:
        for command in commands(tmp_path, part, "DATA", *tiny.split(), *(("--only", *only) if only else ())):
            cli([*command, "--workers", "1"] if command[0] == "prepare" else command)

    run("rates", *(f"vicreg-{rate}" for rate in ("0.0002", "0.0005", "0.0015")))
    index = read_index(tmp_path / "data" / "pneumonia-select")
    assert len(index) == 45 and set(index.splits) == {"train", "val", "test"}
    run("choose")
    scores = {}
    for path in (example / "results" / "rates" / "runs").glob("*.json"):
        kept = json.loads(path.read_text())["records"].values()
        by_figure = [[r["macro_auc"] for r in kept if (r["protocol"], r["fraction"]) == x] for x in FIGURES]
        scores[path.stem] = np.mean([np.mean(x) for x in by_figure])
    assert len(scores) == 3
    best = max(scores, key=scores.__getitem__).removeprefix("vicreg-").removesuffix("-seed0")
    chosen = {row.arm: row.overrides.get("optim.lr") for row in read_rows(example / "methods.rows")}
    assert chosen["vicreg-tuned"] == float(best) and chosen["optiml-tuned"] == 5e-4

    shutil.rmtree(films / "images")
    of_tests.rename(films / "images")
    run("table", "optiml-tuned", "vicreg-tuned")
    index = read_index(tmp_path / "data" / "pneumonia")
    assert [sum(index.splits == split) for split in ("train", "val", "test")] == [30, 15, 15]
    results = example / "results" / "methods"
    before = {path: path.read_bytes() for path in (results / "runs").iterdir()}
    run("ablation", "optiml-tuned", "optiml-tuned-neither")
    assert all(path.read_bytes() == kept for path, kept in before.items())  # what both tables share is made once
    for name, row in (("methods", "VICReg"), ("ablation", "OPTiML without variance, covariance and CV-SIM")):
        text = (results / name / "report.md").read_text().partition(BEGIN)[2]
        assert f"| {row} | 1 | " in text and "(effects.png)" in text
        assert (results / name / "effects.png").stat().st_size > 1000


PAGE = FOLDER / "COMPARISON.md"
REPORT = FOLDER / "results" / "methods" / "methods" / "report.md"


def test_the_page_quotes_the_report_or_says_that_there_is_none() -> None:
    page = PAGE.read_text()
    if not REPORT.exists():
        assert "**The runs are not done yet**" in page and BEGIN not in page
        return
    assert BEGIN + REPORT.read_text().partition(BEGIN)[2].partition(END)[0] + END in page and "not done" not in page


def test_the_means_of_the_page_are_those_of_the_records() -> None:
    """The intervals need the films' labels, which are not in the repository; the means do not."""
    if not REPORT.exists():
        pytest.skip("the runs of methods.rows are not done")
    head, _, *lines = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in head][1:]
    arms = {row.title: row.arm for row in read_rows(FOLDER / "methods.rows")} | {"untrained": SUP1}
    figures = {
        "frozen 1 %": ("linear", 0.01),
        **dict(zip(("frozen 10 %", "frozen, all", "neighbours"), FIGURES, strict=True)),
    }
    for name, *cells in lines:
        files = [*(FOLDER / "results" / "methods" / "runs").glob(f"{arms[name.strip()]}-seed*.json")]
        shown = dict(zip(columns, map(str.strip, cells), strict=True))
        assert shown["seeds"] == str(len(files))
        for column, wanted in figures.items():
            kept = [json.loads(path.read_text())["records"].values() for path in files]
            of_seeds = [[r["macro_auc"] for r in x if (r["protocol"], r["fraction"]) == wanted] for x in kept]
            mean = 100 * np.mean([np.mean(x) for x in of_seeds])
            assert float(shown[column].split()[0]) == pytest.approx(mean, abs=0.051), (name, column)
