"""``python tests/uncovered.py``: which lines of otloss and of csrc the tests of the library do not reach.

It copies the tree to ``build/coverage``, builds the kernels there with gcov's counters at the level ``baseline``, and
runs the tests that compute (``tests/processors.py`` lists them) in one process, with coverage.py over the package. Then
it writes ``benchmarks/results/coverage.md``. The tests of the example do not count, nor do those of the GPU kernels.

Arguments go to pytest: ``python tests/uncovered.py tests/test_cpu.py`` runs these tests and prints the figures alone.
``--page`` writes the page again from what was counted. Needs coverage.py, GCC and gcov; the whole takes half an hour.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from xml.etree import ElementTree

import pybind11
from processors import ROOT, tests
from test_arm64 import flags

sys.path.insert(0, str(ROOT))
from benchmarks import results
from benchmarks.machine import environment

TREE = ROOT / "build" / "coverage"
OUT, PAGE = results.FOLDER / "coverage.json", results.FOLDER / "coverage.md"
LEVEL = "baseline"
#: Lines of a file, and those of them that were not reached.
Lines = dict[str, tuple[int, list[int]]]
#: Sums of the report.
PARTS: dict[str, Callable[[str], bool]] = {
    "package": lambda name: name.endswith(".py") and "/triton/" not in name,
    "gpu": lambda name: "/triton/" in name,
    "kernels": lambda name: name.startswith("csrc/"),
}
PROSE = """\
# Coverage

Written by `python tests/uncovered.py` on {cpu}; commit {commit}, {date}. The tests that compute, on one thread
({tests}), reach **{package}** of the lines of the package without its GPU kernels, and
**{kernels}** of the lines of the C++ kernels at the level `{level}`. A line of a template counts as reached where
one of its instances was. The tests of the example do not count here.

What is not reached:

* `otloss/backends/triton` ({gpu}): the GPU kernels and what starts them. Triton compiles them, so that coverage.py sees
  no line of a kernel run. `tests/test_triton.py` runs them in an interpreter and `tests/gpu` on a device; neither is
  part of this.
* `csrc/probe.hpp`, the end of `csrc/batch.hpp`: measure the rates of the machine for the benchmarks.
* `csrc/dispatch.cpp`: a level that the processor lacks or that does not exist. `tests/test_cpu_levels.py` asks for
  them; it sets the level itself and is left out here.
* `csrc/module.cpp`, `csrc/pool.cpp`: what a forked process runs, and waiting for another thread's call. Tests run both,
  in processes that end at once and write no counters (`tests/test_parallel.py`, `tests/test_cpu_interrupt.py`).
* `csrc/relaxed_newton.hpp`: a direction that rounding has turned uphill. No problem is known that leads there.
* `otloss/compat.py`, the end of `otloss/cvsim.py`: for PyTorch 2.6, where `tests/oldest_pytorch.py` runs the tests.
* `otloss/__init__.py`, `otloss/backends/__init__.py` and `cpu.py`: the package without its extension, which
  `tests/installs.py` tries, a backend that is off, as Triton is without a GPU, and guards behind the checks of the
  functions.
* The rest are single lines: a GPU's rarer reading of the marginals (`optiml.py`), an older form of a Function's
  derivative in forward mode that the first one refuses before (`autograd.py`), the compiler's cache at its usual
  place (`checks.py`), and helpers that only the Triton backend calls (`massless.py`, `reference.py`).
