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
from pathlib import Path
from typing import Any

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


def count(arguments: list[str]) -> int:
    """Run tests under both; processes that they start count too."""
    command = [sys.executable, "-m", "coverage", "run", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    code = run(command, OTLOSS_CPU_LEVEL=LEVEL, OMP_NUM_THREADS="1")
    run([sys.executable, "-m", "coverage", "combine", "--quiet"])
    run([sys.executable, "-m", "coverage", "json", "--quiet", "-o", "python.json"])
    return code


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
            cpu=machine["cpu"], commit=machine["commit"], date=machine["date"][:10], tests=found["tests"],
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
        code = count(arguments or tests())
        files = {**of_python(), **of_kernels()}
        for key, chosen in PARTS.items():
            print(f"{key}: {share(files[name] for name in files if chosen(name))}")
        if arguments:
            for name, (_, missing) in sorted(files.items()):
                print(f"{name}: {ranges(missing)}")
            return code
        results.save(OUT, {"environment": machine, "files": files, "tests": "passed" if code == 0 else "failed"})
    PAGE.write_text(page(results.load(OUT)))
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
