"""Ctrl-C ends a call of the C++ kernels at once, and the next call is exact."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpu_problems import needs_cpu
from interrupted_calls import CALLS

import otloss

pytestmark = [needs_cpu, pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")]

ROOT = Path(__file__).resolve().parent.parent
MOST_SECONDS = 2.0  # on a busy machine; on an idle one it is 0.1


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_ends_at_once_and_goes_on(threads: int, record_property: Callable[[str, object], None]) -> None:
    command = [sys.executable, str(ROOT / "tests" / "interrupted_calls.py"), str(threads)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    took = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        try:
            for name in CALLS:
                assert child.stdout.readline() == f"begins {name}\n"
                time.sleep(0.5)
                sent = time.monotonic()
                child.send_signal(signal.SIGINT)
                said = child.stdout.readline().strip()
                took[name] = float(said) - sent if said[:1].isdigit() else said
                if name != "waiting for the pool":
                    assert child.stdout.readline() == "exact\n", name
        finally:
            child.kill()
    record_property(f"seconds from SIGINT to KeyboardInterrupt, {threads} threads", took)
    late = {name: seconds for name, seconds in took.items() if not isinstance(seconds, float) or seconds > MOST_SECONDS}
    assert not late


@pytest.mark.parametrize("threads", [1, 2])
def test_a_handler_may_call_kernels_while_a_call_runs(threads: int) -> None:
    """A handler that does not raise runs within the call. Neither it nor the call sees anything of the other."""
    cost, other = torch.rand(4, 400, 400), torch.rand(3, 90, 100)
    sweeps = 1000

    def long() -> otloss.SinkhornOutput:
        return otloss.sinkhorn(cost, eps=0.01, tol=0.0, max_iter=sweeps)

    def short() -> otloss.SinkhornOutput:
        return otloss.sinkhorn(other, eps=0.01, tol=0.0, max_iter=300)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    within = []

    def handle(*_: object) -> None:
        within.append(short())

    handler = signal.signal(signal.SIGALRM, handle)
    try:
        took = 0.0
        while took < 0.5:  # seconds: several times the interval of the signals, on any processor
            sweeps, begun = 2 * sweeps, time.perf_counter()
            want = long()
            took = time.perf_counter() - begun
        want_within = short()
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        got = long()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        torch.set_num_threads(before)
    assert within
    for ours, theirs in ((got, want), *((w, want_within) for w in within)):
        assert torch.equal(ours.f, theirs.f) and torch.equal(ours.g, theirs.g)
        assert torch.equal(ours.transport_cost, theirs.transport_cost)
