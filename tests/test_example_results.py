"""The committed results of ``make example`` and of the pipeline on NIH's labels, and the pages that quote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lightly", reason="the example needs otloss[examples]")

from examples.optiml.reporting.summary import seeds_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "optiml" / "results" / "example"
SEEDS = (0, 1, 2)


def results() -> list[dict[str, Any]]:
    return [json.loads((RESULTS / f"seed{seed}.json").read_text()) for seed in SEEDS]


def block(page: Path) -> str:
    """What stands between the example's markers."""
    return page.read_text().partition("<!-- example:begin -->\n")[2].partition("<!-- example:end -->")[0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["frozen AUC, 10 %", "fine-tuned AUC, 10 %"])
def test_pretraining_gains_four_points_or_more(seed: int, name: str) -> None:
    (gain,) = (gain for gain in results()[seed]["gains"] if gain["name"] == name)
    assert gain["difference"]["value"] >= 4 and gain["difference"]["low"] > 0


def test_all_seeds_were_run_alike() -> None:
    runs = [{**result["pretraining"], "seconds": 0, "films": 0} for result in results()]
    assert runs[0] == runs[1] == runs[2]
    assert [result["seed"] for result in results()] == list(SEEDS)


def test_the_last_screen_fits_a_terminal() -> None:
    for result in results():
        assert len(result["screen"]) <= 25 and max(map(len, result["screen"])) <= 80


def test_the_pages_quote_the_results() -> None:
    assert block(ROOT / "examples" / "optiml" / "README.md").strip() == seeds_table(results())
    screen = results()[0]["screen"]
    figures = screen[: screen.index("the intervals resample the test patients.") + 1]
    assert block(ROOT / "README.md").strip() == "\n".join(["```text", *figures, "```"])


def test_the_table_of_the_pipeline_has_the_means_of_the_records() -> None:
    folder = ROOT / "examples" / "optiml"
    records = json.loads((folder / "results" / "cxr-dev" / "records.json").read_text())

    def mean(arm: str, **of: str) -> str:
        mine = [r for r in records if r["arm"] == arm and r["fraction"] == 1 and of.items() <= r.items()]
        figures = [r["raw"]["macro"] if r["stage"] == "evaluate" else r["positives"] for r in mine]
        return f"{100 * np.mean([figure['value'] for figure in figures]):.1f}"

    page = (folder / "EVALUATE.md").read_text().partition("<!-- cxr-dev:begin -->")[2].partition("<!--")[0]
    _, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.split("\n")[1:-1]]
    protocols = [(data, protocol) for data in ("nih-cxr-dev", "rsna-cxr-dev") for protocol in ("linear", "finetune")]
    assert [name for name, *_ in lines] == ["untrained", "OPTiML"]
    for arm, (_, *cells) in zip(("sup1", "optiml"), lines, strict=True):
        evaluated = [mean(arm, dataset=data, protocol=protocol) for data, protocol in protocols]
        assert cells == [*evaluated, mean(arm, stage="segment", label="Lung")]
