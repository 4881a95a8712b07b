"""``python tests/installs.py``: whether otloss builds, installs and works, in every way that this machine allows.

The rows of ``benchmarks/results/installs.md`` come in groups, which ``--only build newest`` picks. What other groups
found earlier stays. A row that cannot run here says why. ``tests/installed.py`` decides whether an otloss works.

* ``build``: source distribution and wheel by ``python -m build``, and what is in them; which Linux the wheel fits, by
  auditwheel; which wheels cibuildwheel would build.
* ``newest``: the wheel beside the newest PyTorch, with and without Triton; the time of the import; built from source by
  GCC, by Clang and without a compiler.
* ``cpu``: beside a PyTorch without CUDA's libraries, from pip's folder ``find-links``.
* ``oldest``: ``tests/oldest_pytorch.py``, which takes some ten minutes.
* ``pythons``: built from source and tried under every other Python that is there.
* ``arm64``: cross-compiled and tried in qemu, with the Python and PyTorch of ``--arm64 FOLDER``: Debian's packages of
  ``python3`` for arm64, unpacked there, and in FOLDER/site what ``pip install --no-deps --only-binary :all: --platform
  manylinux_2_28_aarch64`` installs of torch, numpy and what torch needs.
* ``others``: compiled for macOS and Windows by the Clang of the package ziglang; nothing is run.

An environment takes some 6 GB under ``--folder``; it is deleted when its rows are done.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environments import INSTALLED, Environment, NotHere, program, run
from processors import ROOT
from test_arm64 import flags

sys.path.insert(0, str(ROOT))
from benchmarks import results
from benchmarks.machine import environment

OUT, PAGE = results.FOLDER / "installs.json", results.FOLDER / "installs.md"
MOST_BYTES, MOST_MS = 3e6, 150
PYTHONS = (10, 11, 12, 13, 14)
CROSS, EMULATORS = "aarch64-linux-gnu-g++", ("qemu-aarch64", "qemu-aarch64-static")
#: Systems that the kernels are only compiled for, by zig's names.
OTHERS = {"macOS, arm64": "aarch64-macos", "Windows, x86-64": "x86_64-windows-gnu"}
PROSE = """\
# Installing otloss

Written by `python tests/installs.py` on {where}; commits {runs}.

*works*: otloss was installed there and computed, and nothing warned but what is quoted. Values and gradients of one
problem were off by the error beside it. *not here*: nothing was run, for the reason beside it.

| what | how | result | figure or reason |
|---|---|---|---|
{table}

## Which wheels there are

The extension holds pybind11, which binds it to one version of Python. It links nothing of PyTorch's: the package gives
it addresses. There is one wheel for each Python and platform, and it serves PyTorch 2.6 and every later one.

`.github/workflows/wheels.yml` builds and tries them where PyTorch has wheels too: Linux (x86-64 and arm64, glibc 2.28),
macOS (arm64) and Windows (x86-64), Python 3.10 to 3.14. That workflow has not run yet.

