r"""Masses as they were given: normalised to total 1, checked, and the way back from the gradient by the normalised.

With the given masses m (logarithms l) of total M, :math:`a = m / M` or :math:`a = \mathrm{softmax}(l)`. A gradient
:math:`h` by a comes back as

.. math:: \partial m = (h - \langle a, h \rangle) / M, \qquad \partial l = a \circ (h - \langle a, h \rangle).

With penalties on the marginals masses are taken as they are: a = m, or a = exp(l).

Plain PyTorch, for backends that have nothing better. The gradient is made of differentiable operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from otloss.backends.protocol import Given, Problem, Solution, is_relaxed
from otloss.checks import wide
from otloss.cost import negligible


def normalise(problem: Problem, given: Given, check: bool) -> tuple[Problem, bool]:
    """The problem with masses of total 1, and whether every point is known to have mass.

    A share too small to count becomes exactly 0.

    Raises:
        ValueError: masses are invalid. Only with ``check``, which waits for the device.
    """
    take = _as_given if is_relaxed(problem) else _of_total_one
    a, b = take(problem.a, given.a), take(problem.b, given.b)
    all_live = check and _check(problem, given, a, b)
    return problem.with_masses(a, b), all_live


def _of_total_one(mass: Tensor, form: str) -> Tensor:
    if form == "uniform":
        return mass.clone()
    share = mass.softmax(-1) if form == "logs" else mass / mass.sum(-1, keepdim=True)
    return share.masked_fill((share > 0) & (share <= negligible(share.dtype)), 0.0)


def _as_given(mass: Tensor, form: str) -> Tensor:
    mass = mass.exp() if form == "logs" else mass.clone()
    return mass.masked_fill((mass > 0) & (mass <= negligible(mass.dtype)), 0.0)


def _log_total(mass: Tensor, form: str) -> Tensor:
    """``(B,)`` in float64: float32 cannot tell totals apart where their logarithms are large."""
    return wide(mass).logsumexp(-1) if form == "logs" else wide(mass).sum(-1).log()


def _check(problem: Problem, given: Given, a: Tensor, b: Tensor) -> bool:
    """Raise unless the masses are valid; return whether every point has mass."""
    sides = {
        f"log_{side}" if form == "logs" else side: (share, _log_total(mass, form))
        for side, form, mass, share in (("a", given.a, problem.a, a), ("b", given.b, problem.b, b))
        if form != "uniform"
    }
    if not a.shape[0] or not sides:
        return True
    totals = torch.stack([total for _, total in sides.values()])
    gap = totals[0] - totals[-1]
    if is_relaxed(problem):
        gap = torch.where(totals.isfinite().all(0), 0.0, torch.nan)
    # What is not finite in masses or totals has become NaN in the shares or the gap, and fails every comparison.
    least = float(torch.minimum(a.min(), b.min()))
    if least >= 0 and float(gap.abs().max()) <= given.tolerance:
        return least > 0
    for name, (share, total) in sides.items():
        bad = ~(torch.isfinite(total) & torch.isfinite(share).all(-1))
        if bad.any():
            kind = "logarithms of finite masses" if name.startswith("log_") else "finite masses"
            first = int(bad.int().argmax())
            raise ValueError(f"{name} must be {kind} with a positive total in every problem, unlike problem {first}")
        if (share < 0).any():
            raise ValueError(f"{name} must not hold negative mass")
    worst = int(gap.abs().argmax())
    of_a, of_b = totals[:, worst].exp().tolist()
    raise ValueError(
        f"a and b must have the same total mass (relative tolerance {given.tolerance:g}), "
        f"got {of_a:.7g} and {of_b:.7g} in problem {worst}"
    )


def by_given(problem: Problem, given: Given, a: Tensor, b: Tensor, by_a: Tensor, by_b: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by the masses as they were given, from those by a and b of total 1; empty by uniform ones."""
    free = is_relaxed(problem)
    return _by_given(problem.a, given.a, a, by_a, free), _by_given(problem.b, given.b, b, by_b, free)


def _by_given(mass: Tensor, form: str, share: Tensor, grad: Tensor, free: bool) -> Tensor:
    if form == "uniform":
        return grad.new_empty(0)
    if free:
        return share * grad if form == "logs" else grad
    centred = grad - (share * grad).sum(-1, keepdim=True)
    return share * centred if form == "logs" else centred / mass.sum(-1, keepdim=True)


def worst_error(solution: Solution) -> float:
    """The largest error of a solution; NaN where a potential or a cost is not finite. Waits for the device."""
    if not solution.error.numel():
        return 0.0
    parts = (solution.f, solution.g, solution.transport_cost)
    finite = all(bool(torch.isfinite(part).all()) for part in parts)
    return float(solution.error.max()) if finite else torch.nan
