"""Later stages of ``benchmarks.gpu``: rates of the kernels, tiles, a whole training step. They need a device."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import otloss
from benchmarks.check import leaves_on
from benchmarks.gpu_timing import event_ms
from benchmarks.peers import OURS
from benchmarks.workloads import MAIN

Result = dict[str, Any]
# Bytes a second, and cycles a second, of the devices that the kernels' docstrings name.
PEAKS = {(8, 0): (1.55e12, 1.4e9), (9, 0): (3.35e12, 1.7e9)}
EXPONENTIALS = 16  # of a multiprocessor in a cycle


def _call(name: str) -> Callable[[], Any]:
    workload = MAIN[name]
    step, leaves = OURS.build(workload), leaves_on("cuda", workload)
    return lambda: step(leaves)


def rates() -> Result:
    """Microseconds of each kernel in a warm call, launches, and the shares of the peak rates that its time allows.

    A share is that of a kernel which reads every entry of the cost once, in float32, and takes one exponential of it.
    """
    found: Result = {}
    properties = torch.cuda.get_device_properties(0)
    for name, workload in MAIN.items():
        run = _call(name)
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        entries = workload.batch * workload.n * workload.m
        kernels = []
        for event in profile.key_averages():
            seconds = event.self_device_time_total * 1e-6
            row: Result = {"kernel": event.key[:80], "calls": event.count, "us": seconds * 1e6}
            peak = PEAKS.get((properties.major, properties.minor))
            if peak and seconds > 0:
                each = seconds / event.count
                row["of_bytes"] = 4 * entries / each / peak[0]
                row["of_exponentials"] = entries / each / (EXPONENTIALS * properties.multi_processor_count * peak[1])
            kernels.append(row)
        kernels.sort(key=lambda row: -row["us"])
        found[name] = {"launches": sum(row["calls"] for row in kernels), "kernels": kernels}
        print(f"  {name}: {found[name]['launches']} launches; the slowest is {kernels[0]['kernel']}")
        found[name]["ncu"] = _ncu(name, [row["kernel"] for row in kernels[:2]])
    return {"complete": True, "problems": found}


def _ncu(name: str, kernels: list[str]) -> list[str]:
    """What Nsight Compute says of two launches of the slowest kernels."""
    tool = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if tool is None:
        return ["skipped: ncu is not here"]
    names = "regex:" + "|".join(kernels)
    command = [tool, "--kernel-name", names, "--launch-count", "2", sys.executable, "-m", "benchmarks.gpu_more", name]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    except subprocess.TimeoutExpired:
        return ["stopped after 180 s"]
    return run.stdout.splitlines()[-120:]


def tiles() -> Result:
    """The fastest tile of a streaming pass, by the bucket of the problem's sizes; to be made defaults in ``config``."""
    from otloss.backends.triton import config

    with mock.patch.dict(os.environ, OTLOSS_TRITON_AUTOTUNE="1"):
        for name in MAIN:
            _call(name)()
    return {"complete": True, "tiles": [{"bucket": key, **asdict(tile)} for key, tile in config.TUNED.items()]}


def step(batch: int = 64, pixels: int = 224, repeats: int = 5) -> Result:
    """Milliseconds of OPTiML's step, of its loss alone, of the loss on two streams, and of the step compiled."""
    from benchmarks.step import DIM, EXPANDED, _network

    torch.manual_seed(0)
    trunk, expander = (module.cuda() for module in _network())
    criterion = otloss.OPTiMLLoss(DIM).cuda()
    views = torch.randn(2, batch, 3, pixels, pixels, device="cuda")
    parameters = [*trunk.parameters(), *expander.parameters(), *criterion.parameters()]

    def loss() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            maps = [trunk(view) for view in views]
            embeddings = [expander(z.mean((2, 3))) for z in maps]
            return criterion(*maps, *embeddings).loss

    side = pixels // 32
    maps = [torch.randn(batch, DIM, side, side, device="cuda").bfloat16().requires_grad_() for _ in range(2)]
    embeddings = [torch.randn(batch, EXPANDED, device="cuda").bfloat16().requires_grad_() for _ in range(2)]

    def alone() -> tuple[Tensor, ...]:
        return torch.autograd.grad(criterion(*maps, *embeddings).loss, [*maps, *embeddings])

    def streams() -> None:
        main = torch.cuda.current_stream()
        for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                alone()
            main.wait_stream(stream)

    def replay() -> Callable[[], Any]:
        alone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            alone()
        return graph.replay

    def compiled() -> Callable[[], Any]:
        whole = torch.compile(loss)
        return lambda: torch.autograd.grad(whole(), parameters, allow_unused=True)

    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "step": lambda: lambda: torch.autograd.grad(loss(), parameters, allow_unused=True),
        "loss": lambda: alone,
        "loss on two streams": lambda: streams,
        "loss in a CUDA graph": replay,
        "compiled step": compiled,
    }
    found: Result = {"complete": True}
    for name, make in makers.items():
        try:
            run = make()
            run()
            found[name] = event_ms(run, repeats)
        except Exception as error:  # a failure is a result; the others still run
            found[name] = f"{type(error).__name__}: {str(error)[:300]}"
        print(f"  {name}: {found[name]}")
    return found


if __name__ == "__main__":
    _call(sys.argv[1])()
    torch.cuda.synchronize()
