"""Where a step's time goes: the kernels of the cpu backend phase by phase, and what PyTorch does around them.

``python -m benchmarks.phases`` measures which share of the rate of multiply-adds the products reach. It writes
``results/products.json``. Each instruction level is measured in a process of its own, for float32 and float64, on one
thread and on two.

* **Products**: one problem in the cache again and again. ``cost`` is the cost with all that makes it from the features,
  ``grad_x`` and ``grad_y`` are the gradients by the features from that by the cost, ``all`` is the three in turn.
* **Step**: the kernels on a whole batch in memory. ``contraction`` is what the gradient by the features adds to that by
  the masses: reading the features, their norms, forming the gradient of the cost, two products, writing the gradients.
  ``cost_and_values`` is a solve of no iterations, which also computes the outputs; only its product counts as work.

Products are those of the fastest of many runs, since other work on the machine slows some of them. The step is in time
of the processor, on one thread.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from benchmarks import accuracy, machine, results
from benchmarks.peers import OURS
from benchmarks.workloads import Workload, table
from otloss import operators
from otloss.backends import cpu
from otloss.backends.protocol import Gradients, Problem, Solution, Upstream

PHASES = {
    "cost_s": "cost and values",
    "iterations_s": "iterations",
    "adjoint_s": "adjoint",
    "contraction_s": "contraction",
    "around_s": "around the kernels",
}
"""Cost and values: a solve of no iterations, which computes the cost (a product) and the values. Adjoint: the gradient
by the masses alone, which computes the kernel again and solves the linear system. Contraction: what the gradient by the
features adds, which is two products. Around: the rest of the step: softmax, checks, autograd and fresh memory."""

SHAPES = table(
    (
        Workload("channels", batch=16, n=512, m=512, d=49),
        Workload("tokens", batch=16, n=196, m=196, d=128),
        Workload("positions", batch=64, n=49, m=49, d=512),
        Workload("positions-64", batch=256, n=49, m=49, d=64),
        Workload("tiny", batch=4096, n=8, m=8, d=32),
    )
)
"""What the products are measured at."""
PARTS = ("cost", "grad_x", "grad_y", "all")
"""What ``probe_products`` measures, in the order of its last argument."""
DTYPES = ("float32", "float64")
PRODUCTS = results.FOLDER / "products.json"


def measure(w: Workload, seconds: Any) -> dict[str, float]:
    """Seconds of each phase on all threads. ``seconds`` times runs in turn; it is `benchmarks.limits.seconds`."""
    leaves = w.leaves()
    step = OURS.build(w)
    x, y = (t.detach() for t in leaves[:2])
    a, b = (t.detach().softmax(-1) for t in leaves[2:])
    problem = Problem(x, y, a, b, w.eps)
    kept = operators.room_to_keep(problem, True, "cpu")
    kept_or_none = kept if kept.numel() else None
    ones = torch.ones_like(a[:, 0])
    f, g = cpu.solve(problem, w.iterations, 0.0, kept_or_none)[:2]

    def solve(iterations: int) -> Solution:
        return cpu.solve(problem, iterations, 0.0, kept_or_none)

    def gradient(need_cost: bool) -> Gradients:
        return cpu.implicit_gradient(problem, f, g, Upstream(ones), True, need_cost, kept_or_none)[0]

    taken = seconds(  # this order leaves the same data in the caches for both runs of a difference
        {
            "step": lambda: step(leaves),
            "all": lambda: solve(w.iterations),
            "features": lambda: gradient(True),
            "none": lambda: solve(0),
            "masses": lambda: gradient(False),
        }
    )
    return {
        "cost_s": taken["none"],
        "iterations_s": taken["all"] - taken["none"],
        "adjoint_s": taken["masses"],
        "contraction_s": taken["features"] - taken["masses"],
        "around_s": taken["step"] - taken["all"] - taken["features"],
    }


def together(probe: Callable[[], float], threads: int, repeats: int = 3) -> float:
    """What that many threads reach in sum, when each runs the probe at the same time: the median of a few trials."""
    with ThreadPoolExecutor(threads) as pool:
        return statistics.median(sum(pool.map(lambda _: probe(), range(threads))) for _ in range(repeats))


def fastest(runs: dict[str, Callable[[], Any]], budget: float) -> dict[str, float]:
    """Least seconds of the processor. The runs take turns: at least ten times, then while ``budget`` lasts."""
    least, began, count = dict.fromkeys(runs, float("inf")), time.perf_counter(), 0
    while count < 10 or time.perf_counter() - began < budget:
        count += 1
        for name, run in runs.items():
            start = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - start)
    return least


def products(shapes: Iterable[Workload], budget: float = 0.5) -> dict[str, Any]:
    """Shares of the rate of multiply-adds, at the level of this process: by dtype, threads, shape and part."""
    found: dict[str, Any] = {}
    before = torch.get_num_threads()
    for dtype in DTYPES:
        fma, probe = (getattr(cpu._C, f"probe_{name}_{dtype}") for name in ("fma", "products"))
        for threads in (1, 2):
            torch.set_num_threads(threads)
            peak = together(fma, threads)
            entry: dict[str, Any] = {"fma_gflop_s": peak, "products": {}}
            for w in shapes:
                runs = {part: partial(probe, w.n, w.m, w.d, i) for i, part in enumerate(PARTS)}
                entry["products"][w.name] = {part: together(run, threads) / peak for part, run in runs.items()}
                if threads == 1:
                    step = {part: rate / peak for part, rate in on_a_batch(w, dtype, budget).items()}
                    entry.setdefault("step", {})[w.name] = step
            found.setdefault(dtype, {})[str(threads)] = entry
    torch.set_num_threads(before)
    return found


def on_a_batch(w: Workload, dtype: str, budget: float) -> dict[str, float]:
    """GFLOP/s of the products within the kernels' calls, on one thread, with the cost kept for the gradient."""
    x, y, logits_a, logits_b = (t.detach() for t in w.leaves(getattr(torch, dtype)))
    problem = Problem(x, y, logits_a.softmax(-1), logits_b.softmax(-1), w.eps)
    kept, ones = x.new_empty(w.batch, w.n, w.m), torch.ones_like(problem.a[:, 0])
    f, g = cpu.solve(problem, w.iterations, 0.0, kept)[:2]

    def gradient(need_cost: bool) -> Gradients:
        return cpu.implicit_gradient(problem, f, g, Upstream(ones), True, need_cost, kept)[0]

    runs = {"none": lambda: cpu.solve(problem, 0, 0.0, kept)}
    taken = fastest(runs | {"features": lambda: gradient(True), "masses": lambda: gradient(False)}, budget)
    flop = 2e-9 * w.batch * w.n * w.m * w.d
    return {
        "cost_and_values": flop / taken["none"],
        "contraction": 2 * flop / (taken["features"] - taken["masses"]),
    }


def at_level(level: str) -> dict[str, Any] | None:
    """`products` in a process of its own at an instruction level; None where this machine does not have it."""
    command = [sys.executable, "-m", "benchmarks.phases", level]
    run = subprocess.run(command, env={**os.environ, "OTLOSS_CPU_LEVEL": level}, stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout)


def main(names: list[str]) -> None:
    if names:  # one level: this process has it from its environment
        print(json.dumps(None if cpu.status() else products(SHAPES.values())))
        return
    environment = machine.environment() | {"command": "python -m benchmarks.phases"}
    levels = {name: found for name in accuracy.LEVELS if (found := at_level(name))}
    results.save(PRODUCTS, {"environment": environment, "levels": levels})


if __name__ == "__main__":
    main(sys.argv[1:])
