"""``python tests/triton_versions.py 3.4.0 3.6.0``: the tests of the GPU kernels under other versions of Triton.

Each version is installed into a folder of its own, where ``benchmarks.gpu_static`` finds it too, and so is the NumPy
that the interpreters before Triton 3.8 need. This Python's own packages stay as they are. ``tests/test_triton.py`` then
runs with these folders first on the path: the kernels in the interpreter, and their compilation. Other arguments go to
pytest, such as ``-k interpreter``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMPY = "2.2.6"
SAID = "import numpy, triton; print('Triton', triton.__version__, 'NumPy', numpy.__version__, flush=True)"


def install(name: str, version: str, folder: Path) -> Path:
    """Where this version lies, by itself; installed if it is not there yet."""
    home = folder / f"{name}-{version}"
    if not (home / name).is_dir():
        command = ("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(home), f"{name}=={version}")
        subprocess.run([sys.executable, *command], check=True)
    return home


def run(version: str, folder: Path, arguments: list[str]) -> int:
    """The exit status of pytest under a version."""
    homes = [install("triton", version, folder)]
    if tuple(map(int, version.split(".")[:2])) < (3, 8):
        homes.append(install("numpy", NUMPY, folder))
    path = os.pathsep.join(map(str, (*homes, ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "OTLOSS_TRITON_FOLDER": str(folder)}
    subprocess.run([sys.executable, "-c", SAID], env=environment, cwd=ROOT, check=True)
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_triton.py", *arguments]
    return subprocess.run(pytest, env=environment, cwd=ROOT, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("versions", nargs="+", help="such as 3.4.0")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where they are installed")
    options, arguments = parser.parse_known_args()
    failed = [version for version in options.versions if run(version, options.folder.resolve(), arguments)]
    print(f"{len(options.versions)} versions of Triton, failures under: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