GCC 12, Clang 12 and newer compile the extension. Microsoft's compiler cannot, as it lacks the vector types: on Windows
setup.py takes clang-cl from the path, and the kernels use SSE2 alone. Where no compiler serves, the build says so once
and goes on without the extension; so does the first import.
"""


def figure(said: dict[str, Any]) -> str:
    """One cell of the table."""
    kernels = f" {said['level']}" if said["backend"] == "cpu" else ""
    return f"PyTorch {said['torch']}, backend {said['backend']}{kernels}, error {said['error']:.0e}"


def quiet(said: dict[str, Any]) -> dict[str, Any]:
    """The same, if nothing warned."""
    assert not said["warnings"], said["warnings"]
    return said


@dataclass
class Work:
    """A run of some groups: where it works, and the distributions that it tries."""

    folder: Path
    arm64: Path
    group: str = ""
    where: dict[str, Any] = field(default_factory=environment)

    def __post_init__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.tools = Environment(self.folder / "tools")
        self.tools.install("build", "auditwheel", "cibuildwheel")
        run([self.tools.python, "-m", "build", "--outdir", str(self.folder / "dist"), str(ROOT)], self.folder)
        (self.sdist,), (self.wheel,) = ((self.folder / "dist").glob(kind) for kind in ("*.tar.gz", "*.whl"))

    def row(self, name: str, ran: str, check: Callable[[], str], good: str = "works") -> None:
        """Run a check, which returns a figure, and keep what it found; ``good`` is the word where nothing failed."""
        try:
            result, found = good, check()
        except NotHere as reason:
            result, found = "not here", str(reason)
        except subprocess.CalledProcessError as error:
            last = (error.stderr or error.stdout or "").strip().splitlines()[-1:] or [""]
            result, found = "**fails**", f"{Path(error.cmd[0]).name} ended with {error.returncode}: {last[0]}"
            print(error.stdout, error.stderr, sep="\n")
        except AssertionError as error:
            result, found = "**fails**", str(error)
        entry = {"group": self.group, "ran": ran, "result": result, "figure": found}
        results.put(OUT, "rows", name, entry | {key: self.where[key] for key in ("commit", "date")})
        print(f"{name}: {result}: {found}", flush=True)


def in_source(work: Work) -> str:
    with tarfile.open(work.sdist) as file:
        names = {member.name.partition("/")[2] for member in file if member.isfile()}
    tracked = set(run(["git", "ls-files"], ROOT).splitlines())
    made = {name for name in names - tracked if not re.match(r"PKG-INFO|setup\.cfg|otloss\.egg-info/", name)}
    needed = {name for name in tracked if re.match(r"csrc/|otloss/|LICENSE|pyproject\.toml|setup\.py", name)}
    assert not made, f"holds what git does not: {sorted(made)}"
    assert needed <= names, f"lacks {sorted(needed - names)}"
    size = f"{work.sdist.stat().st_size / 1e6:.1f} MB, {len(names)} files"
    return f"{size}, each from git or made by setuptools; {sum(name.endswith('.hpp') for name in names)} headers"


def in_wheel(work: Work) -> str:
    names, size = zipfile.ZipFile(work.wheel).namelist(), work.wheel.stat().st_size
    assert all(name.startswith("otloss") for name in names), names
    assert {"otloss/py.typed", *(f"otloss/{path.name}" for path in (ROOT / "otloss").glob("*.py"))} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names), "no licence"
    assert sum(name.startswith("otloss/_C.") for name in names) == 1, "no extension"
    assert size < MOST_BYTES, f"{size / 1e6:.2f} MB"
    return f"{work.wheel.name}, {size / 1e6:.2f} MB (at most {MOST_BYTES / 1e6:.0f})"


def links(work: Work) -> str:
    """Which libraries the extension is linked against: neither PyTorch's nor Python's."""
    readelf = program("readelf", package="binutils")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(work.wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.startswith("otloss/_C."))
        found = re.findall(r"NEEDED.*\[(.+)\]", run([readelf, "-d", wheel.extract(name, folder)], work.folder))
    assert found and not [name for name in found if re.search("torch|c10|python", name)], found
    return ", ".join(found)


def audited(work: Work) -> str:
    said = " ".join(run([work.tools.python, "-m", "auditwheel", "show", str(work.wheel)], work.folder).split())
    found = re.search(r'following platform tag: "(\w+)"', said)
    assert found, said
    return f"{found[1]}, as built with this machine's glibc and GCC"


def planned(work: Work) -> str:
    """How many wheels cibuildwheel would build. The wheels themselves need its containers and machines."""
    counts = []
    for system, processors in (("linux", "x86_64,aarch64"), ("macos", "arm64"), ("windows", "AMD64")):
        command = [work.tools.python, "-m", "cibuildwheel", "--print-build-identifiers", "--platform", system]
        names = run([*command, "--archs", processors, str(ROOT)], work.folder).split()
        assert names, system
        counts.append(f"{len(names)} for {system} ({processors.replace(',', ', ')})")
    return f"{', '.join(counts)}; no wheel built"


def build(work: Work) -> None:
    work.row("source distribution", "`python -m build`", lambda: in_source(work), "is whole")
    work.row("wheel", "`python -m build`", lambda: in_wheel(work), "is whole")
    work.row("libraries of the extension", "`readelf -d`", lambda: links(work), "neither PyTorch nor Python")
    work.row("Linux that the wheel fits", "`auditwheel show`", lambda: audited(work), "shown")
    work.row("wheels of a release", "`cibuildwheel --print-build-identifiers`", lambda: planned(work), "is read")


def newest(work: Work) -> None:
    home = Environment(work.folder / "newest")

    def fresh() -> str:
        home.install(str(work.wheel))
        return figure(quiet(home.said()))

    def imported() -> str:
        said = [home.said() for _ in range(5)]
        cpu, wall = (statistics.median(one[key] for one in said) for key in ("import_cpu_ms", "import_ms"))
        assert cpu <= MOST_MS, f"{cpu:.0f} ms"
        return f"{cpu:.0f} ms of the processor after `import torch` (at most {MOST_MS}), {wall:.0f} ms by the clock"

    def without_triton() -> str:
        said = quiet(home.said("--without", "triton"))
        assert said["triton"], "Triton was there"
        return figure(said)

    def by(name: str, of_c: str) -> str:
        compiler = program(name, package=name)
        home.replace(home.build(work.sdist, CC=program(of_c, package=of_c), CXX=compiler))
        version = run([compiler, "--version"], work.folder).partition("\n")[0]
        return f"{version}; {figure(quiet(home.said()))}"

    def no_compiler() -> str:
        home.replace(home.build(work.sdist, CC="/bin/false", CXX="/bin/false"))
        said = home.said("--backend", "reference")
        assert len(said["warnings"]) == 1, said["warnings"]
        return f"{figure(said)}; one warning: “{said['warnings'][0]}”"

    work.row("newest PyTorch that pip takes", "wheel in a fresh environment", fresh)
    work.row("import", "`import otloss`, the median of 5", imported)
    work.row("no Triton", "`import triton` fails", without_triton)
    work.row("from source, GCC", "source distribution, `CXX=g++`", lambda: by("g++", "gcc"))
    work.row("from source, Clang", "source distribution, `CXX=clang++`", lambda: by("clang++", "clang"))
    work.row("from source, no compiler", "source distribution, `CXX=/bin/false`", no_compiler)
    shutil.rmtree(home.folder)


def cpu(work: Work) -> None:
    def beside() -> str:
        said = run([sys.executable, "-m", "pip", "config", "list"], work.folder)
        folders = [folder for found in re.findall(r"find-links='(.*)'", said) for folder in found.split()]
        tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
        found = [str(path) for folder in folders for path in Path(folder).glob(f"torch-*+cpu-{tag}-*.whl")]
        if not found:
            raise NotHere(f"no torch-*+cpu-{tag}-*.whl in pip's find-links")
        home.install(found[-1], str(work.wheel))
        return figure(quiet(home.said()))

    home = Environment(work.folder / "cpu")
    work.row("PyTorch for CPUs alone", "wheel in a fresh environment", beside)
    shutil.rmtree(home.folder)


def oldest(work: Work) -> None:
    def passes() -> str:
        folder = work.folder / "oldest"
        command = [sys.executable, str(ROOT / "tests" / "oldest_pytorch.py"), "--folder", str(folder), "-q"]
        try:
            said = run(command, ROOT)
        except subprocess.CalledProcessError as error:
            print(error.stdout)
            raise AssertionError((error.stdout.strip() or error.stderr.strip()).splitlines()[-1]) from error
        shutil.rmtree(folder)
        return f"{re.findall(r'PyTorch ([^ ]+)', said)[0]}: {said.strip().splitlines()[-1].strip('= ')}"

    work.row("PyTorch 2.6", "`tests/oldest_pytorch.py`: the tests that compute", passes)


def interpreter(minor: int) -> str:
    """A Python 3.minor that runs: on the path, or one of pyenv's."""
    own = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3.{minor}"))
    for place in filter(None, [shutil.which(f"python3.{minor}"), *map(str, own)]):
        if subprocess.run([place, "-c", "import venv, ensurepip"], capture_output=True, check=False).returncode == 0:
            return place
    raise NotHere(f"no Python 3.{minor} on this machine")


