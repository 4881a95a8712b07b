"""How many processors this process may use.

A machine may have more of them than the process: its affinity may name some (``taskset``, a batch system), and its
control group may have a quota (a container with a limit of CPU time). PyTorch's number of threads knows of the first
only, and threads above the quota wait for each other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """The number of processors, at least 1. ``groups`` and ``mounted`` are where Linux lists control groups."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(math.ceil(quota) for quota in _quotas(groups, mounted))]))


def _quotas(groups: Path, mounted: Path) -> Iterator[float]:
    """Processors that the group of this process and those above it are granted, for either version of the groups."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            folder = mounted / ("cpu" if controllers else "") / str(group).lstrip("/")
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            try:
                quota, period = " ".join((folder / name).read_text() for name in names).split()
            except (OSError, ValueError):
                continue
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)
