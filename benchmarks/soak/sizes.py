"""The sizes of what a kernel adds: of its exponents, and of the terms of every output and gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.soak.problems import Tensors
from benchmarks.soak.settings import Setting
from benchmarks.soak.truth import Truth, minima, reduced


def largest(x: Tensor) -> Tensor:
    """The largest entry ``(B,)``; NaN counts as infinite."""
    return x.reshape(len(x), -1).abs().nan_to_num(nan=torch.inf).amax(-1)


def finite(x: Tensor) -> Tensor:
    """``x`` with 0 for what is not finite."""
    return torch.where(x.isfinite(), x, 0.0)


def each(t: Tensors) -> Tensor:
    """A number for each problem."""
    return t["weight 0"].reshape(len(t["weight 0"]), -1).sum(-1)


def eps_of(s: Setting, t: Tensors) -> Tensor:
    return t["eps"] if s.tensor_eps else torch.full_like(each(t), s.eps)


def strengths(s: Setting, t: Tensors) -> list[Tensor | None]:
    """The penalties on both sides ``(B,)``."""
    both = zip("ab", s.rho, strict=True)
    return [t.get(f"rho_{side}", torch.full_like(each(t), s.rho_size)) if how else None for side, how in both]


def exponents(s: Setting, t: Tensors, known: Truth, k: int) -> Tensor:
    """S of the k-th problem ``(B, n, m)``, see `bounds`."""
    end, sides, cost = known.ends[k], known.sides[k], known.costs[k]
    f, g, size = end.f, end.g, finite(cost).abs()
    if s.kind == "cosine":
        size = torch.ones_like(cost)
    elif s.kind != "dense":
        x, y = points(s, t, k)
        if s.kind == "dot":
            size = x.abs() @ y.abs().mT
        elif s.tensor_eps or s.masked:  # moved to their mean in the dtype, which rounds each point
            far = x.abs().amax(-1).unsqueeze(-1) + y.abs().amax(-1).unsqueeze(-2)
            size = size + 2 * size.sqrt() * far * s.d**0.5
    elif not s.relaxed and s.gradient != "unroll":
        rows, columns = minima(cost, sides)
        size, f, g = finite(reduced(cost, sides)).abs(), f - rows, g - columns
        gap = (sides.a * f).sum(-1) - (sides.b * g).sum(-1)
        gap = (gap / (sides.a.sum(-1) + sides.b.sum(-1))).unsqueeze(-1)
        f, g = f - gap, g + gap
    size = size * (s.d + 4) ** 0.5 if s.d else size
    return size + f.abs().unsqueeze(-1) + g.abs().unsqueeze(-2) + eps_of(s, t)[:, None, None]


def points(s: Setting, t: Tensors, k: int) -> tuple[Tensor, Tensor]:
    """The points of the k-th problem, 0 where a mask leaves them out; for distances moved to their common mean."""
    found, kept = [], []
    for name in (("x", "y"), ("x", "x"), ("y", "y"))[k]:
        kept.append(t.get(f"mask_{name}", torch.ones_like(t[name][..., 0], dtype=torch.bool)).unsqueeze(-1))
        found.append(torch.where(kept[-1], t[name], 0.0))
    if s.kind == "sqeuclidean":
        means = [x.sum(-2, keepdim=True) / keep.sum(-2, keepdim=True) for x, keep in zip(found, kept, strict=True)]
        centre = (means[0] + means[1]) / 2
        found = [torch.where(keep, x - centre, 0.0) for x, keep in zip(found, kept, strict=True)]
    return found[0], found[1]


def terms(s: Setting, t: Tensors, known: Truth) -> Tensors:
    """The largest terms that are added in every output and gradient ``(B,)``: no rounding is below u of these.

    They count where terms cancel. All do, for instance, in the gradient by the only point.
    """
    eps, sides, end, plan = eps_of(s, t), known.sides[0], known.ends[0], known.plans[0]
    live = (sides.a > 0).unsqueeze(-1) & (sides.b > 0).unsqueeze(-2) & known.costs[0].isfinite()
    sizes = torch.where(live, exponents(s, t, known, 0), 0.0)
    inner = largest(sizes)
    size = largest(torch.where(live, known.costs[0], 0.0)) + eps
    size = size + largest(torch.where(sides.a > 0, end.f, 0.0)) + largest(torch.where(sides.b > 0, end.g, 0.0))
    weights = torch.cat([t[name].abs().reshape(len(eps), -1) for name in t if name.startswith("weight")], -1)
    most, every = weights.amax(-1), weights.sum(-1)
    total, far = plan.sum((-1, -2)).clamp_min(1.0), largest(t["points"]) if "points" in t else eps
    # Of the output that is differentiated: the terms of its derivatives by the logarithm of the plan, and by a mass.
    by_plan, by_mass = {
        "plan": (most * largest(plan), most),
        "log_plan": (every, every),
        "potentials": (every * eps, every * eps),
        "barycentric": (every * far, every * far),
    }.get(s.output, (most * inner * total, most * size * total))
    found = dict.fromkeys(("by cost", "by cost_xx", "by cost_yy"), by_plan / eps)
    found |= dict.fromkeys(("by a", "by b", "by log_a", "by log_b"), by_mass * total)
    found |= dict.fromkeys(("transport_cost", "value", "divergence"), 2 * size * total) | {"f": size, "g": size}
    found |= {"plan": largest(plan * sizes) / eps, "log_plan": inner / eps, "barycentric": far * inner / eps}
    found |= {"by eps": by_mass * total / eps * (1 + inner / eps), "by points": most * s.n}
    for side, rho in zip("ab", strengths(s, t), strict=True):
        if rho is not None:
            found[f"by rho_{side}"] = by_mass * total * (1 + size / rho) / rho
    if s.partial:
        found["by partial"] = by_mass / t["partial"]
    if "x" in t:
        found |= _by_features(s, t, known, by_plan / eps)
    return found


def _by_features(s: Setting, t: Tensors, known: Truth, by_cost: Tensor) -> Tensors:
    """The same by x and y: what the entries of the cost add to the gradient by one point."""
    found = {"by x": torch.zeros_like(by_cost), "by y": torch.zeros_like(by_cost)}
    for k, (grad, plan) in enumerate(zip(known.by_cost, known.plans, strict=True)):
        added = grad.abs() + by_cost[:, None, None] * plan
        x, y = (p.abs() for p in points(s, t, k))
        if s.kind == "cosine":
            x, y = (torch.where(p > 0, 1 / p, 0.0) for p in (x.norm(dim=-1), y.norm(dim=-1)))
            by_left, by_right = x.unsqueeze(-1), y.unsqueeze(-2)
        elif s.kind == "dot":
            by_left, by_right = y.amax(-1).unsqueeze(-2), x.amax(-1).unsqueeze(-1)
        else:
            by_left = by_right = 2 * (x.amax(-1).unsqueeze(-1) + y.amax(-1).unsqueeze(-2))
        left, right = (("by x", "by y"), ("by x", "by x"), ("by y", "by y"))[k]
        found[left] = found[left] + (added * by_left).sum(-1).amax(-1)
        found[right] = found[right] + (added * by_right).sum(-2).amax(-1)
    return found
