"""What one call costs beside its kernels: modules that the first imports, and PyTorch's small operations in each."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import otloss
from otloss import operators
from otloss.backends.protocol import COLD, Given, Problem
from otloss.gradients import Incoming, State
from otloss.operators import Asked, Options

FIRST_CALL = """
import sys, torch, otloss
before = set(sys.modules)
cost, x = torch.rand(4, 8, 8, requires_grad=True), torch.rand(4, 8, 3, requires_grad=True)
masses = {"log_a": torch.randn(4, 8, requires_grad=True).log_softmax(-1), "b": torch.full((8,), 1 / 8)}
loss = otloss.sinkhorn(cost, **masses).value.sum() + otloss.cosine_sinkhorn(x, x).transport_cost.sum()
loss.backward()
print(*sorted(set(sys.modules) - before))
"""


def test_the_first_call_imports_no_compiler() -> None:
    """It takes a second to import, and hundreds of modules."""
    run = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, check=True)
    imported = run.stdout.split()
    assert not {"torch._dynamo", "torch._inductor", "sympy"} & set(imported)
    assert len(imported) <= 10, imported


class Count(TorchDispatchMode):
    """Notes the operators that are dispatched, but none that an operator dispatches inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def dispatched(run: Any) -> list[str]:
    with Count() as count:
        run()
    return count.names


def test_a_call_dispatches_two_operators_and_little_else(kernel_backend: str) -> None:
    cost, log_a, log_b = torch.rand(4, 8, 8), *torch.randn(2, 4, 8).log_softmax(-1)
    leaves, weights = [t.requires_grad_() for t in (cost, log_a, log_b)], torch.ones(4)

    def step(**masses: Tensor) -> None:
        out = otloss.sinkhorn(cost, **masses, backend=kernel_backend)
        torch.autograd.grad(out.transport_cost, leaves[: 1 + len(masses)], weights)

    for run, expected in (
        (lambda: step(log_a=log_a, log_b=log_b), []),
        (lambda: step(), ["aten.new_full.default"] * 2),  # the uniform masses
    ):
        names = [name for name in dispatched(run) if name != "aten.detach.default"]  # how autograd saves an output
        assert names == [*expected, "otloss.solve.default", "otloss.gradient.default"]


def test_a_profiler_sees_both_operators(kernel_backend: str) -> None:
    """Without one, and without a mode, their bodies are called past PyTorch's dispatcher."""
    cost = torch.rand(4, 8, 8, requires_grad=True)
    with torch.autograd.profiler.profile() as profile:
        torch.autograd.grad(otloss.sinkhorn(cost, backend=kernel_backend).value.sum(), cost)
    assert {"otloss::solve", "otloss::gradient"} <= {event.name for event in profile.function_events}


@pytest.mark.parametrize("form", ["uniform", "masses", "logs"])
def test_the_operators_only_make_room_for_the_kernels(kernel_backend: str, form: str) -> None:
    a = torch.full((4, 8), 1 / 8)
    problem = Problem(torch.rand(4, 8, 8), None, a.log() if form == "logs" else a, a, 0.05)
    given, options = Given(form, "uniform", 1e-4), Options(1000, 1e-5, True, True, "implicit", kernel_backend)
    solved: list[Tensor] = []
    names = dispatched(lambda: solved.extend(operators.run_solve(problem, given, options, COLD)))
    assert {name.split(".")[1] for name in names} <= {"new_empty", "empty_like"}, names
    assert len(names) == len(operators.OUTPUTS)
    incoming = Incoming(torch.ones(4), None, None, None, None, None)
    parts = problem, State(*solved[3:]), incoming, Asked(True), given, options
    names = dispatched(lambda: operators.run_gradient(*parts))
    assert {name.split(".")[1] for name in names} <= {"new_empty", "empty_like", "max", "_local_scalar_dense"}, names
    assert len(names) == (6 if form == "uniform" else 7), names
