"""The folders of the example: imports go one way, options load quickly, and a method is one file and one line."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from examples.optiml.__main__ import COMMANDS, cli
from examples.optiml.data.index import read_index
from examples.optiml.data.prepare import READERS, reader
from examples.optiml.pretraining.log import epoch_means, log_frame

EXAMPLE = Path(__file__).parents[1] / "examples" / "optiml"
#: Rooms in the order in which data flows; what lies beside them serves all. The program's own file is above all.
ORDER = {"": 0, "data": 1, "pretraining": 2, "downstream": 3, "reporting": 4, "commands": 5, "__main__": 6}
#: What takes long to import and prints no help text.
HEAVY = {"torch", "torchvision", "pytorch_lightning", "lightly", "numpy", "pandas", "matplotlib", "PIL", "pydicom"}


def _room(module: list[str]) -> str:
    return module[0] if module and module[0] in ORDER else ""


def test_an_interrupt_is_one_line_also_before_the_command_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tyro.extras.subcommand_cli_from_dict", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli(["report"])
    assert stop.value.code == 130 and capsys.readouterr().err.startswith("Interrupted. The same command goes on")


def test_imports_go_one_way() -> None:
    backwards, seen = [], 0
    for file in sorted(EXAMPLE.rglob("*.py")):
        module = list(file.relative_to(EXAMPLE).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                seen += 1
                package = module[: len(module) - node.level]
                target = [*package, *(node.module or "").split(".")]
                if ORDER[_room(target)] > ORDER[_room(module)]:
                    backwards.append(f"{file.relative_to(EXAMPLE)} imports {'.'.join(target)}")
    assert seen > 100
    assert not backwards


def test_the_library_knows_no_example() -> None:
    for file in (EXAMPLE.parents[1] / "otloss").rglob("*.py"):
        assert "examples" not in {
            name.split(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }, file


def test_options_load_no_heavy_module() -> None:
    code = "import sys, examples.optiml.__main__; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tyro" in done.stdout.split()
    assert not HEAVY & set(done.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_module(command: str) -> None:
    _, module = COMMANDS[command]
    assert (EXAMPLE / f"{module.replace('.', '/')}.py").is_file()


TOY = """
    from dataclasses import dataclass

    import torch
    from torch import Tensor

    from examples.optiml.pretraining.methods.base import Method, StepOutput
    from examples.optiml.pretraining.settings import PretrainConfig


    class Toy(Method):
        def __init__(self, config: PretrainConfig) -> None:
            super().__init__(config)
            self.weight = config.options.toy.weight

        def step(self, first: Tensor, second: Tensor) -> StepOutput:
            a, b = (self.backbone(view)[1] for view in (first, second))
            return StepOutput(self.weight * (a - b).square().mean(), {"std_g": a.std()})
"""
RUN = """
    from dataclasses import dataclass

    from examples.optiml.pretraining.methods import METHODS, MethodEntry


    @dataclass(frozen=True)
    class ToyOptions:
        weight: float = 1.0


    METHODS["toy"] = MethodEntry("toy:Toy", ToyOptions)  # the one line; a method of the project has it in the table

    from examples.optiml.__main__ import cli

    cli()
"""


def test_a_method_is_one_file_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(textwrap.dedent(TOY))
    (tmp_path / "run.py").write_text(textwrap.dedent(RUN))

    def run(*args: str) -> str:
        here = {"PYTHONPATH": f"{EXAMPLE.parents[1]}:{tmp_path}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, str(tmp_path / "run.py"), *args], env=here, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "--toy.weight" in run("pretrain", "--help")
    run("prepare", "--dataset", "phantom", "--out", "films", "--phantom-train", "40", "--phantom-test", "8",
        "--phantom-size", "32", "--workers", "1")  # fmt: skip
    run("pretrain", "--data", "films", "--out", "run", "--method", "toy", "--toy.weight", "2", "--epochs", "1",
        "--batch-size", "16", "--image-size", "32")  # fmt: skip
    assert (tmp_path / "run" / "backbone.pth").is_file()
    assert (log_frame(tmp_path / "run" / "metrics.csv")["loss"] > 0).all()


READER = """
    from pathlib import Path

    from examples.optiml.data.prepare.listing import Film, Listing
    from examples.optiml.data.prepare.settings import PrepareConfig


    def read_toy(config: PrepareConfig) -> Listing:
        films = sorted(config.folder.glob("*.png"))
        return Listing(("Bright",), [Film(p.name, p, labels=("Bright",) * p.stem.endswith("1")) for p in films])
"""
PREPARE = """
    from examples.optiml.data.prepare import READERS

    READERS["toy"] = "toy_reader:read_toy"  # the one line; a data set of the project has it in the table

    from examples.optiml.__main__ import cli

    cli()
"""


def test_a_data_set_is_one_file_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "toy_reader.py").write_text(textwrap.dedent(READER))
    (tmp_path / "prepare.py").write_text(textwrap.dedent(PREPARE))
    (tmp_path / "films").mkdir()
    for number in range(20):
        film = Image.linear_gradient("L").resize((32, 32)).point([value * (number + 1) // 20 for value in range(256)])
        film.save(tmp_path / "films" / f"{number}-{number % 2}.png")

    def run(*args: str) -> str:
        here = {"PYTHONPATH": f"{EXAMPLE.parents[1]}:{tmp_path}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, str(tmp_path / "prepare.py"), "prepare", *args],
            env=here, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert ",toy}" in run("--help").replace("\n", "").replace(" ", "").replace("│", "")
    assert "20 images read now" in run("--dataset", "toy", "--root", "films", "--out", "prepared", "--workers", "1")
    index = read_index(tmp_path / "prepared")
    assert index.classes == ("Bright",) and index.labels.sum() == 10


@pytest.mark.parametrize("dataset", READERS)
def test_every_data_set_has_its_reader(dataset: str) -> None:
    pytest.importorskip("pydicom", reason="the example needs otloss[examples]")
    assert callable(reader(dataset))


def test_means_over_epochs_are_those_of_the_steps_that_have_a_figure(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,loss,knn\n1,1,1.0,\n1,2,3.0,5.0\n2,3,4.0,\n")
    means = epoch_means(log_frame(path))
    expected = pd.DataFrame({"epoch": [1, 2], "step": [1.5, 3.0], "loss": [2.0, 4.0], "knn": [5.0, float("nan")]})
    pd.testing.assert_frame_equal(means, expected)
    assert epoch_means(log_frame(tmp_path / "none.csv")).empty
