"""The C++ kernels in company: threads, batches, callers and forks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from cpu_problems import DTYPES, ODD_SIZES, everything, features, needs_cpu, unsteady

pytestmark = needs_cpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m", "d"), ODD_SIZES)
def test_bit_for_bit_whatever_the_batch_and_the_threads(n: int, m: int, d: int, dtype: torch.dtype) -> None:
    assert unsteady(n, m, d, dtype) == []


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
torch.set_num_threads(2)
x, a = torch.randn(16, 90, 20), torch.full((16, 90), 1 / 90)
want = cpu.solve(x, x, a, a, 0.1, 30, 0.0)
child = os.fork()
if child == 0:
    got = cpu.solve(x, x, a, a, 0.1, 30, 0.0)
    os._exit(0 if all(map(torch.equal, got, want)) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
cpu.solve(x, x, a, a, 0.1, 30, 0.0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_works_in_a_forked_child() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60)
