"""The C++ kernels at every instruction level that this machine can run, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cpu_problems import needs_cpu
from test_accuracy import BOUNDS, HINT

from benchmarks import accuracy
from otloss.backends import cpu

pytestmark = needs_cpu

# A stride of 5 has no factor in common with the order of kinds and eps, so all of them take part.
AT_LEVEL = """
import json, os, torch
from benchmarks import accuracy
from cpu_problems import DTYPES, ODD_SIZES, unsteady
from otloss.backends import cpu
torch.manual_seed(0)
found = {"level": cpu.level(), "problem": cpu.status()}
if not found["problem"]:
    found["errors"] = accuracy.measure(accuracy.cases()[::5])
    sizes = [] if found["level"] == os.environ["TESTED"] else ODD_SIZES  # the level of test_cpu_threads.py
    found["unsteady"] = [line for size in sizes for dtype in DTYPES for line in unsteady(*size, dtype)]
print(json.dumps(found))
"""


def at_level(name: str, script: str) -> str:
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OTLOSS_CPU_LEVEL": name, "TESTED": cpu.level() or "", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        check=True,
    ).stdout


@pytest.mark.parametrize("name", accuracy.LEVELS)
def test_every_instruction_level(name: str) -> None:
    """As right as the bounds say, and independent of batch and threads."""
    found = json.loads(at_level(name, AT_LEVEL))
    if found["problem"] and name != "baseline":
        pytest.skip(found["problem"])
    assert found["level"] == name
    above = accuracy.exceeded(found["errors"], BOUNDS)
    assert not above, "\n".join([*above, HINT])
    assert found["unsteady"] == []


def test_an_unknown_level_is_said() -> None:
    problem = at_level("v9", "from otloss.backends import cpu; print(cpu.status())")
    assert "OTLOSS_CPU_LEVEL=v9" in problem and "baseline" in problem
