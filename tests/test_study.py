"""The study of SELECTION.md: its command reads no test film, and the page quotes what the command reported."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("segmentation_models_pytorch", reason="the example needs otloss[examples]")
pytest.importorskip("captum", reason="the example needs otloss[examples]")

from PIL import Image

from examples.optiml.__main__ import cli
from examples.optiml.data.index import read_index
from examples.optiml.downstream.arms import SUP1
from examples.optiml.pretraining.log import read_log
from examples.optiml.reporting.overview import BEGIN, END
from examples.optiml.reporting.row_files import comparison_rows

FOLDER = Path(__file__).parents[1] / "examples" / "optiml"
RESULTS = FOLDER / "results" / "study"


def commands(data: Path, results: Path) -> dict[str, list[str]]:
    """The script's commands for a study, by name."""
    text = (FOLDER / "study.sh").read_text().replace("\\\n", " ").partition("\nfi\n")[2]
    for name, value in (("$data", data), ("$results", results), ("examples/optiml/study.rows", FOLDER / "study.rows")):
        text = text.replace(name, str(value))
    lines = [shlex.split(line.replace('"$@"', "")) for line in text.splitlines()]
    assert [words[0] for words in lines] == ["optiml", "optiml"]
    return {words[1]: words[1:] for words in lines}


def test_no_test_film_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does its work where they do not exist."""
    folder, lines = tmp_path / "DATA" / "cxr-pneumonia", ["image,patient_id,split,Normal,Bacterial,Viral"]
    (folder / "images").mkdir(parents=True)
    for number in range(40):
        split, kind = ("train", "val", "test")[number % 3], np.eye(3, dtype=int)[number // 3 % 3]
        lines.append(f"images/{number}.jpg,p{number // 3}-{split},{split},{','.join(map(str, kind))}")
        if split != "test":
            Image.linear_gradient("L").resize((16, 16)).save(folder / "images" / f"{number}.jpg")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    of_script = commands(tmp_path / "DATA", tmp_path / "results")
    cli([*of_script["prepare"], "--workers", "1"])
    index = read_index(tmp_path / "data" / "pneumonia-select")
    assert len(index) == 27 and not any(patient.endswith("test") for patient in index.patients)
    assert set(index.splits) == {"train", "val", "test"} and index.classes == ("Normal", "Bacterial", "Viral")
    with pytest.raises(SystemExit, match="nothing to report"):
        cli([*of_script["compare"], "--report-only"])


def overview() -> str:
    """What the report says first."""
    text = (RESULTS / "study" / "report.md").read_text()
    return BEGIN + text.partition(BEGIN)[2].partition(END)[0] + END


def test_the_page_quotes_the_report() -> None:
    assert overview() in (FOLDER / "SELECTION.md").read_text()


def test_the_page_says_how_many_films_there_are_and_what_a_step_takes() -> None:
    page = " ".join((FOLDER / "SELECTION.md").read_text().split())
    records = json.loads((RESULTS / "runs" / "positions-seed0.json").read_text())["records"].values()
    (record,) = (r for r in records if (r["protocol"], r["fraction"]) == ("linear", 1.0))
    assert f"{record['train_images']:,} for training" in page and f"and {record['images']} of " in page
    networks = {path.stem: json.loads(path.read_text()) for path in (RESULTS / "seconds").glob("*.json")}
    assert len(networks) == 5
    for name, found in networks.items():
        assert f"{found['step_seconds']:.2f} s" in page, name
    runs = [read_log(RESULTS / "runs" / f"{name}-rate-0.001-seed0.csv") for name in ("positions", "positions-alpha-0")]
    with_it, without = (f"{run[-1]['effective_rank']:.1f}" for run in runs)
    assert f"effective rank of {with_it}, those without transport with {without}" in page


def test_its_means_are_those_of_the_records() -> None:
    """The intervals need the films' labels, which are not in the repository; the means do not."""
    found: dict[str, dict[int, dict[str, list[float]]]] = {}
    for path in (RESULTS / "runs").glob("*-seed*.json"):
        arm, _, seed = path.stem.rpartition("-seed")
        of_seed = found.setdefault(arm, {}).setdefault(int(seed), {})
        for record in json.loads(path.read_text())["records"].values():
            share = ", all" if record["fraction"] == 1 else f" {100 * record['fraction']:g} %"
            column = "neighbours" if record["protocol"] == "neighbours" else f"frozen{share}"
            of_seed.setdefault(column, []).append(record["macro_auc"])
    head, _, *lines = [line.strip("|").split("|") for line in overview().splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in head][1:]
    first = found["positions"]
    assert columns[:5] == ["seeds", "frozen 1 %", "frozen 10 %", "frozen, all", "neighbours"]
    arms = {row.title: row.arm for row in comparison_rows(str(FOLDER / "study.rows"))} | {"untrained": SUP1}
    for name, *cells in lines:
        arm = arms[name.strip()]
        values = dict(zip(columns, map(str.strip, cells), strict=True))
        assert values["seeds"] == str(len(found[arm]))
        for column in columns[1:5]:
            mean = np.mean([100 * np.mean(of_seed[column]) for of_seed in found[arm].values()])
            assert float(re.match(r"[\d.]+", values[column])[0]) == pytest.approx(mean, abs=0.051)  # type: ignore[index]
            both = sorted(first.keys() & found[arm].keys())
            gap = np.mean([100 * (np.mean(found[arm][s][column]) - np.mean(first[s][column])) for s in both])
            if arm != "positions":
                shown = re.search(r"\(\**([+-][\d.]+)", values[column])
                assert shown is not None and float(shown[1]) == pytest.approx(gap, abs=0.051)
