"""The C++ kernels in company: threads, batches, callers and forks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from cpu_problems import DTYPES, ODD_SIZES, everything, features, needs_cpu, unsteady

from otloss.backends import cpu
from otloss.backends.protocol import Problem, Upstream

pytestmark = needs_cpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m", "d"), ODD_SIZES)
def test_bit_for_bit_whatever_the_batch_and_the_threads(n: int, m: int, d: int, dtype: torch.dtype) -> None:
    assert unsteady(n, m, d, dtype) == []


@needs_cpu
def test_a_large_problem_is_split_the_same_way_by_any_threads() -> None:
    """Alone it is spread over the threads, in a batch it stays on one: the same bits."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, y, a, b = normal(2, 1030, 5), normal(2, 1100, 5), normal(2, 1030).softmax(-1), normal(2, 1100).softmax(-1)

    def run(count: int, threads: int) -> tuple[torch.Tensor, ...]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            problem = Problem(x[:count], y[:count], a[:count], b[:count], 0.05)
            solved, fast = cpu.solve(problem, 10, 0.0), cpu.solve(problem, 20, 1e-9, None, True)
            upstream = Upstream(torch.ones(count))
            gradients, residual = cpu.implicit_gradient(problem, solved.f, solved.g, upstream, True, True)
            return (*solved[:6], *fast[:6], *gradients, residual)
        finally:
            torch.set_num_threads(before)

    alone = run(2, 1)
    for count, threads in ((2, 2), (2, 5), (1, 1), (1, 3)):
        for got, want in zip(run(count, threads), alone, strict=True):
            assert torch.equal(got, want[:count])


def test_called_from_several_threads() -> None:
    problem = features(70, 90, torch.float32, batch=12, d=20)
    want, results = everything(*problem), []
    workers = [threading.Thread(target=lambda: results.append(everything(*problem))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(results) == 4
    assert all(torch.equal(p, q) for result in results for p, q in zip(result, want, strict=True))


FORKED = """
import os, torch
from otloss.backends import cpu
from otloss.backends.protocol import Problem
torch.set_num_threads(2)
x, a = torch.randn(16, 90, 20), torch.full((16, 90), 1 / 90)
problem = Problem(x, x, a, a, 0.1)
want = cpu.solve(problem, 30, 0.0)
child = os.fork()
if child == 0:
    got = cpu.solve(problem, 30, 0.0)
    os._exit(0 if all(map(torch.equal, got[:6], want[:6])) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
cpu.solve(problem, 30, 0.0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_works_in_a_forked_child() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60)
