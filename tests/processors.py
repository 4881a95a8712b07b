"""``python tests/processors.py``: the tests that compute, as they run on older and newer processors than this one.

PyTorch, oneDNN, MKL and the kernels of the cpu backend choose their code by the processor. Environment variables make
each of them take the code for an older one, so that one machine stands for several. A cell of the matrix is one run of
pytest, in one process, under these settings:

* ``ATEN_CPU_CAPABILITY``: ``default``, ``avx2`` and ``avx512``, as far as the machine has them, with
  ``ONEDNN_MAX_CPU_ISA`` and ``MKL_ENABLE_INSTRUCTIONS`` to match; and ``any``, which sets none of the three;
* threads of PyTorch and of the kernels: each of these with one and with two;
* ``OTLOSS_CPU_LEVEL``: every level that the machine has, once with one thread and once with two. With one thread the
  level is the one that fits PyTorch's code, with two it is another one. ``any`` leaves the choice to the kernels.

Not covered are the other pairs of levels; code for AMX, BF16 and other extensions beyond ``avx512``, except that
``any`` takes what the machine has; and the tests of ``LEFT_OUT`` and of the example. On two idle cores the matrix takes
about 15 minutes. Each cell's whole output is kept in ``build/processors``.

Arguments that are not of this script go to pytest: ``python tests/processors.py --only avx2 -k cvsim``.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "processors"
#: By ``ATEN_CPU_CAPABILITY``: the values of ``ONEDNN_MAX_CPU_ISA`` and ``MKL_ENABLE_INSTRUCTIONS``, and the level of
#: the cpu backend for the same processors.
PROCESSORS = {
    "default": ("SSE41", "SSE4_2", "baseline"),
    "avx2": ("AVX2", "AVX2", "v3"),
    "avx512": ("AVX512_CORE", "AVX512", "v4"),
}
SETTINGS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "OTLOSS_CPU_LEVEL")
LEFT_OUT = {
    "test_arm64.py": "compiles only",
    "test_benchmarks.py": "tests what times the others",
    "test_gpu_stages.py": "tests what runs on a GPU",
    "test_installs.py": "tests the build and pages",
    "test_cpu_levels.py": "runs every level by itself, whatever the settings",
    "test_pages.py": "reads pages",
    "test_triton.py": "its interpreter takes minutes and computes with NumPy",
}
PROBE = """
import torch
from otloss.backends import cpu
print(torch.backends.cpu.get_cpu_capability().lower(), cpu.level() if cpu.status() is None else "")
"""


@dataclass(frozen=True)
class Cell:
    """The settings of one run; the level is empty where the kernels choose it."""

    capability: str
    threads: int
    level: str

    @property
    def name(self) -> str:
        return f"{self.capability}-{self.threads}" + (f"-{self.level}" if self.level else "")

    def environment(self) -> dict[str, str]:
        values = PROCESSORS.get(self.capability, ("", ""))
        chosen = (self.capability if self.capability in PROCESSORS else "", *values[:2], self.level)
        return {
            **{name: value for name, value in os.environ.items() if name not in SETTINGS},
            **{name: value for name, value in zip(SETTINGS, chosen, strict=True) if value},
            "OMP_NUM_THREADS": str(self.threads),
            "OTLOSS_TEST_THREADS": str(self.threads),
            # PyTorch's compiler would take what it has kept for other settings.
            "TORCHINDUCTOR_CACHE_DIR": str(OUT / f"inductor-{self.capability}"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }

    def took_effect(self, output: str) -> bool:
        """Whether the line that conftest.py prints at the head of a run says what was asked for."""
        wanted = self.capability.upper() if self.capability in PROCESSORS else r"\w+"
        return bool(re.search(rf"processor: PyTorch {wanted}, threads {self.threads}, kernels {self.level}", output))


@dataclass(frozen=True)
class Result:
    """What one run found."""

    cell: Cell
    counts: dict[str, int]
    failures: list[str]
    seconds: float

    def line(self) -> str:
        cell = self.cell
        counts = "".join(f"{self.counts.get(kind, 0):>9}" for kind in ("passed", "failed", "skipped"))
        return f"{cell.capability:10}{cell.threads:>8}  {cell.level or 'any':9}{counts}{self.seconds:>9.0f}"


HEAD = f"{'PyTorch':10}{'threads':>8}  {'kernels':9}{'passed':>9}{'failed':>9}{'skipped':>9}{'seconds':>9}"


def probe(cell: Cell) -> tuple[str, str]:
    """PyTorch's capability and the kernels' level under a cell's settings; no level where the machine lacks it."""
    command = [sys.executable, "-W", "ignore", "-c", PROBE]
    done = subprocess.run(command, env=cell.environment(), cwd=ROOT, capture_output=True, text=True, check=True)
    capability, _, level = done.stdout.strip().partition(" ")
    return capability, level