def pythons(work: Work) -> None:
    for minor in PYTHONS:

        def works(minor: int = minor) -> str:
            home = Environment(work.folder / f"python-3.{minor}", interpreter(minor))
            home.install(home.build(work.sdist))
            said = quiet(home.said())
            shutil.rmtree(home.folder)
            return f"{said['python']}, {figure(said)}"

        if minor != sys.version_info[1]:
            work.row(f"Python 3.{minor}", "built from source, newest PyTorch", works)


def arm64(work: Work) -> None:
    made: list[Path] = []

    def cross() -> str:
        compiler = program(CROSS, package="g++-aarch64-linux-gnu")
        minor = sys.version_info[1]
        wheel = work.tools.build(
            work.sdist,
            CC=compiler.replace("g++", "gcc"),
            CXX=compiler,
            _PYTHON_HOST_PLATFORM="linux-aarch64",
            SETUPTOOLS_EXT_SUFFIX=f".cpython-3{minor}-aarch64-linux-gnu.so",
        )
        made.append(Path(wheel))
        assert any(name.startswith("otloss/_C.") for name in zipfile.ZipFile(wheel).namelist()), "no extension"
        return f"{Path(wheel).name}, {Path(wheel).stat().st_size / 1e6:.2f} MB"

    def emulated() -> str:
        emulator = program(*EMULATORS, package="qemu-user")
        python = work.arm64 / "usr" / "bin" / f"python3.{sys.version_info[1]}"
        if not made or not python.exists():
            raise NotHere("no wheel for arm64" if not made else f"no {python}: see --arm64")
        site = work.folder / "site-arm64"
        shutil.unpack_archive(made[0], site, "zip")
        command = [emulator, "-L", str(work.arm64), str(python), str(INSTALLED)]
        said = quiet(json.loads(run(command, work.folder, PYTHONPATH=f"{site}:{work.arm64 / 'site'}").splitlines()[-1]))
        assert said["machine"] == "aarch64" and said["file"].startswith(str(site)), said
        return f"Python {said['python']}, {figure(said)}"

    work.row("arm64, wheel", f"source distribution, `CXX={CROSS}`", cross, "compiles")
    work.row("arm64, in qemu", "that wheel", emulated)


