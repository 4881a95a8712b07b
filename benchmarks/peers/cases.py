"""One problem with every option that a library may have, and its true solution in plain PyTorch, float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OUTPUTS = ("cost", "value", "plan", "log_plan", "n_iter")
"""<T, C>; <T, C> + eps KL(T | ab') and the penalties; T; its logarithm; how many iterations were run."""


class Missing(Exception):
    """A library has no such argument, output or function."""


class NoDevice(Exception):
    """A library takes what it is given, but on a device that is not there."""


@dataclass(frozen=True)
class Case:
    """``B`` problems. An option that is None is not asked for.

    Attributes:
        cost: ``(B, n, m)``; None where points are given, whose cost is the squared distance.
        x, y: points ``(B, n, d)`` and ``(B, m, d)``.
        a, b: masses ``(B, n)`` and ``(B, m)``.
        eps: a number, a tensor ``()``, or one ``(B,)``.
        rho_a, rho_b: penalties on the marginals.
        mask_x, mask_y: which points take part.
        start: potentials to begin with, those of T = a b exp((f + g - C) / eps).
        share: the total of the plan, which then may leave out mass on both sides.
        iterations: how many at most; tolerances are set so that all of them are exact.
    """

    a: Tensor
    b: Tensor
    cost: Tensor | None = None
    x: Tensor | None = None
    y: Tensor | None = None
    eps: float | Tensor = 0.2
    rho_a: float | None = None
    rho_b: float | None = None
    mask_x: Tensor | None = None
    mask_y: Tensor | None = None
    start: tuple[Tensor, Tensor] | None = None
    share: float | None = None
    iterations: int = 5000

    def matrix(self) -> Tensor:
        """The cost ``(B, n, m)``."""
        if self.cost is not None:
            return self.cost
        x, y = self.points()
        return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)

    def points(self) -> tuple[Tensor, Tensor]:
        if self.x is None or self.y is None:
            raise Missing("takes points, not a cost")
        return self.x, self.y

    def options(self, **names: str) -> dict[str, Any]:
        """The options that are asked for, under a library's own names.

        Raises:
            Missing: one of them is not among the names.
        """
        asked = ("rho_a", "rho_b", "mask_x", "mask_y", "start", "share")
        given = {name: value for name in asked if (value := getattr(self, name)) is not None}
        if lacking := [name for name in given if name not in names]:
            raise Missing(f"has no argument for {' and '.join(lacking)}")
        return {names[name]: value for name, value in given.items()}

    def one(self) -> None:
        """Raise unless there is one problem, for functions that take no more."""
        if len(self.a) != 1:
            raise Missing("takes one problem a call")


def solution(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """f, g and log T = log(a b) + (f + g - C) / eps, by Sinkhorn's iterations, until nothing changes.

    Shares of the mass and masks are left to the rows that ask for them.
    """
    cost, eps = case.matrix(), torch.as_tensor(case.eps, dtype=torch.float64).reshape(-1, 1)
    log_a, log_b = case.a.log(), case.b.log()
    log_kernel = -cost / eps.unsqueeze(-1) + log_a.unsqueeze(-1) + log_b.unsqueeze(-2)
    powers = [1.0 if rho is None else rho / (rho + eps) for rho in (case.rho_a, case.rho_b)]
    u, v = torch.zeros_like(case.a), torch.zeros_like(case.b)
    for _ in range(20_000):
        before = (u, v)
        rows = torch.logsumexp(log_kernel + v.unsqueeze(-2), -1)
        u = powers[0] * torch.where(case.a > 0, log_a - rows, 0.0)
        columns = torch.logsumexp(log_kernel + u.unsqueeze(-1), -2)
        v = powers[1] * torch.where(case.b > 0, log_b - columns, 0.0)
        if all(bool(((new - old).abs() < 1e-14).all()) for new, old in zip((u, v), before, strict=True)):
            break
    return eps * u, eps * v, log_kernel + u.unsqueeze(-1) + v.unsqueeze(-2)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q) - p + q).flatten(1).sum(-1)


@torch.no_grad()
def truth(case: Case, name: str) -> Tensor:
    """An output of the problems, without a gradient."""
    log_plan = solution(case)[2]
    plan = log_plan.exp()
    if name in ("plan", "log_plan"):
        return plan if name == "plan" else log_plan
    cost = torch.where(plan > 0, case.matrix() * plan, 0.0).sum((-1, -2))
    if name == "cost":
        return cost
    eps = torch.as_tensor(case.eps, dtype=torch.float64)
    value = cost + eps * _kl(plan, case.a.unsqueeze(-1) * case.b.unsqueeze(-2))
    for rho, marginal, mass in ((case.rho_a, plan.sum(-1), case.a), (case.rho_b, plan.sum(-2), case.b)):
        if rho is not None:
            value = value + rho * _kl(marginal, mass)
    return value


def slope(f: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor, step: float = 1e-5) -> Tensor:
    """The derivative along a direction, by a central difference."""
    return (f(at + step * direction) - f(at - step * direction)) / (2 * step)
