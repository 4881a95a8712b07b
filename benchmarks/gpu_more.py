"""Two stages of ``benchmarks.gpu``: the rates of the kernels, and their tiles. They need a device."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import gpu_timing
from benchmarks.check import leaves_on
from benchmarks.peers import OURS
from benchmarks.workloads import MAIN, Workload
from otloss.backends.triton import config, tuned

Result = dict[str, Any]
DEFAULTS = Path(tuned.__file__)
# Bytes a second, and cycles a second, of the devices that the kernels' docstrings name.
PEAKS = {(8, 0): (1.55e12, 1.4e9), (9, 0): (3.35e12, 1.7e9)}
EXPONENTIALS = 16  # of a multiprocessor in a cycle


def _call(workload: Workload) -> Callable[[], Any]:
    step, leaves = OURS.build(workload), leaves_on("cuda", workload)
    return lambda: step(leaves)


def rates() -> Result:
    """Microseconds of each kernel in a warm call, launches, and the shares of the peak rates that its time allows.

    A share is that of a kernel which reads every entry of the cost once, in float32, and takes one exponential of it.
    """
    found: Result = {}
    properties = torch.cuda.get_device_properties(0)
    for name, workload in MAIN.items():
        run = _call(workload)
        run()
        events = gpu_timing.kernels(run)
        entries = workload.batch * workload.n * workload.m
        rows = []
        for event in events:
            seconds = event.self_device_time_total * 1e-6
            row: Result = {"kernel": event.key[:80], "calls": event.count, "us": seconds * 1e6}
            peak = PEAKS.get((properties.major, properties.minor))
            if peak and seconds > 0:
                each = seconds / event.count
                row["of_bytes"] = 4 * entries / each / peak[0]
                row["of_exponentials"] = entries / each / (EXPONENTIALS * properties.multi_processor_count * peak[1])
            rows.append(row)
        if not rows:
            return {"complete": False, "why": "PyTorch's profiler saw no kernel: is CUPTI here?"}
        rows.sort(key=lambda row: -row["us"])
        found[name] = {"launches": gpu_timing.launches(events), "kernels": rows}
        print(f"  {name}: {found[name]['launches']} launches; the slowest is {rows[0]['kernel']}")
        found[name]["ncu"] = _ncu(name, [row["kernel"] for row in rows if row["kernel"].isidentifier()][:2])
    return {"complete": True, "problems": found}


def _ncu(name: str, kernels: list[str]) -> list[str]:
    """What Nsight Compute says of two launches of the slowest of our kernels: PyTorch's have no plain names."""
    tool = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if tool is None:
        return ["skipped: ncu is not here"]
    if not kernels:
        return ["skipped: no kernel of ours ran"]
    names = "regex:" + "|".join(kernels)
    command = [tool, "--kernel-name", names, "--launch-count", "2", sys.executable, "-m", "benchmarks.gpu_more", name]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    except subprocess.TimeoutExpired:
        return ["stopped after 180 s"]
    return run.stdout.splitlines()[-120:]


def tiles(path: Path = DEFAULTS) -> Result:
    """The fastest tile of a streaming pass, by the bucket of the problem's sizes, and where they were written."""
    with mock.patch.dict(os.environ, OTLOSS_TRITON_AUTOTUNE="1"), mock.patch.object(config, "TUNED", {}):
        for workload in (*MAIN.values(), replace(MAIN["large"], inputs="dense")):
            _call(workload)()
        found = dict(config.TUNED)
    write_defaults(found, path)
    for key, tile in found.items():
        print(f"  {key}: {tile}")
    rows = [{"bucket": key, **asdict(tile)} for key, tile in found.items()]
    return {"complete": True, "tiles": rows, "written": str(path)}


def write_defaults(found: dict[tuned.Bucket, config.Tile], path: Path) -> None:
    """Make these tiles the defaults of the device that they were timed on; those of other devices stay."""
    head, mark, _ = path.read_text().partition(" = {")
    tiles = tuned.TILES | {key: astuple(tile) for key, tile in found.items() if key[-1] is not None}
    lines = [f"    {key}: {tile},\n" for key, tile in sorted(tiles.items())]
    path.write_text(head + mark + ("\n" + "".join(lines) if lines else "") + "}\n")


if __name__ == "__main__":
    _call(MAIN[sys.argv[1]])()
    torch.cuda.synchronize()
