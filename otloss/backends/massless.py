"""Points without mass: which they are, and what stands for their logarithms, potentials, sums and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from otloss.cost import negligible


def live(mass: Tensor) -> Tensor:
    """Which points have mass."""
    return mass > negligible(mass.dtype)


def or_one(x: Tensor) -> Tensor:
    """``x`` as a divisor: 1 where it counts as zero."""
    return torch.where(live(x), x, 1.0)


def log_mass(mass: Tensor) -> Tensor:
    """log(mass), -inf where there is none."""
    alive = live(mass)
    return torch.where(alive, torch.where(alive, mass, 1.0).log(), -torch.inf)


def known(x: Tensor, live: Tensor) -> Tensor:
    """``x``, but 0 where a point without mass has lost it: its potential is of the size of its costs, however large."""
    return torch.where(live | x.isfinite(), x, 0.0)


def unrolled_by_mass(grad: Tensor, mass: Tensor, potential: Tensor, eps: float) -> Tensor:
    """An unrolled gradient by the masses, 0 where a point without mass has lost it.

    Rounding of its potential, which is of the size of its costs, may move the exponents by 1/256 or more there.
    """
    exact = potential.abs() < eps / (128 * torch.finfo(potential.dtype).eps)
    return torch.where(live(mass) | (exact & grad.isfinite()), grad, 0.0)


def tangent_of_no_mass(mass: Tensor) -> Tensor:
    """0 with the derivative of ``mass`` where there is none."""
    return torch.where(live(mass), 0.0, mass - mass.detach())
