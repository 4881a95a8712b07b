"""The plain build compiles for arm64: every C++ file passes a cross compiler's check, where one is installed."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc").glob("*.cpp"))
COMPILER = "aarch64-linux-gnu-g++"

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"{COMPILER} is not installed (Debian: g++-aarch64-linux-gnu)"
)


def flags() -> list[str]:
    """Those that setup.py builds with."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "extra_compile_args":
            found: list[str] = ast.literal_eval(node.value)
            return found
    raise AssertionError("setup.py has no extra_compile_args")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_for_arm64(source: Path) -> None:
    includes = []
    if source.name == "module.cpp":  # the headers of this machine's Python: they are the same for every processor
        pybind11 = pytest.importorskip("pybind11", reason="its headers are needed")
        includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    command = [COMPILER, "-std=c++17", "-fsyntax-only", *flags(), *includes, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
