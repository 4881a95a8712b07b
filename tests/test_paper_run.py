"""PAPER-RUN.md: its commands run, at another size, and its figures are those that were counted."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pytorch_lightning", reason="the example needs otloss[examples]")
pytest.importorskip("pydicom", reason="the example needs otloss[examples]")

from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import ResNet18_Weights
from xray_runs import in_two_processes

from examples.optiml.__main__ import cli
from examples.optiml.commands.reckon import _of_a_step, at_batch, summary
from examples.optiml.commands.settings import ReckonConfig
from examples.optiml.pretraining.log import read_log
from examples.optiml.pretraining.network import Backbone
from examples.optiml.pretraining.settings import ExpanderConfig
from examples.optiml.reporting.paper import FRACTIONS, TABLE1, TABLE2

FOLDER = Path(__file__).parents[1] / "examples" / "optiml"
PAGE = (FOLDER / "PAPER-RUN.md").read_text()
#: What makes a command of the page one of seconds. A flag that is given twice counts as it is given last.
SIZES = {
    "prepare": "--workers 1",
    "pretrain": "--epochs 1 --batch-size 8 --image-size 32 --expander.dim 32 --accelerator cpu --workers 0",
    "evaluate": "--fractions 1.0 --seeds 0 --draws 20 --train.min-steps 2 --train.max-steps 2 --train.checks 1",
    "report": "",
    "reckon": "--image-size 32 --precision 32-true",
}


def commands(heading: str) -> list[list[str]]:
    """The words of each command in the code below a heading."""
    code = PAGE.partition(f"## {heading}\n")[2].partition("```bash\n")[2].partition("```")[0]
    found = [shlex.split(line) for line in code.splitlines()]
    assert found and all("examples.optiml" in words for words in found)
    return found


def tiny(words: list[str]) -> list[str]:
    """The command's name and its arguments, with other sizes."""
    name, *rest = words[words.index("examples.optiml") + 1 :]
    return [name, *rest, *SIZES[name].split()]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, since the page's commands name folders in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_for_one_gpu_and_those_after_it(few_phantoms: Path, here: Path) -> None:
    (here / "DOWNLOADED").symlink_to(few_phantoms)
    for words in [*commands("On one GPU"), *commands("After it")]:
        assert words[:3] == ["python", "-m", "examples.optiml"]
        cli(tiny(words))
    runs = [here / "runs" / name for name in ("recommended", "printed")]
    configs = [json.loads((run / "config.json").read_text()) for run in runs]
    assert [config["precision"] for config in configs] == ["bf16-mixed"] * 2
    assert [config["options"]["marginals"] for config in configs] == ["perplexity", "learned"]
    assert not any(config["all_images"] for config in configs)  # both on the same films
    for run in runs:
        assert {"perplexity", "converged", "loss"} <= read_log(run / "metrics.csv")[-1].keys()
        assert {"knn_auc", "effective_rank"} <= read_log(run / "monitor.csv")[-1].keys()
    text = (here / "report" / "report.md").read_text()
    assert "| OPTiML |" in text and "| printed |" in text and "| Sup.1 (random) |" in text


def test_the_commands_for_eight_gpus(few_phantoms: Path, here: Path) -> None:
    """In two processes on a CPU, which cannot synchronise batch norm."""
    (here / "data").mkdir()
    (here / "data" / "nih").symlink_to(few_phantoms)
    for words, alone in zip(commands("On 8 GPUs"), commands("On one GPU")[1:], strict=True):
        several = list(words)
        assert words[:6] == ["torchrun", "--standalone", "--nproc_per_node", "8", "-m", "examples.optiml"]
        rest = [words[words.index("pretrain") :], alone[alone.index("pretrain") :]]
        for command in rest:
            del command[command.index("--workers") : command.index("--workers") + 2]
        assert rest[0] == rest[1]  # the same run
        if "--preset" in words:
            continue  # both presets run in one process in another test
        run = tiny(several)
        assert "in 2 processes" in in_two_processes("-m", "examples.optiml", *run, "--norm", "group")
        assert (Path(run[run.index("--out") + 1]) / "backbone.pth").exists()