"""


def run(command: list[str], **variables: str) -> int:
    """The exit code of a command in the copied tree, whose package it takes."""
    return subprocess.run(command, cwd=TREE, env={**os.environ, "PYTHONPATH": str(TREE), **variables}).returncode


def copy_tree() -> None:
    """What git tracks or would track, and nothing that was built."""
    shutil.rmtree(TREE, ignore_errors=True)
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (TREE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, TREE / name)


def build() -> None:
    """The extension, with counters in all but the other two levels."""
    sources = sorted(path.stem for path in (TREE / "csrc").glob("*.cpp"))
    objects = {name: f"csrc/{name}.o" for name in sources}
    shared = [flag for flag in flags() if flag != "-O3"]
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]

    def compiled(name: str) -> None:
        counted = [] if name.startswith("level_") and name != f"level_{LEVEL}" else ["--coverage"]
        command = ["g++", "-std=c++17", "-O1", "-fPIC", *shared, *counted, *includes, "-c", f"csrc/{name}.cpp"]
        if run([*command, "-o", objects[name]]):
            raise SystemExit(f"csrc/{name}.cpp does not compile with counters")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compiled, sources))
    module = f"otloss/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if run(["g++", "-shared", "--coverage", "-pthread", *objects.values(), "-o", module]):
        raise SystemExit("the kernels with counters do not link")


def count(arguments: list[str]) -> str:
    """Run tests under both; processes that they start count too. Returns how they ended."""
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={TREE / 'tests.xml'}", *arguments]
    run([sys.executable, "-m", "coverage", "run", *pytest], OTLOSS_CPU_LEVEL=LEVEL, OMP_NUM_THREADS="1")
    run([sys.executable, "-m", "coverage", "combine", "--quiet"])
    run([sys.executable, "-m", "coverage", "json", "--quiet", "-o", "python.json"])
    cases = list(ElementTree.parse(TREE / "tests.xml").getroot().iter("testcase"))
    failed = [str(case.get("name")) for case in cases if {part.tag for part in case} & {"failure", "error"}]
    return f"{len(cases):,} of them, " + (f"of which fail: {', '.join(failed)}" if failed else "none of which fails")


def of_python() -> Lines:
    """What coverage.py has counted of each file."""
    found = json.loads((TREE / "python.json").read_text())["files"]
    return {
        name: (len(lines["executed_lines"]) + len(lines["missing_lines"]), lines["missing_lines"])
        for name, lines in found.items()
    }


def of_kernels() -> Lines:
    """What gcov has counted of each file; a line of a template is reached where one of its instances is."""
    counts: defaultdict[str, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))
    for notes in sorted((TREE / "csrc").glob("*.gcno")):
        command = ["gcov", "--json-format", "--stdout", str(notes)]
        said = subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=True).stdout
        for line in said.splitlines():
            for file in json.loads(line)["files"] if line else ():
                if file["file"].startswith("csrc/"):
                    for one in file["lines"]:
                        counts[file["file"]][one["line_number"]] += one["count"]
    return {
        name: (len(lines), sorted(number for number, times in lines.items() if not times))
        for name, lines in sorted(counts.items())
    }


def ranges(numbers: Iterable[int]) -> str:
    """Line numbers, those that follow each other as one: ``3, 7 to 9``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in spans)


def share(lines: Iterable[tuple[int, list[int]]]) -> str:
    """The lines that were reached, in percent, rounded down so that only all of them are 100."""
    pairs = list(lines)
    total, missed = sum(number for number, _ in pairs), sum(len(missing) for _, missing in pairs)
    return f"{int(1000 * (total - missed) / max(total, 1)) / 10} %"


def page(found: dict[str, Any]) -> str:
    """The Markdown of coverage.json."""
    machine, files = found["environment"], {name: (total, missing) for name, (total, missing) in found["files"].items()}
    lines = [
        PROSE.format(
            level=LEVEL, cpu=machine["cpu"], commit=machine["commit"], date=machine["date"][:10], tests=found["tests"],
            **{key: share(files[name] for name in files if chosen(name)) for key, chosen in PARTS.items()},
        ),
        "| file | lines | reached | lines not reached |",
        "|---|---|---|---|",
    ]  # fmt: skip
    for name, (total, missing) in sorted(files.items()):
        where = "all" if missing and len(missing) == total else ranges(missing)
        lines.append(f"| `{name}` | {total} | {share([(total, missing)])} | {where} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    arguments = sys.argv[1:]
    if arguments != ["--page"]:
        machine = environment()
        copy_tree()
        build()
        ended = count(arguments or tests())
        files = {**of_python(), **of_kernels()}
        print(ended)
        for key, chosen in PARTS.items():
            print(f"{key}: {share(files[name] for name in files if chosen(name))}")
        if arguments:
            for name, (_, missing) in sorted(files.items()):
                print(f"{name}: {ranges(missing)}")
            return 0
        results.save(OUT, {"environment": machine, "files": files, "tests": ended})
    PAGE.write_text(page(results.load(OUT)))
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
