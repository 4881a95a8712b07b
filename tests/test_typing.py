"""Types as a user's type checker sees them: those of the installed package, which says that it has some."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

GOOD = '''
import torch
from torch import Tensor

import otloss


class Match(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_eps = torch.nn.Parameter(torch.zeros(()))
        self.loss = otloss.FeatureSinkhornLoss("sqeuclidean", objective="value", partial=0.5)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out = otloss.cosine_sinkhorn(x, y, mask_x=mask, eps=self.log_eps.exp())
        warm = otloss.sinkhorn(otloss.cosine_cost(x, y), init=(out.f.detach(), out.g.detach()), rho_a=1.0)
        per_problem, inner = self.loss.per_problem(x, y)
        if not bool(warm.converged.all()):
            print(inner.summary().marginal_error + 1.0, otloss.assign(warm, mutual=True).shape)
        return out.transport_cost + per_problem, otloss.barycentric(warm, y)


sets = [torch.rand(3, 2), torch.rand(4, 2)]
reveal_type(otloss.feature_sinkhorn(sets, sets).plan)
reveal_type(otloss.OPTiMLLoss(8).forward(*[torch.rand(2, 8, 2, 2)] * 2, *[torch.rand(2, 4)] * 2).loss)
with otloss.use_backend("reference"):
    print({name: bool(status) for name, status in otloss.backends().items()})
'''

BAD = '''
import torch

import otloss

otloss.sinkhorn([[0.0, 1.0]])
otloss.sinkhorn(torch.rand(3, 3), epsilon=0.1)
otloss.SinkhornLoss(rho="much")
otloss.sinkhorn(torch.rand(3, 3), partial="half").value.no_such_method()
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that an installation has, but for the compiled one."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("installed")
    made = folder / "made"
    made.mkdir()
    build = ("egg_info", "--egg-base", str(made), "build_py", "--build-lib", str(folder))
    environment = {**os.environ, "OTLOSS_NO_EXT": "1"}
    subprocess.run([sys.executable, "setup.py", "-q", *build], cwd=ROOT, env=environment, check=True)
    return folder


def test_the_marker_is_installed(installed: Path) -> None:
    assert (installed / "otloss" / "py.typed").is_file() and (installed / "otloss" / "__init__.py").is_file()


@pytest.mark.slow
def test_a_users_script_is_checked(installed: Path, tmp_path: Path) -> None:
    """A good one passes ``mypy --strict``; in a bad one every mistake is found."""
    pytest.importorskip("mypy")
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(BAD)
    checker = (sys.executable, "-m", "mypy", "--strict", "--no-pretty", "--no-error-summary", "good.py", "bad.py")
    # Folders on PYTHONPATH count as installed ones, where mypy takes types from packages with the marker alone.
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(checker, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    notes = [line for line in lines if line.startswith("good.py")]
    assert [line.partition("Revealed type is ")[2] for line in notes] == ['"torch._tensor.Tensor"'] * 2, notes
    mistakes = [line for line in lines if line.startswith("bad.py") and ": error: " in line]
    found = [(int(line.split(":")[1]), re.findall(r"\[([a-z-]+)\]$", line)[0]) for line in mistakes]
    wanted = [(6, "arg-type"), (7, "call-arg"), (8, "call-arg"), (9, "arg-type"), (9, "attr-defined")]
    assert sorted(found) == wanted, done.stdout
