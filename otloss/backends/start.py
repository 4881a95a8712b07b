"""Where iterations start, for the backends that are written in PyTorch: csrc/solve.hpp has the same in ``begin``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from otloss.backends.protocol import Problem, is_relaxed
from otloss.backends.relaxed import penalties


def better_start(
    given: Tensor | None, cold: Tensor, problem: Problem, half_step: Callable[[Tensor], Tensor]
) -> Tensor:
    """g to start from: the given potentials ``(B, m)``, but the cold ones where the dual of these is larger by eps.

    ``half_step`` gives the f with which every row has its mass.
    """
    if given is None:
        return cold
    a, b, eps = problem.a, problem.b, problem.eps
    of_a, of_b = penalties(problem)
    given = torch.where(b > 0, given, 0.0)
    if not is_relaxed(problem):  # a constant between f and g is free: with <b, g> = 0 it is in neither
        given = given - (b * given).sum(-1, keepdim=True)

    def dual(g: Tensor) -> Tensor:
        whole = torch.where(a > 0, half_step(g), 0.0)
        f = of_a.damping * whole
        of_rows = a * (of_a.slope(f) - eps * torch.exp((f - whole) / eps))
        return of_rows.sum(-1) + torch.where(b > 0, b * of_b.slope(g), 0.0).sum(-1)

    better = dual(given) >= dual(cold) - eps  # not so for NaN
    return torch.where(better.unsqueeze(-1), given, cold)
