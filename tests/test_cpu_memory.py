"""The C++ kernels where memory ends: what cannot be allocated is an error with its size, and the next call is exact."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cpu_problems import needs_cpu

from otloss.backends import cpu
from otloss.backends.protocol import Given, Problem, Upstream

pytestmark = needs_cpu

LIMITED = """
import resource, sys, torch
from otloss.backends import cpu
from otloss.backends.protocol import Problem, Upstream

def problem(count, n):
    x, a = torch.rand(count, n, 2, generator=torch.Generator().manual_seed(0)), torch.full((count, n), 1 / n)
    return Problem(x, x + 1, a, a, 0.1)

def solve(given):
    return cpu.solve(given, 20, 0.0)

def leave(room):
    resource.setrlimit(resource.RLIMIT_AS, 2 * (int(open("/proc/self/statm").read().split()[0]) * 4096 + room,))
"""

REFUSED = (
    LIMITED
    + """
torch.set_num_threads(2)
small, tiny = problem(4, 600), problem(40, 30)
want = solve(small), solve(tiny)
leave(1 << 28)
for count in (1, 2, 5):  # spread over the threads, one for each, more than threads
    large = problem(count, 20_000)
    upstream, steps = Upstream(torch.ones(count)), torch.full((count,), 10)
    for call in (
        lambda: solve(large),
        lambda: cpu.implicit_gradient(large, large.a, large.b, upstream, True, True),
        lambda: cpu.unrolled_gradient(large, steps, upstream, True, 10),
    ):
        try:
            call()
        except MemoryError as error:
            message = str(error)
        else:
            raise AssertionError("3.2 GB in 0.3 GB")
        assert "a problem of 20000 x 20000 points with 2 features each in float32" in message, message
        size = int(message.split("cannot allocate ")[1].split(" bytes of scratch")[0])
        assert 2 * 4 * 20_000**2 <= size < 3 * 4 * 20_000**2, message
        for given, before in zip((small, tiny), want):
            assert all(map(torch.equal, solve(given)[:6], before[:6]))
"""
)

NO_THREADS = (
    LIMITED
    + """
given = problem(8, 300)
torch.set_num_threads(1)
want = solve(given)
leave(1 << 28)  # less than the stack of one more thread
torch.set_num_threads(4)
for _ in range(2):
    assert all(map(torch.equal, solve(given)[:6], want[:6]))
assert len(__import__("os").listdir("/proc/self/task")) == 1
"""
)


def _run(script: str, stack: int | None = None) -> None:
    import resource

    def limit() -> None:
        if stack is not None:
            resource.setrlimit(resource.RLIMIT_STACK, (stack, stack))

    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=environment, preexec_fn=limit)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_what_cannot_be_allocated_is_an_error_with_its_size() -> None:
    _run(REFUSED)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_without_room_for_threads_the_caller_works_alone() -> None:
    _run(NO_THREADS, stack=1 << 30)


@pytest.mark.parametrize("shape", [(1 << 30, 2, 0), (2, 1 << 31, 0), (1 << 30, 3, 4), (3, 1 << 30, 4), (2, 3, 1 << 31)])
def test_too_many_points_are_refused_before_anything_is_allocated(shape: tuple[int, int, int]) -> None:
    n, m, d = shape
    one = torch.ones(1)
    left, right = (one.expand(1, n, d), one.expand(1, m, d)) if d else (one.expand(1, n, m), None)
    a, b = one.expand(1, n), one.expand(1, m)
    problem, by_cost = Problem(left, right, a, b, 0.1), Upstream(torch.ones(1))
    for call in (
        lambda: cpu.normalise(problem, Given("masses", "masses", 1e-4), True),
        lambda: cpu.implicit_gradient(problem, a, b, by_cost, True, False),
        lambda: cpu.unrolled_gradient(problem, torch.ones(1, dtype=torch.int64), by_cost, False, 1),
    ):
        with pytest.raises(ValueError, match=r"less than 2\^30 points"):
            call()


@pytest.mark.parametrize("most", [2**63 - 1, 2**62])
def test_any_number_of_iterations_may_be_allowed(most: int) -> None:
    cost, a = torch.rand(2, 5, 5), torch.full((2, 5), 0.2)
    got, want = (cpu.solve(Problem(cost, None, a, a, 0.1), count, 1e-4) for count in (most, 1000))
    assert all(map(torch.equal, got[:6], want[:6]))
