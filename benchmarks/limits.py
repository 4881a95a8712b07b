"""What the machine allows, and how much of it otloss reaches. ``python -m benchmarks.limits WORKLOAD`` prints JSON.

This runs in a process of its own, because it changes the number of PyTorch's threads several times. After such changes
MKL's factorisations, which the reference uses, cannot be trusted.

* **Iterations**: each is one pass over the kernel matrix, so the limit is the rate at which one core reads a working
  set of that size. The time of an iteration is the difference of two solves with different numbers of iterations.
* **Products**: cost and the two contractions of the gradient, against the core's rate of fused multiply-adds.
* **Floor** of a whole step: the bytes of all iterations at the rate of reading, three products and two exponentials an
  entry at the rate of multiply-adds, over all cores. It does not count the gradient's own linear solve.
* **Phases**: where the time of a step goes, see `benchmarks.phases`.
* **Scaling**: how much more work all cores do than one, when each runs a probe by itself. Cores share a clock budget,
  caches and memory, so no solver on several threads gains more than that.
* **Call**: microseconds of one forward and backward for a single problem of 8 points, beyond the same chain of plain
  PyTorch operations with the independent coupling in the solver's place.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

import otloss
from benchmarks import phases
from benchmarks.peers import OURS
from benchmarks.workloads import MAIN, Workload, unit
from otloss.backends import cpu

FEW, MANY = 20, 120
FLOPS_OF_EXP = 20
"""An exponential is about ten fused multiply-adds, and each of these counts as two operations."""

CALL = Workload("call", batch=1, n=8, m=8, d=8, iterations=10)


def seconds(runs: dict[str, Callable[[], Any]], rounds: int = 9, budget: float = 6.0) -> dict[str, float]:
    """Median seconds of each. They run in turn after one warm-up: at least three times, then while ``budget`` lasts."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    began = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - began > budget:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def on_threads(threads: int, run: Callable[[], Any]) -> Callable[[], Any]:
    """The same run with that many PyTorch threads; otloss uses as many."""

    def with_threads() -> Any:
        torch.set_num_threads(threads)
        return run()

    return with_threads


def probes(w: Workload) -> dict[str, float] | None:
    """The rates of one core, in GB/s and GFLOP/s, as the extension measures them; None where it has no probes."""
    kernels = cpu._C
    suffix = "_" + w.dtype
    if kernels is None or not hasattr(kernels, "probe_read" + suffix):
        return None
    read, fma, products = (getattr(kernels, f"probe_{name}{suffix}") for name in ("read", "fma", "products"))
    working_set, cores = max(4096, w.n * w.m * _item(w)), torch.get_num_threads()
    return {
        "read_gb_s": read(working_set),
        "fma_gflop_s": fma(),
        "products_gflop_s": products(w.n, w.m, w.d, len(phases.PARTS) - 1),
        "scaling_read": scaling(lambda: read(working_set), cores),
        "scaling_fma": scaling(fma, cores),
    }


def scaling(probe: Callable[[], Any], cores: int, times: int = 20) -> float:
    """How many times the work of one thread ``cores`` threads do in the same time; at best ``cores``."""

    def work(threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda _: [probe() for _ in range(times)], range(threads)))

    taken = seconds({"one": lambda: work(1), "all": lambda: work(cores)}, rounds=5)
    return cores * taken["one"] / taken["all"]


def _item(w: Workload) -> int:
    return torch.finfo(getattr(torch, w.dtype)).bits // 8


def measure(w: Workload) -> dict[str, Any]:
    """The figures of one workload from features."""
    cores = torch.get_num_threads()
    leaves = w.leaves()
    step = OURS.build(w)
    x, y, logits_a, logits_b = (t.detach() for t in leaves)

    def solve(iterations: int) -> None:
        log_a, log_b = logits_a.log_softmax(-1), logits_b.log_softmax(-1)
        otloss.cosine_sinkhorn(x, y, log_a=log_a, log_b=log_b, eps=w.eps, max_iter=iterations, tol=0.0, gradient="none")

    runs = {"all": on_threads(cores, lambda: step(leaves)), "one": on_threads(1, lambda: step(leaves))}
    runs |= {f"solve{k}": on_threads(1, lambda k=k: solve(k)) for k in (FEW, MANY)}
    taken = seconds(runs)
    per_iteration = (taken[f"solve{MANY}"] - taken[f"solve{FEW}"]) / (MANY - FEW)
    bytes_a_pass = w.batch * w.n * w.m * _item(w)
    torch.set_num_threads(cores)
    found: dict[str, Any] = {
        "phases": phases.measure(w, seconds),
        "cores": cores,
        "step_s": taken["all"],
        "step_one_thread_s": taken["one"],
        "threads_speedup": taken["one"] / taken["all"],
        "iteration_s": per_iteration,
        "iteration_gb_s": bytes_a_pass / per_iteration / 1e9,
        "probes": probes(w),
    }
    if found["probes"]:
        found |= shares(w, found)
    return found


def shares(w: Workload, found: dict[str, Any]) -> dict[str, float]:
    """The floor, and the shares of the machine's rates that are reached, from times and probes."""
    rates, entries = found["probes"], w.batch * w.n * w.m
    parts = {
        "floor_iterations_s": w.iterations * entries * _item(w) / rates["read_gb_s"],
        "floor_products_s": 3 * 2 * entries * w.d / rates["fma_gflop_s"],
        "floor_exponentials_s": 2 * entries * FLOPS_OF_EXP / rates["fma_gflop_s"],
    }
    parts = {name: value / 1e9 / found["cores"] for name, value in parts.items()}
    return parts | {
        "floor_s": sum(parts.values()),
        "floor_share": sum(parts.values()) / found["step_s"],
        "iteration_share": found["iteration_gb_s"] / rates["read_gb_s"],
        "products_share": rates["products_gflop_s"] / rates["fma_gflop_s"],
    }


def independent(leaves: tuple[Tensor, ...]) -> Tensor:
    """The operations around the solver, with the plan ab' in place of the solution."""
    x, y, logits_a, logits_b = leaves
    plan = (logits_a.log_softmax(-1)[:, :, None] + logits_b.log_softmax(-1)[:, None, :]).exp()
    return (plan * (1 - unit(x) @ unit(y).mT)).sum((-1, -2))


def call(repeats: int = 300) -> dict[str, float]:
    """Microseconds of a call, as the module's docstring defines it."""
    leaves = CALL.leaves()
    step = OURS.build(CALL)

    def ours() -> None:
        for _ in range(repeats):
            step(leaves)

    def chain() -> None:
        for _ in range(repeats):
            torch.autograd.grad(independent(leaves).sum(), leaves)

    taken = {name: 1e6 * s / repeats for name, s in seconds({"ours_us": ours, "chain_us": chain}).items()}
    return taken | {"extra_us": taken["ours_us"] - taken["chain_us"]}


def in_own_process(name: str) -> dict[str, Any]:
    """`measure` of a main workload, or `call`, in a fresh process.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", "benchmarks.limits", name]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(run.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(call() if sys.argv[1] == CALL.name else measure(MAIN[sys.argv[1]])))
