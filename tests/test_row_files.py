"""Comparisons whose rows stand in a file: what a line means, and a study that is made in slices."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("segmentation_models_pytorch", reason="the example needs otloss[examples]")
pytest.importorskip("captum", reason="the example needs otloss[examples]")

from rich.console import Console
from xray_runs import QUIET

from examples.optiml.__main__ import cli
from examples.optiml.commands.compare import compare
from examples.optiml.commands.settings import CompareConfig
from examples.optiml.commands.sizes import SizeFlags
from examples.optiml.pretraining.settings import PretrainConfig
from examples.optiml.pretraining.trainer import pretrain
from examples.optiml.reporting.comparison_rows import rows
from examples.optiml.reporting.overview import BEGIN, END
from examples.optiml.reporting.row_files import comparison_rows, read_rows, reference

STUDY = Path(__file__).parents[1] / "examples" / "optiml" / "study.rows"
SIZES = SizeFlags(
    image_size=32, stem="no-pool", epochs=1, batch_size=16, precision="32-true", fractions=(1.0,), large_seeds=(0,),
    heatmap_fractions=(), draws=20, finetune_fractions=(), neighbours=True,
)  # fmt: skip


def written(folder: Path, *lines: str) -> Path:
    path = folder / "study.rows"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_line_is_a_name_and_flags(tmp_path: Path) -> None:
    path = written(
        tmp_path, "# a study", "", "base --optiml.match position --optiml.dense 64  # projected", "optiml", "sup2",
        "positions-0.2 --optiml.match position --optiml.eps 0.2 --optim.lr 5e-4 --preset paper",
        "vicreg-half --method vicreg --vicreg.invariance 12.5", "optiml-eps-0.2 --optiml.eps 0.2",
        "plain --optiml.alpha 0.6", "nearer base --title 'Rather near' --optiml.eps 0.1",
        "nearest nearer --optiml.eps 0.01",
    )  # fmt: skip
    found = {row.arm: row for row in read_rows(path)}
    assert list(found) == [
        "sup1", "base", "optiml", "sup2", "positions-0.2", "vicreg-half", "optiml-eps-0.2", "plain", "nearer",
        "nearest",
    ]  # fmt: skip
    assert found["base"].overrides == {"options.optiml.match": "position", "options.optiml.dense": 64}
    assert found["positions-0.2"].overrides == {
        "preset": "paper", "options.optiml.match": "position", "options.optiml.eps": 0.2, "optim.lr": 5e-4,
    }  # fmt: skip
    vicreg = found["vicreg-half"]
    assert vicreg.method == "vicreg" and vicreg.overrides == {"options.vicreg.invariance": 12.5}
    assert found["plain"].overrides == {}  # the usual value, said aloud
    assert found["nearer"].overrides == {**found["base"].overrides, "options.optiml.eps": 0.1}
    assert found["nearest"].overrides == {**found["base"].overrides, "options.optiml.eps": 0.01}
    assert (found["nearer"].title, found["nearest"].title) == ("Rather near", "nearest")  # a title is a row's own
    assert found["nearest"].flags[-2:] == ("--optiml.eps", "0.01") and "--title" not in found["nearest"].flags
    built_in = {row.arm: row for row in rows("ablation")}
    assert all(found[name] == built_in[name] for name in ("optiml", "optiml-eps-0.2"))  # under their titles
    assert found["sup2"].method is None and found["base"].title == "base"
    assert (reference(str(path)), reference("methods")) == ("base", "optiml")
    run = found["positions-0.2"].apply(PretrainConfig(Path(), Path()))
    assert (run.options.optiml.match, run.options.optiml.marginals, run.optim.lr) == ("position", "learned", 5e-4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --optiml.match positions", r"line 2: pretrain does not take --optiml.match positions \(.*positions"),
        ("a --optiml.nothing 3", "line 2: pretrain does not take --optiml.nothing 3"),
        ("a --optim.lr -1", "line 2: --optim.lr -1.0: a number from 0 up"),
        ("a --epochs 3", "line 2: --epochs is the same for all rows; give it to compare"),
        ("a --stem small", "line 2: --stem is the same for all rows"),
        ("A/b --optiml.eps 1", "line 2: a row is named in small letters"),
        ("first --optiml.eps 1", "line 2: there are two rows 'first'"),
        ("sup1", "line 2: there are two rows 'sup1'"),
        ("optiml --optiml.eps 1", "line 2: 'optiml' is a row of another comparison, with other settings"),
        ("vicreg", "line 2: 'vicreg' is a row of another comparison, with other settings"),
        ('a --optiml.match "position', "line 2: No closing quotation"),
        ("a --title --optiml.eps 1", "line 2: --title lacks its value"),
        ("a --optiml.eps 1 --title", "line 2: --title lacks its value"),
        ("a --title first --optiml.eps 1", "line 2: there are two rows under the title 'first'"),
        ("optiml --title mine", "line 2: 'optiml' is a row of another comparison, with a title of its own"),
        ("a second --optiml.eps 1", "line 2: there is no row 'second' above"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = written(tmp_path, "first --optiml.eps 0.1", line)
    with pytest.raises(ValueError, match=rf"study\.rows, {message}") as caught:
        CompareConfig(tmp_path, rows=str(path))
    assert "\n" not in str(caught.value)


def test_no_file_and_an_empty_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="rows must be methods, ablation or a file of rows, not nowhere"):
        CompareConfig(tmp_path, rows="nowhere")
    with pytest.raises(ValueError, match="has no row"):
        CompareConfig(tmp_path, rows=str(written(tmp_path, "# nothing")))
    with pytest.raises(SystemExit):
        cli(["compare", "--data", str(tmp_path), "--rows", "nowhere"])
    assert "rows must be methods, ablation or a file" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_file_that_comes_along(tmp_path: Path) -> None:
    found = [row for row in comparison_rows(str(STUDY)) if row.method]
    assert {"positions", "vicreg-variance-50"} < {row.arm for row in found} and len(found) > 10
    runs = [row.apply(PretrainConfig(tmp_path, tmp_path, row.method or "")) for row in found]
    assert len({run.key() for run in runs}) == len(found)  # no two rows are one
    varied = {path.rpartition(".")[2] for row in found for path in row.overrides}
    assert varied >= {"match", "dense", "stage", "objective", "marginals", "alpha", "eps", "invariance"}


def test_its_transport_is_worth_what_is_left_when_all_else_is_alike(tmp_path: Path) -> None:
    """The first question's rows: α alone differs, and VICReg's variance weighs as much, as its code halves the sum."""
    named = {row.arm: row for row in comparison_rows(str(STUDY)) if row.method}
    first, without, vicreg = (
        named[arm].apply(PretrainConfig(tmp_path, tmp_path, named[arm].method or ""))
        for arm in ("positions", "positions-alpha-0", "vicreg-variance-50")
    )
    options = first.options.optiml
    assert (options.match, options.stage, options.marginals) == ("position", 3, "uniform") and options.alpha > 0
    assert without.options.optiml == dataclasses.replace(options, alpha=0.0)
    other = vicreg.options.vicreg
    assert (other.variance / 2, other.covariance, other.invariance) == (options.beta, options.eta, options.invariance)
    assert dataclasses.replace(without, options=first.options) == first
    assert dataclasses.replace(vicreg, options=first.options, method="optiml") == first


def test_a_study_in_slices(few_phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = "positions --optiml.match position"
    path = written(tmp_path, positions, positions.replace("positions", "positions-0.2") + " --optiml.eps 0.2")
    config = CompareConfig(
        few_phantoms, tmp_path / "out", tmp_path / "results", "few", rows=str(path), seeds=(0,), size_flags=SIZES
    )
    made: list[str] = []

    def counted(run: PretrainConfig, console: Console) -> Path | None:
        assert (run.options.optiml.match, run.stem) == ("position", "no-pool")
        made.append(run.out.name.rpartition("-")[0])
        return pretrain(run, console)

    monkeypatch.setattr("examples.optiml.commands.comparison.pretrain", counted)
    first = compare(dataclasses.replace(config, only=("positions",)), QUIET).read_text()
    assert made == ["positions-seed0"] and "Not in this report: sup1, positions-0.2." in first
    compare(config, QUIET)
    text = compare(dataclasses.replace(config, report_only=True), QUIET).read_text()
    assert made == ["positions-seed0", "positions-0.2-seed0"]  # nothing twice
    assert "positions minus each row" in text and "− positions-0.2" in text and "− Sup.1 (random)" in text
    assert "Not in this report" not in text and f"--rows {path} --budget small --seeds 0 --image-size 32 --stem" in text
    assert "* positions: 1 epochs of optiml at 32 px, stem no-pool, batch 16, seed 0" in text
    assert (config.results / "study" / "report.md").exists()
    assert "| positions | 1 | " in text.partition(BEGIN)[2].partition(END)[0]
    for name in ("sup1", "positions", "positions-0.2"):
        kept = config.results / "runs" / f"{name}-seed0.json"
        assert kept.stat().st_size < 20_000
        assert set(json.loads(kept.read_text())["records"]) == {"few/linear-1-seed0", "few/neighbours-1-seed0"}
        assert {r["identity"]["stem"] for r in json.loads(kept.read_text())["records"].values()} == {"no-pool"}