def others(work: Work) -> None:
    def compiles(target: str) -> str:
        work.tools.install("ziglang")
        zig = [work.tools.python, "-m", "ziglang", "c++"]
        # module.cpp also needs the headers of that system's Python, which are not here.
        sources = sorted(path for path in (ROOT / "csrc").glob("*.cpp") if path.name != "module.cpp")
        for source in sources:
            command = [*zig, "-target", target, "-std=c++17", *flags(), "-c", str(source), "-o", "object.o"]
            run(command, work.folder)
        version = re.search(r"clang version (\S+)", run([*zig, "--version"], work.folder))
        return f"{len(sources)} files, all but module.cpp, by Clang {version[1] if version else ''}; not run"

    for name, target in OTHERS.items():
        work.row(name, f"`zig c++ -target {target}`", lambda target=target: compiles(target), "compiles")


GROUPS: dict[str, Callable[[Work], None]] = {
    group.__name__: group for group in (build, newest, cpu, oldest, pythons, arm64, others)
}


def page(found: dict[str, Any]) -> str:
    """The Markdown of installs.json."""
    rows = sorted(found["rows"].items(), key=lambda item: list(GROUPS).index(item[1]["group"]))
    runs = ", ".join(sorted({f"{row['commit']} ({row['date'][:10]})" for _, row in rows}))
    table = [f"| {name} | {row['ran']} | {row['result']} | {row['figure']} |" for name, row in rows]
    return PROSE.format(where=found["where"], runs=runs, table="\n".join(table))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of rows")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "otloss-installs")
    parser.add_argument("--arm64", type=Path, default=Path(tempfile.gettempdir()) / "arm64")
    options = parser.parse_args()
    work = Work(options.folder.resolve(), options.arm64.resolve())
    for group in options.only:
        work.group = group
        GROUPS[group](work)
    shutil.rmtree(work.folder)
    found = results.load(OUT)
    found["where"] = f"{platform.platform()}, {work.where['cpu']}, {work.where['cores']} cores"
    results.save(OUT, found)
    PAGE.write_text(page(found))
    failed = [name for name, row in found["rows"].items() if "fails" in row["result"]]
    print(f"{len(found['rows'])} rows, failures: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
