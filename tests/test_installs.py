"""What goes into a release: one version everywhere, a page that its results file makes, and which compiler builds."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
from installed import GOOD, largest_error
from installs import OUT, PAGE, page
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

import otloss

ROOT = Path(__file__).parent.parent


def test_the_pages_name_the_version_of_the_package() -> None:
    version = re.escape(otloss.__version__)
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.match(rf"{version}\b", headings[0])


def test_the_page_is_what_the_results_say() -> None:
    assert PAGE.read_text() == page(json.loads(OUT.read_text()))


def test_an_installed_otloss_is_judged_by_its_error(backend: str) -> None:
    with otloss.use_backend(backend):
        assert largest_error() < GOOD


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds an extension as setup.py does under a compiler of some type, and returns both; nothing is compiled."""
    kept: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: kept.update(arguments))
    monkeypatch.setattr(build_ext, "build_extension", lambda self, ext: None)
    runpy.run_path(str(ROOT / "setup.py"))
    (extension,) = kept["ext_modules"]

    def run(kind: str) -> tuple[Any, Any]:
        command = kept["cmdclass"]["build_ext"](setuptools.Distribution())

        def initialize(plat_name: str | None) -> None:
            command.compiler.initialized = True

        command.compiler = SimpleNamespace(compiler_type=kind, initialized=False, cc="cl.exe", initialize=initialize)
        command.build_extension(extension)
        return command.compiler, extension

    return run


def test_windows_takes_clang(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/llvm/{name}.exe")
    compiler, extension = build("msvc")
    assert compiler.cc == "/llvm/clang-cl.exe" and compiler.initialized
    assert "/clang:-ffp-contract=fast" in extension.extra_compile_args and not extension.extra_link_args
    assert not [flag for flag in extension.extra_compile_args if flag.startswith("-")]


def test_microsofts_compiler_alone_is_refused_in_one_sentence(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(CompileError, match="need clang-cl"):
        build("msvc")


def test_other_compilers_are_left_alone(build: Any) -> None:
    compiler, extension = build("unix")
    assert compiler.cc == "cl.exe" and "-O3" in extension.extra_compile_args and extension.optional
