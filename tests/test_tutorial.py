"""The tutorial ``docs/optiml.md``: its commands run as they stand, one after another, and end with a report."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("segmentation_models_pytorch", reason="the example needs otloss[examples]")
pytest.importorskip("captum", reason="the example needs otloss[examples]")

from examples.optiml.__main__ import cli

PAGE = (Path(__file__).parent.parent / "docs" / "optiml.md").read_text()
COMMAND = "python -m examples.optiml "


def commands() -> list[list[str]]:
    """The arguments of every command of the page, in order."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    assert all(line.startswith(COMMAND) for line in lines)
    return [shlex.split(line.removeprefix(COMMAND)) for line in lines]


@pytest.mark.slow
def test_every_stage_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stages = [arguments[0] for arguments in commands()]
    assert stages == ["prepare", "pretrain", *["evaluate"] * 3, "heatmap", "segment", "report"]
    for arguments in commands():
        cli(arguments)
    run = tmp_path / "runs/tutorial/optiml"
    assert {"metrics.csv", "MODEL_CARD.md", "backbone.pth"} <= {path.name for path in run.iterdir()}
    first, *_ = (run / "metrics.csv").read_text().splitlines()
    assert {"perplexity", "transport_cost", "independent_cost"} <= set(first.split(","))
    text = (tmp_path / "runs/tutorial/report/report.md").read_text()
    assert "AUC" in text and "Dice" in text