def test_the_page_quotes_what_was_counted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = json.loads((FOLDER / "results" / "paper-run.json").read_text())
    block = PAGE.partition("<!-- reckoned:begin -->\n")[2].partition("<!-- reckoned:end -->")[0]
    assert block.strip() == summary(kept)
    config = ReckonConfig(**{**kept["options"], "films": tuple(kept["options"]["films"])})
    assert config == ReckonConfig()  # the paper's run
    assert kept["counted"]["2"]["flops"] == _of_a_step(config.pretraining().resolve(), 2)["flops"]
    flops = {int(count): of["flops"] for count, of in kept["counted"].items()}
    assert kept["flops_per_step"] == at_batch(flops, 64) == pytest.approx(32 * flops[2], rel=1e-3)
    for run in kept["runs"]:
        assert run["steps"] == run["films"] // 64 * 300 and run["flops"] == run["steps"] * kept["flops_per_step"]
        hours = run["flops"] / (kept["devices"]["A100"] * kept["efficiency"]["1"]) / 3600
        assert run["hours"]["A100"]["1"] == pytest.approx(hours)
    (command,) = commands("What it should take")
    cli(tiny(command))
    small = json.loads((here / command[-1]).read_text())
    assert summary(small) in capsys.readouterr().out and small["flops_per_step"] < kept["flops_per_step"] / 20


def test_a_step_is_two_views_forward_and_backward() -> None:
    """A forward pass has as many operations as torchvision says; the backward pass has twice as many, but for the
    first convolution, whose input needs no gradient."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Backbone()(torch.zeros(1, 3, 224, 224))
    forward = counter.get_total_flops()
    assert forward == pytest.approx(2e9 * ResNet18_Weights.IMAGENET1K_V1.meta["_ops"], rel=2e-3)  # without classifier
    config = ReckonConfig(image_size=64, method="vicreg", precision="32-true").pretraining().resolve()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Backbone()(torch.zeros(1, 3, 64, 64))
    first = 2 * 64 * 32 * 32 * 3 * 49
    backbone = 2 * (3 * counter.get_total_flops() - first)
    e: ExpanderConfig = config.expander
    expander = 2 * 3 * 2 * (512 * e.dim + (e.layers - 1) * e.dim**2)
    covariance = 2 * 3 * 2 * e.dim**2  # of an embedding with itself, forward, and for each of its two sides backward
    assert _of_a_step(config, 4)["flops"] == 4 * (backbone + expander + covariance)


@pytest.mark.parametrize("method", ["optiml", "simclr"])
def test_a_larger_batch_is_foretold(method: str) -> None:
    """Also where a loss compares each film with each other one."""
    config = ReckonConfig(image_size=32, method=method, precision="32-true").pretraining().resolve()
    counted = {count: _of_a_step(config, count) for count in (2, 4, 8, 16)}
    larger = counted.pop(16)
    assert at_batch({count: of["flops"] for count, of in counted.items()}, 16) == larger["flops"]
    kept = at_batch({count: of["kept"] for count, of in counted.items()}, 16)
    assert kept == pytest.approx(larger["kept"], rel=0.02)  # small buffers come and go
    weights = {of["weights"] for of in counted.values()}
    assert len(weights) == 1 and weights.pop() > 4 * 4 * 11_176_512  # weights, gradients and AdamW's two moments


def test_the_papers_values() -> None:
    frozen, tuned = (
        ", ".join(table["optiml", "nih", f] for f in FRACTIONS[:2]) + f" and {table['optiml', 'nih', 1.0]}"
        for table in (TABLE2, TABLE1)
    )
    assert f"{frozen} frozen and {tuned} fine-tuned" in " ".join(PAGE.split())
