"""Where a step's time goes: the kernels of the cpu backend phase by phase, and what PyTorch does around them."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers import OURS
from benchmarks.workloads import Workload
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
