"""Describe what a measured figure depends on: machine, versions, commit, date and command."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import otloss
from otloss.backends import cpu

_PACKAGES = ("torch", "numpy", "POT", "geomloss", "ott-jax", "jax", "pykeops", "flash-sinkhorn")
CHANGES = ("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)benchmarks/results")
"""What changed since the commit, but for the results, which a run itself writes."""


def environment() -> dict[str, Any]:
    """The whole description, ready for JSON."""
    return {
        "cpu": _cpu_model(),
        "cores": torch.get_num_threads(),
        "caches": _caches(),
        "memory_gib": round(_meminfo("MemTotal"), 1),
        "level": cpu.level() or "reference backend only",
        "python": platform.python_version(),
        "versions": {"otloss": otloss.__version__} | {name: _version(name) for name in _PACKAGES},
        "commit": _git("rev-parse", "--short", "HEAD") + ("-dirty" if _git(*CHANGES) else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
    }


def available_gib() -> float:
    """Memory that is still available, as the system estimates it; infinite where that is unknown."""
    return _meminfo("MemAvailable") or float("inf")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return run.stdout.strip()


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """Size of each cache that the first core sees, such as ``{"L1": "48K", "L2": "1024K"}``."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            found[f"L{(index / 'level').read_text().strip()}"] = (index / "size").read_text().strip()
    return found


def _meminfo(key: str) -> float:
    """GiB under a key of /proc/meminfo, 0 where there is none."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) / 2**20
    except (OSError, StopIteration):
        return 0.0
