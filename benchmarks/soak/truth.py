"""The truth of the soak test: the same problem in float64 on the reference backend, as it is or moved by a little.

Costs of features are made here, from differences and products in float64, so that cost and pull-back are not those of
the library. A divergence is put together from the values of its three problems.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import otloss
from benchmarks.soak.calls import Ends, Run, by_name, ends, leaves, loss, outputs, term, terms
from benchmarks.soak.problems import Tensors
from benchmarks.soak.settings import Setting

TOL, MAX_ITER = 1e-12, 2000


class Change(NamedTuple):
    """By what a problem is moved: its cost by a term ``(B, n, m)``, its masses and what is sent by factors."""

    cost: Tensor | float = 0.0
    a: Tensor | float = 1.0
    b: Tensor | float = 1.0
    sent: Tensor | float = 1.0


UNCHANGED = (Change(),) * 3


class Sides(NamedTuple):
    """The masses of a problem in float64, as a solver takes them; 0 where a mask leaves a point out."""

    a: Tensor
    b: Tensor


@dataclass
class Truth(Run):
    """A run whose terms also show their costs, the gradients by these, plans and masses."""

    costs: list[Tensor]
    by_cost: list[Tensor]
    plans: list[Tensor]
    sides: list[Sides]


def _times(x: Tensor, factor: Tensor | float) -> Tensor:
    """x times a factor, whose change counts as a constant."""
    return x if isinstance(factor, float) else x + (x * (factor - 1)).detach()


def _cost(s: Setting, t: Tensors) -> Tensor:
    if s.kind == "dense":
        return t["cost"]
    named = (("x", "mask_x"), ("y", "mask_y"))
    x, y = (t[k] if m not in t else torch.where(t[m].unsqueeze(-1), t[k], 0.0) for k, m in named)
    if s.kind == "sqeuclidean":
        return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    if s.kind == "dot":
        return -(x @ y.mT)
    squares = [p.square().sum(-1, keepdim=True) for p in (x, y)]
    # A zero row has the cost 1 to all, and no gradient.
    x, y = (torch.where(k > 0, p, 0.0) / k.clamp_min(1e-100).sqrt() for p, k in zip((x, y), squares, strict=True))
    return 1 - x @ y.mT


def _masses(s: Setting, t: Tensors, change: Change) -> tuple[dict[str, Tensor], Sides]:
    """The masses that the call takes, and what they are: of total 1, except under penalties and partial."""
    free = bool(s.relaxed or s.partial)
    given: dict[str, Tensor] = {}
    real = []
    for side, form, factor, count in (("a", s.masses[0], change.a, s.n), ("b", s.masses[1], change.b, s.m)):
        mask = t.get("mask_x" if side == "a" else "mask_y")
        if form == "logs":
            x = t[f"log_{side}"] if isinstance(factor, float) else t[f"log_{side}"] + factor.log()
            mass = x.exp()
        else:
            x = mass = t[side] if form == "masses" else t["count"].new_full((len(t["count"]), count), 1 / count)
            if form == "uniform" and mask is not None:
                x = mass = mask.double() / mask.sum(-1, keepdim=True)
            x = mass = _times(x, factor)
        mass = (mass if mask is None else torch.where(mask, mass, 0.0)).detach()
        passed = form != "uniform" or not isinstance(factor, float)
        if not free and passed and given:  # float32 masses have totals that float64 tells apart
            ratio = real[0].sum(-1, keepdim=True) / mass.sum(-1, keepdim=True)
            x, mass = (x + ratio.log() if form == "logs" else _times(x, ratio)), mass * ratio
        if passed:
            given[f"log_{side}" if form == "logs" else side] = x
        real.append(mass)
    return given, Sides(*(m if free else m / m.sum(-1, keepdim=True) for m in real))


def _spread(cost: Tensor, sides: Sides, relaxed: bool) -> Tensor:
    """The largest cost that the solver sees between points with mass ``(B,)``."""
    cost = cost.detach()
    if not relaxed:
        cost = reduced(cost, sides)
    live = (sides.a > 0).unsqueeze(-1) & (sides.b > 0).unsqueeze(-2) & cost.isfinite()
    return torch.where(live, cost.abs(), 0.0).amax((-1, -2))


def minima(cost: Tensor, sides: Sides) -> tuple[Tensor, Tensor]:
    """The least costs of rows, then of columns of what is left, among points with mass."""

    def least(x: Tensor, live: Tensor, dim: int) -> Tensor:
        found = x.masked_fill(~live, torch.inf).amin(dim)
        return torch.where(found.isfinite(), found, 0.0)

    rows = least(cost, (sides.b > 0).unsqueeze(-2), -1)
    return rows, least(cost - rows.unsqueeze(-1), (sides.a > 0).unsqueeze(-1), -2)


def reduced(cost: Tensor, sides: Sides) -> Tensor:
    """The cost without these."""
    rows, columns = minima(cost, sides)
    return cost - rows.unsqueeze(-1) - columns.unsqueeze(-2)


def _rounded(x: float, s: Setting) -> float:
    return float(torch.tensor(x, dtype=s.torch_dtype))


def _solve(
    s: Setting, t: Tensors, cost: Tensor, change: Change, start: Ends | None, steps: Tensor | None
) -> tuple[otloss.SinkhornOutput, Sides]:
    said, sides = _masses(s, t, change)
    said |= {k: t[k] for k in ("mask_x", "mask_y") if k in t}
    options: dict[str, Any] = said | {"eps": t.get("eps", s.eps), "gradient": s.gradient, "backend": "reference"}
    for k, side in enumerate("ab"):
        if s.rho[k]:
            options[f"rho_{side}"] = t.get(f"rho_{side}", _rounded(s.rho_size, s))
    if s.partial:
        options["partial"] = _times(t["partial"], change.sent)
    if steps is not None:
        return otloss.sinkhorn(cost, **options, tol=0.0, max_iter=int(steps)), sides
    eps = t["eps"].detach() if s.tensor_eps else s.eps
    rounding = 2**-50 * float((_spread(cost, sides, s.relaxed) / eps).max())
    options["tol"] = max(TOL, rounding)
    if not s.partial:
        options["init"] = (start.f, start.g) if start else None
        options["init"] = _near(cost, options)
    return otloss.sinkhorn(cost, **options, max_iter=MAX_ITER), sides


def _near(cost: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Where the reference starts: at what the kernels find, which spares it thousands of slow sweeps.

    Wherever it starts, the truth is where its own iterations stay.
    """
    fixed = {name: x.detach() if isinstance(x, Tensor) else x for name, x in options.items()}
    with torch.no_grad():
        out = otloss.sinkhorn(cost.detach(), **fixed | {"backend": "cpu", "gradient": "none"}, max_iter=50 * MAX_ITER)
    return (out.f, out.g) if bool(out.f.isfinite().all() & out.g.isfinite().all()) else None


