"""``python tests/oldest_pytorch.py``: otloss beside the oldest PyTorch that it takes.

A wheel is built from this tree and installed into an environment of its own (``--folder``; some 6 GB), beside that
PyTorch and what the tests import. The tests that compute, those of the example left out, run in a folder from which
this tree's otloss cannot be imported. The environment is kept. Other arguments go to pytest.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from processors import ROOT, tests

NEEDED = ("numpy", "pytest", "hypothesis", "pot", "geomloss", "scipy", "matplotlib")
SAID = (
    "import torch, otloss; print('PyTorch', torch.__version__, otloss.__file__)\n"
    "for name, status in otloss.backends().items(): print(f'  {name}: {status}')"
)


def oldest() -> str:
    """The release that pyproject.toml names."""
    found = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    return f"torch=={found[1]}.*"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "oldest-pytorch")
    options, arguments = parser.parse_known_args()
    home, work = options.folder.resolve() / "venv", options.folder.resolve() / "work"
    python = str(home / "bin" / "python")
    if not Path(python).exists():
        venv.create(home, with_pip=True)
    install = (python, "-m", "pip", "install", "--quiet")
    subprocess.run([*install, oldest(), *NEEDED], check=True)
    with tempfile.TemporaryDirectory() as wheels:
        build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", wheels)
        subprocess.run([*build, str(ROOT)], check=True)
        subprocess.run([*install, "--no-deps", "--force-reinstall", *map(str, Path(wheels).glob("*.whl"))], check=True)
    shutil.rmtree(work, ignore_errors=True)
    for name in ("tests", "benchmarks", "examples", "csrc"):
        shutil.copytree(ROOT / name, work / name)
    shutil.copy(ROOT / "pyproject.toml", work)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-c", SAID], env=environment, cwd=work, check=True)
    files = [name for name in tests() if name.startswith("tests")]
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", *files, *arguments]
    return subprocess.run(pytest, env=environment, cwd=work, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
