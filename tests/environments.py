"""Fresh environments for ``tests/installs.py``: some Python, what is installed there, and what its otloss says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from processors import ROOT

INSTALLED = ROOT / "tests" / "installed.py"


class NotHere(Exception):
    """Why a row cannot run on this machine."""


def run(command: list[str], folder: Path, **variables: str) -> str:
    """What a command prints, outside of this tree and of its paths.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env={**own, **variables}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout


def program(*names: str, package: str) -> str:
    """The first of these programs that is there."""
    for name in names:
        if found := shutil.which(name):
            return found
    raise NotHere(f"{names[0]} is not installed (Debian: {package})")


class Environment:
    """A fresh environment of some Python."""

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        run([python, "-m", "venv", str(folder)], folder.parent)
        self.folder, self.python = folder, str(folder / "bin" / "python")

    def pip(self, *arguments: str, **variables: str) -> str:
        return run([self.python, "-m", "pip", *arguments], self.folder, **variables)

    def install(self, *what: str) -> None:
        self.pip("install", "--quiet", *what)

    def build(self, source: Path, **variables: str) -> str:
        """A wheel of a source distribution, made by this Python in isolation. Nothing is taken from pip's cache."""
        wheels = self.folder / "wheels"
        shutil.rmtree(wheels, ignore_errors=True)
        self.pip("wheel", "--quiet", "--no-cache-dir", "--no-deps", "-w", str(wheels), str(source), **variables)
        (wheel,) = wheels.glob("*.whl")
        return str(wheel)

    def replace(self, wheel: str) -> None:
        self.install("--no-deps", "--force-reinstall", wheel)

    def said(self, *arguments: str) -> dict[str, Any]:
        """What tests/installed.py says here; it must be this environment's otloss that it found."""
        command = [self.python, str(INSTALLED), *arguments]
        found = json.loads(run(command, self.folder).splitlines()[-1])
        assert Path(found["file"]).is_relative_to(self.folder), found["file"]
        return dict(found)