def _once(
    s: Setting, t: Tensors, changes: tuple[Change, ...], starts: list[Ends] | None, steps: Tensor | None = None
) -> Truth:
    given = leaves(s, t)
    t = t | given
    costs, outs, sides, settings = [], [], [], []
    for k, (left, right, _) in enumerate(terms(s)):
        one, its = term(s, t, left, right)
        its["count"] = t["weight 0"]
        cost = _cost(one, its)
        if not cost.requires_grad:
            cost = cost.detach().requires_grad_()
        costs.append(cost)
        out, masses = _solve(one, its, cost + changes[k].cost, changes[k], starts[k] if starts else None, steps)
        outs.append(out)
        sides.append(masses)
        settings.append(one)
    if s.divergence:
        found = {"divergence": sum(weight * out.value for (_, _, weight), out in zip(terms(s), outs, strict=True))}
        if s.relaxed:
            totals = [side.sum(-1) for side in _differentiable_masses(s, t)]
            found["divergence"] = found["divergence"] + 0.5 * t.get("eps", s.eps) * (totals[0] - totals[1]).square()
    else:
        found = outputs(s, t, outs[0])
        if not s.relaxed:
            found |= _in_gauge(s, t, found["f"], found["g"])
    grads, by_cost = by_name(given, loss(s, t, found), tuple(costs))
    plans = [out.plan.detach() for out in outs]
    filled = [torch.zeros_like(c) if g is None else g for c, g in zip(costs, by_cost, strict=True)]
    ended = [ends(one, out) for one, out in zip(settings, outs, strict=True)]
    shown = {name: x.detach() for name, x in (found | grads).items()}
    return Truth(shown, ended, [c.detach() for c in costs], filled, plans, sides)


def _in_gauge(s: Setting, t: Tensors, f: Tensor, g: Tensor) -> Tensors:
    """f and g with <a, f> = <b, g> of the masses before a change: the gauge of what is compared with."""
    a, b = _differentiable_masses(s, t)
    if not s.partial:
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    gap = (b * g).sum(-1, keepdim=True) - (a * f).sum(-1, keepdim=True)
    gap = gap / (a.sum(-1, keepdim=True) + b.sum(-1, keepdim=True))
    f, g = f + gap, g - gap
    return {
        "f": f if "mask_x" not in t else torch.where(t["mask_x"], f, 0.0),
        "g": g if "mask_y" not in t else torch.where(t["mask_y"], g, 0.0),
    }


def _differentiable_masses(s: Setting, t: Tensors) -> tuple[Tensor, Tensor]:
    """The masses as they were given, without a change; 0 where a mask leaves a point out."""
    given, sides = _masses(s, t | {"count": t["weight 0"]}, Change())
    found = []
    for side, real, mask in (("a", sides.a, t.get("mask_x")), ("b", sides.b, t.get("mask_y"))):
        x = given[f"log_{side}"].exp() if f"log_{side}" in given else given.get(side, real)
        found.append(x if mask is None else torch.where(mask, x, 0.0))
    return found[0], found[1]


def truth(
    s: Setting,
    t: Tensors,
    changes: tuple[Change, ...] = UNCHANGED,
    near: Run | None = None,
    steps: Tensor | None = None,
) -> Truth:
    """The truth of tensors in float64. ``near`` is a solution to start from; ``steps (B,)`` are unrolled iterations."""
    if s.gradient != "unroll":
        return _once(s, t, changes, near.ends if near else None)
    assert steps is not None
    parts: Truth | None = None
    for number in steps.unique():
        part = _once(s, t, changes, None, number)
        if parts is None:
            parts = part
            continue
        here = steps == number
        for old, new in (
            *((parts.found[k], part.found[k]) for k in parts.found),
            *zip(parts.by_cost + parts.plans, part.by_cost + part.plans, strict=True),
            *zip(parts.ends[0], part.ends[0], strict=True),
        ):
            old[here] = new[here]
    assert parts is not None
    return parts


def in_float64(t: Tensors) -> Tensors:
    """The same tensors, for the truth."""
    return {name: x if x.dtype == torch.bool else x.double().contiguous() for name, x in t.items()}
