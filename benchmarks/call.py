"""Microseconds of one call with four problems of 8 x 8, where almost all of the time is Python and PyTorch.

``python -m benchmarks.call`` measures on one thread and stores the medians in results/call.json. For a dense cost and
for features, each with masses from ``log_softmax`` of a leaf and without masses, it times in turn

* **forward**: `otloss.sinkhorn` or `otloss.cosine_sinkhorn` under ``no_grad``, with the ``log_softmax``,
* **step**: the same with the backward of the sum of its transport costs to every leaf,
* **chain**: forward and backward of the operations around the solver, with the independent coupling in its place:
  ``log_softmax`` of both masses, their sum and its ``exp`` (without masses, the constant 1/64); for features, unit rows
  by ``normalize`` and ``1 - x @ y.mT``; the product of plan and cost, and its sum,
* **kernels**: the two compiled kernels alone, called by address.

What a call costs beyond plain operations is **extra** = step - chain.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import otloss
from benchmarks import results
from benchmarks.machine import environment
from benchmarks.workloads import Leaves, Workload, unit
from otloss.backends import cpu
from otloss.backends.protocol import Problem, Upstream

PATH = results.FOLDER / "call.json"
SIZE = Workload("call", batch=4, n=8, m=8, d=16, tol=1e-5, iterations=1000)
CASES = {
    f"{inputs}, {masses}": (inputs, masses == "masses")
    for inputs in ("dense", "features")
    for masses in ("masses", "no masses")
}


def leaves_of(inputs: str, with_masses: bool) -> Leaves:
    """The leaves: cost or features, then the logits of both masses if there are any."""
    made = replace(SIZE, inputs=inputs).leaves()
    return made if with_masses else made[:-2]


def ours(inputs: str, with_masses: bool, leaves: Leaves) -> Tensor:
    """Transport costs of the four problems."""
    points = leaves[:1] if inputs == "dense" else leaves[:2]
    options: dict[str, Any] = {"eps": SIZE.eps, "tol": SIZE.tol, "max_iter": SIZE.iterations}
    if with_masses:
        options |= {"log_a": leaves[-2].log_softmax(-1), "log_b": leaves[-1].log_softmax(-1)}
    solve = otloss.sinkhorn if inputs == "dense" else otloss.cosine_sinkhorn
    return solve(*points, **options).transport_cost


def chain(inputs: str, with_masses: bool, leaves: Leaves) -> Tensor:
    """The same with the independent coupling: see above."""
    cost = leaves[0] if inputs == "dense" else 1 - unit(leaves[0]) @ unit(leaves[1]).mT
    if not with_masses:
        return (cost * (1 / (SIZE.n * SIZE.m))).sum((-1, -2))
    plan = (leaves[-2].log_softmax(-1)[:, :, None] + leaves[-1].log_softmax(-1)[:, None, :]).exp()
    return (plan * cost).sum((-1, -2))


def kernels(inputs: str, with_masses: bool, leaves: Leaves) -> Callable[[], None]:
    """The kernels of solve and gradient, with everything around them done before."""
    points, logits = (leaves[:-2], leaves[-2:]) if with_masses else (leaves, ())
    left, right = (t.detach() for t in (points if inputs == "features" else points * 2))
    uniform = torch.full((SIZE.batch, SIZE.n), 1 / SIZE.n)
    a, b = (t.detach().softmax(-1) for t in logits) if with_masses else (uniform, uniform)
    problem = Problem(left, right if inputs == "features" else None, a, b, SIZE.eps)
    solution = cpu.solve(problem, SIZE.iterations, SIZE.tol, None, True)
    call = cpu._KernelCall(problem, None, solution.shift)
    gradients, residual = call.gradients(True), call.empty()
    upstream = Upstream(torch.ones(SIZE.batch))
    solved = [t.data_ptr() for t in solution[:6]]
    derived = (*solved[:2], cpu._upstream_addresses(upstream), True, cpu._gradient_addresses(gradients, residual))

    def run(alive: Any = (problem, solution, gradients, residual, upstream)) -> None:
        call.run("solve", 0, True, SIZE.iterations, SIZE.tol, *solved)
        call.run("implicit", *derived)

    return run


def measure(rounds: int = 2000) -> dict[str, dict[str, float]]:
    """Median microseconds of every part of every case, timed in turn."""
    torch.set_num_threads(1)
    found = {}
    for name, (inputs, with_masses) in CASES.items():
        leaves = leaves_of(inputs, with_masses)

        def forward(case: Any = (inputs, with_masses, leaves)) -> None:
            with torch.no_grad():
                ours(*case)

        def step(case: Any = (inputs, with_masses, leaves)) -> None:
            torch.autograd.grad(ours(*case).sum(), case[-1])

        def plain(case: Any = (inputs, with_masses, leaves)) -> None:
            torch.autograd.grad(chain(*case).sum(), case[-1])

        runs = {"forward": forward, "step": step, "chain": plain, "kernels": kernels(inputs, with_masses, leaves)}
        taken: dict[str, list[float]] = {part: [] for part in runs}
        for _ in range(rounds):
            for part, run in runs.items():
                start = time.perf_counter()
                run()
                taken[part].append(1e6 * (time.perf_counter() - start))
        found[name] = {f"{part}_us": statistics.median(times[rounds // 10 :]) for part, times in taken.items()}
        found[name]["extra_us"] = found[name]["step_us"] - found[name]["chain_us"]
    return found


def main() -> None:
    """Measure, print and store."""
    found = measure()
    for name, parts in found.items():
        print(f"{name:22s} " + "  ".join(f"{part[:-3]} {microseconds:.0f}" for part, microseconds in parts.items()))
    results.save(PATH, {"environment": environment(), "cases": found})


if __name__ == "__main__":
    main()