def cells() -> list[Cell]:
    """A set that covers what this machine has; see the docstring of the module."""
    capabilities = [name for name in PROCESSORS if probe(Cell(name, 1, ""))[0] == name]
    levels = [level for *_, level in PROCESSORS.values() if probe(Cell("any", 1, level))[1] == level]
    chosen = []
    for threads in (1, 2):
        for k in range(max(len(capabilities), len(levels))):
            level = levels[(k + 1 - threads) % len(levels)] if levels else ""
            chosen.append(Cell(capabilities[k % len(capabilities)] if capabilities else "any", threads, level))
        chosen.append(Cell("any", threads, ""))
    return chosen


def tests() -> list[str]:
    """The tests of otloss that compute, and the examples of its docstrings."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    core = [path for path in files if path.name not in LEFT_OUT and "examples.optiml" not in path.read_text()]
    return [*(str(path.relative_to(ROOT)) for path in core), "otloss"]


def run(cell: Cell, arguments: list[str]) -> Result:
    """One run of pytest under a cell's settings."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfE", *tests(), *arguments]
    log, start = OUT / f"{cell.name}.log", time.monotonic()
    with log.open("w") as file:
        done = subprocess.run(command, env=cell.environment(), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    seconds, output = time.monotonic() - start, log.read_text(errors="replace")
    counts: dict[str, int] = {}
    for count, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", output.rstrip().rpartition("\n")[2]):
        kind = "failed" if kind == "error" else kind
        counts[kind] = counts.get(kind, 0) + int(count)
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    if not cell.took_effect(output):
        failures.append("the settings took no effect")
    if done.returncode != 0 and not failures:
        failures.append(f"pytest ended with code {done.returncode}")
    return Result(cell, counts, [f"{cell.name}: {failure} ({log.relative_to(ROOT)})" for failure in failures], seconds)


def results(chosen: list[Cell], arguments: list[str]) -> Iterator[Result]:
    """Cells of as many threads run beside each other as there are cores for them."""
    for threads in (1, 2):
        beside = max(1, (os.cpu_count() or 1) // threads)
        with ThreadPoolExecutor(beside) as pool:
            yield from pool.map(lambda cell: run(cell, arguments), [cell for cell in chosen if cell.threads == threads])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="cells whose name holds this, such as avx2 or 2-v3")
    options, arguments = parser.parse_known_args()
    OUT.mkdir(parents=True, exist_ok=True)
    chosen = [cell for cell in cells() if options.only in cell.name]
    print("cells:", ", ".join(cell.name for cell in chosen), f"\n{HEAD}", flush=True)
    found = []
    for result in results(chosen, arguments):
        found.append(result)
        print(result.line(), flush=True)
    failures = [failure for result in found for failure in result.failures]
    print("", HEAD, *(result.line() for result in found), "", *failures, sep="\n")
    print(f"{len(found)} cells, {len(failures)} failures")
    return 1 if failures or not found else 0


if __name__ == "__main__":
    sys.exit(main())
