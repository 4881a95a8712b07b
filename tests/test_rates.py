"""The comparison of COMPARISON.md: how rates are chosen, and that no test film has a part in it."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("segmentation_models_pytorch", reason="the example needs otloss[examples]")
pytest.importorskip("captum", reason="the example needs otloss[examples]")

from PIL import Image

from examples.optiml.__main__ import cli
from examples.optiml.data.index import read_index
from examples.optiml.downstream.arms import SUP2
from examples.optiml.pretraining.methods import METHODS
from examples.optiml.reporting.overview import BEGIN, END
from examples.optiml.reporting.rates import by_method, chosen
from examples.optiml.reporting.row_files import comparison_rows

FOLDER = Path(__file__).parents[1] / "examples" / "optiml"
RATES, METHODS_ROWS, RESULTS = FOLDER / "rates.rows", FOLDER / "methods.rows", FOLDER / "results"
ROWS = """# Two methods.
new-0.1   --method vicreg --optim.lr 0.1
new-0.2   --method vicreg --optim.lr 0.2
old-0.01  --method simclr --optim.lr 0.01
old-0.02  --method simclr --optim.lr 0.02
old-0.04  --method simclr --optim.lr 0.04
"""


def record(protocol: str, fraction: float, auc: float) -> dict[str, object]:
    return {"protocol": protocol, "fraction": fraction, "macro_auc": auc}


def write(runs: Path, name: str, few: tuple[float, ...], every: float, near: float | None) -> None:
    """The records of a row: AUCs with 10 % of the labels, with all, and of the neighbours."""
    kept = [record("linear", 0.01, 0.99), *(record("linear", 0.1, x) for x in few), record("linear", 1.0, every)]
    kept += [record("neighbours", 1.0, near)] if near else []
    runs.mkdir(exist_ok=True)
    (runs / f"{name}.json").write_text(json.dumps({"records": dict(enumerate(kept))}))


def test_the_best_rate_is_taken(tmp_path: Path) -> None:
    """By the mean of three AUCs, each over its subsets of labels and seeds."""
    rows, runs = tmp_path / "some.rows", tmp_path / "runs"
    rows.write_text(ROWS)
    write(runs, "new-0.1-seed0", (0.6, 0.8), 0.8, 0.7)
    write(runs, "new-0.2-seed0", (0.7,), 0.8, 0.7)
    write(runs, "new-0.2-seed1", (0.9,), 0.8, 0.7)
    write(runs, "old-0.01-seed0", (0.9,), 0.9, 0.9)
    write(runs, "old-0.02-seed0", (0.5,), 0.5, 0.5)
    lines = list(chosen(rows, runs))
    assert "# new: 0.1 (73.3), 0.2 (76.7)." in lines and "new-0.2   --method vicreg --optim.lr 0.2" in lines
    assert "# old: not all rates have been tried; the middle one." in lines
    assert "old-0.02  --method simclr --optim.lr 0.02" in lines
    write(runs, "old-0.04-seed0", (0.5,), 0.5, None)  # the neighbours are missing
    assert "old-0.02  --method simclr --optim.lr 0.02" in chosen(rows, runs)
    write(runs, "old-0.04-seed0", (0.5,), 0.5, 0.95)
    assert "old-0.01  --method simclr --optim.lr 0.01" in chosen(rows, runs)


def test_a_row_without_a_rate_in_its_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "some.rows").write_text("simclr --optim.lr 0.1\n")
    with pytest.raises(ValueError, match="METHOD-RATE, not simclr"):
        by_method(tmp_path / "some.rows")


def test_every_method_has_three_rates_and_a_row() -> None:
    methods = by_method(RATES)
    assert METHODS.keys() | {"optiml-printed"} == methods.keys()
    rates = {name: [line.rpartition("-")[2] for line, _ in rows] for name, rows in methods.items()}
    assert set(map(tuple, rates.values())) == {("0.0002", "0.0005", "0.0015")}
    for row in comparison_rows(str(RATES))[1:]:
        assert row.overrides["optim.lr"] == float(row.arm.rpartition("-")[2]) and row.method in row.arm
    assert METHODS_ROWS.read_text() == "\n".join(chosen(RATES, RESULTS / "rates" / "runs")) + "\n"
    assert [row.arm for row in comparison_rows(str(METHODS_ROWS))][-1] == SUP2


def commands(what: str, folder: Path) -> list[list[str]]:
    """What the script runs, with DATA in this folder, as its shell sees it."""
    echo = folder / "echo.py"
    echo.write_text("import shlex, sys; print(shlex.join(sys.argv[1:]), file=sys.stderr)")
    (folder / "python").write_text(f'#!/bin/sh\nexec python3 {echo} "$@"\n')
    (folder / "python").chmod(0o755)
    (folder / "examples").mkdir()
    (folder / "examples" / "optiml").mkdir()
    done = subprocess.run(
        ["bash", FOLDER / "methods.sh", what, "DATA"], cwd=folder, capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(folder / "python")},
    )  # fmt: skip
    return [shlex.split(line)[2:] for line in done.stderr.splitlines()]


@pytest.mark.parametrize("what", ["rates", "table"])
def test_rates_are_chosen_without_the_test_films(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not exist here. The table wants them."""
    folder, lines = tmp_path / "DATA" / "cxr-pneumonia", ["image,patient_id,split,Normal,Bacterial,Viral"]
    (folder / "images").mkdir(parents=True)
    for number in range(40):
        split, kind = ("train", "val", "test")[number % 3], np.eye(3, dtype=int)[number // 3 % 3]
        lines.append(f"images/{number}.jpg,p{number // 3}-{split},{split},{','.join(map(str, kind))}")
        if split != "test" or what == "table":
            Image.linear_gradient("L").resize((16, 16)).save(folder / "images" / f"{number}.jpg")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    prepare, compare, *rest = commands(what, tmp_path)
    assert len(rest) == (what == "rates")
    monkeypatch.chdir(tmp_path)
    cli([*prepare, "--workers", "1"])
    index = read_index(tmp_path / "data" / ("pneumonia-select" if what == "rates" else "pneumonia"))
    if what == "rates":
        assert len(index) == 27 and not any(patient.endswith("test") for patient in index.patients)
    else:
        assert len(index) == 40 and all(p.endswith(s) for p, s in zip(index.patients, index.splits, strict=True))
    rows = compare.index("--rows") + 1
    compare[rows] = str(FOLDER.parents[1] / compare[rows])
    with pytest.raises(SystemExit, match="nothing to report"):
        cli([*compare, "--report-only"])


def test_the_page_quotes_the_report() -> None:
    page = (FOLDER / "COMPARISON.md").read_text()
    report = RESULTS / "methods" / "methods" / "report.md"
    if not report.exists():
        assert "The table has not been made yet." in page
        return
    assert BEGIN + report.read_text().partition(BEGIN)[2].partition(END)[0] + END in page
