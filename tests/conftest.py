"""Shared problems, backends and data. Each test that takes ``backend`` runs on every backend that is usable here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

import otloss
from otloss.backends import cpu, reference
from otloss.backends.protocol import Problem, Solution

# The tensors are small: more threads mostly wait for each other. Tests of threads set a number of their own, and
# processors.py asks for another one.
torch.set_num_threads(int(os.environ.get("OTLOSS_TEST_THREADS", "1")))


def pytest_report_header() -> str:
    """The code that PyTorch and the cpu backend have chosen here; processors.py reads it."""
    capability, level = torch.backends.cpu.get_cpu_capability(), cpu.level() or "none"
    return f"processor: PyTorch {capability}, threads {torch.get_num_threads()}, kernels {level}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that none of them begins when the other processes have nothing left to do."""
    items.sort(key=lambda item: "slow" not in item.keywords)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Figures that tests recorded; a worker process has no terminal of its own to print them on."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, figures in report.user_properties:
            terminalreporter.write_line(f"{name}: {figures}")


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    status = otloss.backends()[request.param]
    if not status:
        pytest.skip(f"backend {request.param}: {status}")
    return request.param


@pytest.fixture
def kernel_backend() -> str:
    """The backend that is compared with the reference."""
    status = otloss.backends()["cpu"]
    if not status:
        pytest.skip(f"backend cpu: {status}")
    return "cpu"


def _set_regime(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    from triton_problems import REGIMES

    from otloss.backends.triton import config

    monkeypatch.setattr(config, "LIMITS", REGIMES[name])
    if name == "streamed":
        monkeypatch.setattr(config, "STORED_BYTES", 0)
    return name


@pytest.fixture(params=["small", "medium", "large", "streamed"])
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The Triton kernels of each size in turn, whatever the size; under "streamed" no cost of features is stored."""
    return _set_regime(request.param, monkeypatch)


@pytest.fixture(params=["small", "medium", "large"])
def dense_regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The regimes of a dense cost, which is never made anew."""
    return _set_regime(request.param, monkeypatch)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _phantoms(folder: Path, train: int, test: int, size: int) -> Path:
    from examples.optiml.data.nih_writer import PhantomConfig, write_phantoms

    return write_phantoms(PhantomConfig(folder, train, test, size))


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 + 40 films of 48 px in NIH's layout, to read only."""
    return _phantoms(tmp_path_factory.mktemp("data") / "phantoms", 60, 40, 48)


@pytest.fixture(scope="session")
def few_phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 + 10 films of 40 px, to read only."""
    return _phantoms(tmp_path_factory.mktemp("data") / "phantoms", 32, 10, 40)


def random_problem(
    *batch: int, n: int, m: int, dtype: torch.dtype = torch.float64, sharp: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """A random cost in [0, 1] and non-uniform marginals; ``sharp`` scales the logits of the marginals."""
    cost = torch.rand(*batch, n, m, dtype=torch.float64)
    a = (sharp * torch.randn(*batch, n, dtype=torch.float64)).softmax(-1)
    b = (sharp * torch.randn(*batch, m, dtype=torch.float64)).softmax(-1)
    return cost.to(dtype), a.to(dtype), b.to(dtype)


def leave_out_last(side: str, cost: Tensor, a: Tensor, b: Tensor, costs: Tensor) -> tuple[slice, slice, slice]:
    """Takes the mass of the last row or column of every problem, gives it these costs, and says what is still live."""
    mass, line = (a, cost) if side == "rows" else (b, cost.mT)
    mass[:, -1] = 0
    mass /= mass.sum(-1, keepdim=True)
    line[:, -1] = costs
    rows, columns = (slice(-1 if side == name else None) for name in ("rows", "columns"))
    return slice(None), rows, columns


def reference_solution(problem: Problem, max_iter: int, tol: float) -> Solution:
    """The reference's solution by plain iterations, with the potentials of the cost as it was given."""
    solution = reference.solve(problem, max_iter, tol)
    f, g = reference.unshifted(solution, problem.a, problem.b)
    return solution._replace(f=f, g=g, shift=None)


def relative(x: Tensor, y: Tensor) -> float:
    """Largest difference, relative to the largest entry of ``y``."""
    return float((x.double() - y.double()).abs().max() / y.double().abs().max().clamp_min(1e-300))
