"""``python -m benchmarks.gpu_static``: compile every default configuration of the GPU kernels, without a GPU.

``gpu_compile`` does the work, in a process of its own for each version of Triton. ``installed`` is the one beside this
Python. Others are taken from ``--folder``, where ``pip install --no-deps --target FOLDER/triton-3.4.0 triton==3.4.0``
has put them. The table in ``benchmarks/results/gpu_static.md`` has one column for each version. A cell gives the
registers of a thread and how many programs fit a multiprocessor at once, the worst over architectures and shapes.
Registers that are spilled to memory are named there, and make the run fail.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, STATIC

ROOT = Path(__file__).parent.parent
Reports = list[dict[str, Any]]


def home(version: str, folder: Path) -> Path | None:
    """Where a version was installed by itself; None for the installed one.

    Raises:
        SystemExit: it is not there.
    """
    if version == "installed":
        return None
    path = folder / f"triton-{version}"
    if not (path / "triton").is_dir():
        raise SystemExit(f"{path} is missing: pip install --no-deps --target {path} triton=={version}")
    return path


def compile_with(version: str, folder: Path, archs: list[int], sample: bool = False) -> Reports:
    """Reports of one version.

    Raises:
        SystemExit: a kernel does not compile; what the compiler said is printed.
    """
    parts = [home(version, folder), ROOT, os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(str(part) for part in parts if part)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_compile", *(["--sample"] if sample else [])]
    run = subprocess.run(
        [*command, "--arch", *map(str, archs)],
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    reports = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode:
        raise SystemExit(f"Triton {version} fails after {len(reports)} compilations:\n{run.stderr[-3000:]}")
    if version not in ("installed", *(report["triton"] for report in reports)):
        raise SystemExit(f"asked for Triton {version}, got {reports[0]['triton']}")
    return reports


def _cell(reports: Reports) -> str:
    """The worst of a configuration in one version."""
    if not reports:
        return ""
    registers, programs = max(r["registers"] for r in reports), min(r["programs"] for r in reports)
    spilled = max(r["spilled"] for r in reports)
    return f"{registers}, {programs}" + (f", **{spilled} bytes spilled**" if spilled else "")


def table(reports: Reports) -> str:
    """One line for each kernel and tile, one column for each version."""
    versions = sorted({r["triton"] for r in reports}, key=lambda v: [int(x) for x in v.split(".")[:2]])
    lines = [f"| kernel | tile | warps | {' | '.join(versions)} |", "|---" * (3 + len(versions)) + "|"]
    found: dict[tuple[str, str, int], dict[str, Reports]] = {}
    for r in reports:
        key = (r["kernel"], r["tile"], r["warps"])
        found.setdefault(key, {}).setdefault(r["triton"], []).append(r)
    for key, by_version in sorted(found.items()):
        cells = [*map(str, key), *(_cell(by_version.get(version, [])) for version in versions)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(reports: Reports) -> str:
    """How many compilations there were, by version, and how many of them spill."""
    lines = []
    for version in dict.fromkeys(r["triton"] for r in reports):
        own = [r for r in reports if r["triton"] == version]
        archs = ", ".join(f"sm_{arch}" for arch in sorted({r["arch"] for r in own}))
        spilling = sum(r["spilled"] > 0 for r in own)
        lines.append(f"* Triton {version}, {archs}: {len(own)} compilations, {spilling} spill")
    return "\n".join(lines)


def write(reports: Reports) -> None:
    """The result files; each report is one line of the JSON file."""
    text = "\n\n".join([(__doc__ or "").strip(), summary(reports), table(reports)])
    (FOLDER / "gpu_static.md").write_text(f"# Machine code of the GPU kernels\n\n{text}\n")
    STATIC.write_text("[\n" + ",\n".join(map(json.dumps, reports)) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_static", description=__doc__)
    parser.add_argument("--triton", nargs="*", default=["installed"], help="versions, such as 3.4.0, or installed")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where triton-VERSION is")
    parser.add_argument("--arch", type=int, nargs="*", default=[90, 80, 100, 120], help="such as 90")
    parser.add_argument("--sample", action="store_true", help="a few shapes only; writes nothing")
    args = parser.parse_args()
    reports: Reports = []
    for arch in args.arch:
        for version in args.triton:  # written after each: a run that is cut off leaves what it has found
            reports += compile_with(version, args.folder, [arch], args.sample)
            if not args.sample:
                write(reports)
            print(f"sm_{arch}: {summary([r for r in reports if r['arch'] == arch]).splitlines()[-1]}", flush=True)
    print(table(reports))
    if spilling := [r for r in reports if r["spilled"]]:
        raise SystemExit("these configurations spill: " + ", ".join(f"{r['kernel']} ({r['tile']})" for r in spilling))


if __name__ == "__main__":
    main()
