r"""How far the result of a kernel may lie from the truth: the bounds of the soak test.

With u = 2^-24 (2^-53 in float64), a kernel makes two kinds of errors.

* It rounds. A potential is known to u of itself, so an entry of the plan to :math:`u S_{ij} / \varepsilon`, where
  :math:`S = |C| + |f| + |g| + \varepsilon`, for the potentials and the cost that the kernel computes with: of a matrix
  without penalties these are without the minima of rows and columns. A cost of d features is itself known to d u of the
  terms that are added (csrc/cost.hpp), and to about the root of d of that. Masses, penalties and sums are known to some
  u. What such an error does to an output depends on the problem alone. It is measured: the truth is solved again with
  costs moved by u S, with random signs and all in one direction, and masses moved by 2 u. The largest change of a few
  draws times ``ROOM``, which is the room of the tests in ``tests/cpu_problems.py``, is allowed.
* It stops. The plan that it returns is the exact solution for the marginals that this plan has. The truth is solved
  again for these, and twice the change is allowed, also of what holds masses beside the plan. That holds for any tol.
  Where points hardly exchange mass with all others, even float64 leaves their potentials open. So the truth is also
  solved from where the kernel stopped, and twice the difference of both truths is allowed.

The system of a gradient is solved by conjugate gradients to a relative residual of 5e-7 (1e-12 in float64,
csrc/adjoint.hpp), which moves its solution as costs do that are moved by so much; this is at most half of what the room
allows in float32, and more than the rounding in float64.

Where terms cancel, as all do of a problem with one point, nothing changes but rounding. So to each bound the rounding
of the largest terms that are added is added, with the same room (:func:`sizes.terms`).

An error is the largest of an entry, apart for points with and without mass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.soak.calls import Ends, Run
from benchmarks.soak.problems import Tensors
from benchmarks.soak.settings import Setting
from benchmarks.soak.sizes import each, eps_of, exponents, finite, largest, strengths, terms
from benchmarks.soak.truth import Change, Sides, Truth, truth

ROOM, STOP = 16.0, 2.0
CG_TARGET = {torch.float32: 5e-7, torch.float64: 1e-12}
STEP = {torch.float32: 2.0**-24, torch.float64: 2.0**-30}
"""By how much the truth is moved; what float64 rounds would drown in the truth's own rounding, so it is scaled down."""
LEAST_MOVE = 1e-7
"""Likewise of marginals, where a plan is off by less."""


def _apart(x: Tensor, y: Tensor) -> Tensor:
    """The largest difference of an entry ``(B,)``; two equal infinities do not differ."""
    return largest(torch.where(x == y, 0.0, x.double() - y))


def _random(like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=rng, dtype=torch.float64)


def rounded(s: Setting, t: Tensors, known: Truth, draw: int, rng: torch.Generator) -> tuple[Change, ...]:
    """Every problem, moved by what a kernel rounds: the costs of the first draw in one direction."""
    step, changes = STEP[s.torch_dtype], []
    for k, sides in enumerate(known.sides):
        size = exponents(s, t, known, k)
        signs = torch.ones_like(size) if draw == 0 else _random(size, rng)
        a, b, sent = (1 + 2 * step * _random(x, rng) for x in (*sides, each(t)))
        changes.append(Change(step * size * signs, a, b, sent))
    return tuple(changes)


def _asked(s: Setting, t: Tensors, end: Ends, sides: Sides) -> list[Tensor]:
    """The marginals that potentials ask for: the masses, and under penalties a exp(-f/rho_a) and b exp(-g/rho_b)."""
    found = []
    for mass, potential, rho in zip(sides, (end.f, end.g), strengths(s, t), strict=True):
        found.append(mass if rho is None else mass * torch.where(mass > 0, -potential / rho[:, None], 0.0).exp())
    return found


def _factors(s: Setting, t: Tensors, end: Ends, sides: Sides) -> list[Tensor]:
    """By what the masses would have to be multiplied so that the plan is the exact solution; 1 without mass."""
    found = []
    for logs, asked in zip((end.rows, end.columns), _asked(s, t, end, sides), strict=True):
        some = (asked > 0) & logs.isfinite()
        found.append(torch.where(some, logs - torch.where(some, asked, 1.0).log(), 0.0).exp())
    return found


def stopped(s: Setting, t: Tensors, got: Run, known: Truth) -> tuple[tuple[Change, ...], Tensor, Tensor]:
    """Every problem with the marginals of the plan that was got, by what ``(B,)`` that move was multiplied, and by what
    share of itself a mass was moved at most before that."""
    scale, share, moves = torch.full_like(each(t), 1e7), torch.zeros_like(each(t)), []
    for end, exact, sides in zip(got.ends, known.ends, known.sides, strict=True):
        extended = _extended(sides, t["partial"]) if s.partial else sides
        both = zip(_factors(s, t, end, extended), _factors(s, t, exact, extended), strict=True)
        off = [x / y - 1 for x, y in both]
        whole = sum((mass * x.abs()).sum(-1) / mass.sum(-1) for mass, x in zip(extended, off, strict=True))
        most = torch.maximum(*(x.abs().amax(-1) for x in off))
        share = torch.maximum(share, most)
        scale = torch.minimum(scale, torch.minimum(LEAST_MOVE / whole, 0.5 / most).nan_to_num(nan=torch.inf))
        moves.append((sides, extended, off))
    scale, changes = scale.clamp_min(1.0), []
    for sides, extended, off in moves:
        a, b = (1 + (scale[:, None] * x).clamp(-0.75, 3.0) for x in off)
        if s.partial:  # what is sent is the total of b less the mass of the slack's row
            whole = (sides.a.sum(-1) + sides.b.sum(-1) - t["partial"])[:, None]
            masses_a, masses_b = whole * extended.a * a, whole * extended.b * b
            sent = (masses_b[:, :-1].sum(-1) - masses_a[:, -1]) / t["partial"]
            changes.append(Change(0.0, a[:, :-1], b[:, :-1], sent))
        else:
            changes.append(Change(0.0, a, b))
    return tuple(changes), scale, share


def _extended(sides: Sides, sent: Tensor) -> Sides:
    """The masses of a partial problem with its slack, of total 1, see `otloss.partial`."""
    left_a, left_b = (mass.sum(-1, keepdim=True) - sent[:, None] for mass in sides)
    whole = sides.a.sum(-1, keepdim=True) + left_b
    return Sides(torch.cat((sides.a, left_b), -1) / whole, torch.cat((sides.b, left_a), -1) / whole)


def parts(known: Truth, found: Tensors) -> Iterator[tuple[str, Tensor]]:
    """Outputs and gradients by name, points with mass apart from those without."""
    live_a, live_b = (side > 0 for side in known.sides[0])
    of = {"f": live_a, "by a": live_a, "barycentric": live_a, "g": live_b, "by b": live_b}
    for name in known.found:
        x, live = found[name], of.get(name)
        if live is None:
            yield name, x
            continue
        live = live if x.dim() == 2 else live.unsqueeze(-1)
        yield name, torch.where(live, x, 0.0)
        yield f"{name}, no mass", torch.where(live, 0.0, x)


def _needs_system(s: Setting, name: str) -> bool:
    """Whether a gradient comes out of a linear system."""
    return name.startswith("by") and s.gradient == "implicit" and s.output not in ("value", "divergence")


def compare(
    s: Setting, t: Tensors, got: Run, known: Truth, steps: Tensor | None, draws: int, rng: torch.Generator
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The error, the bound and the size ``(B,)`` of every output and gradient. ``t`` is in float64."""
    if missing := known.found.keys() ^ got.found.keys():
        raise AssertionError(f"only one of both backends has {', '.join(sorted(missing))}")
    unit, zero, added = torch.finfo(s.torch_dtype).eps / 2, torch.zeros_like(each(t)), terms(s, t, known)
    right = dict(parts(known, known.found))
    moved, short = dict.fromkeys(right, zero), dict.fromkeys(right, zero)
    for draw in range(draws):
        other = truth(s, t, rounded(s, t, known, draw, rng), known, steps)
        for name, x in parts(known, other.found):
            moved[name] = torch.maximum(moved[name], _apart(x, right[name]) * (unit / STEP[s.torch_dtype]))
    if s.gradient != "unroll":
        for name, x in parts(known, truth(s, t, near=got).found):
            short[name] = _apart(x, right[name])
        changes, scale, share = stopped(s, t, got, known)
        for name, x in parts(known, truth(s, t, changes, known).found):
            by_share = share * _by_share(s, t, name, right[name], added)
            short[name] = short[name] + _apart(x, right[name]) / scale + by_share
    found = {}
    for name, x in parts(known, got.found):
        room = max(ROOM, 2 * CG_TARGET[s.torch_dtype] / unit) if _needs_system(s, name) else ROOM
        size = largest(finite(right[name]))
        least = ROOM * unit * (added.get(name.removesuffix(", no mass"), zero) + size)
        bound = room * moved[name] + STOP * short[name] + least
        if s.gradient == "unroll" and name.endswith("no mass"):
            bound = torch.where(_lost(s, t, known), torch.inf, bound)
        found[name] = _apart(x, right[name]), bound, size
    found["where nothing may go"] = _blocked(s, known, got), zero, zero
    if not s.partial:
        found["marginal_error"] = (*_claims(s, t, got, known), zero)
    return found


def _by_share(s: Setting, t: Tensors, name: str, right: Tensor, added: Tensors) -> Tensor:
    """What a number changes by, relative to the share of itself that a mass is off by, beside what the plan changes.

    The same plan belongs to masses a with potentials f, and to a' with f - eps log(a'/a). So potentials, and what
    holds a mass or a potential beside the plan, are those of the masses that were given.
    """
    eps = eps_of(s, t)
    if name.startswith(("f", "g")):
        return eps
    if not name.startswith("by "):
        return torch.zeros_like(eps)
    if s.output in ("transport_cost", "value", "divergence"):
        masses = name.startswith(("by a", "by b", "by log_"))
        return t["weight 0"].abs() * eps if masses else torch.zeros_like(eps)
    return torch.maximum(largest(finite(right)), added.get(name.removesuffix(", no mass"), eps * 0.0))


def _lost(s: Setting, t: Tensors, known: Truth) -> Tensor:
    """Where rounding of huge potentials has lost the unrolled gradient by the mass of a point without any."""
    most = torch.maximum(largest(known.ends[0].f), largest(known.ends[0].g))
    return most * 256 * torch.finfo(s.torch_dtype).eps > eps_of(s, t)


def _blocked(s: Setting, known: Truth, got: Run) -> Tensor:
    """The largest entry of the plan, and of a gradient by the cost, that has to be 0."""
    sides, barred = known.sides[0], known.costs[0] == torch.inf
    no_mass = (sides.a == 0).unsqueeze(-1) | (sides.b == 0).unsqueeze(-2)
    worst = torch.zeros_like(sides.a[:, 0])
    for name, where in (("plan", barred | no_mass), ("by cost", barred)):
        if name in got.found:
            worst = torch.maximum(worst, largest(torch.where(where, got.found[name].double(), 0.0)))
    return worst


def _claims(s: Setting, t: Tensors, got: Run, known: Truth) -> tuple[Tensor, Tensor]:
    """How far ``marginal_error`` is from that of the plan, and how far rounding may move it."""
    end, plan, unit = got.ends[0], known.plans[0], torch.finfo(s.torch_dtype).eps / 2
    sums = zip((end.rows, end.columns), _asked(s, t, end, known.sides[0]), strict=True)
    off = sum((logs.exp() - asked).abs().sum(-1) for logs, asked in sums)
    off = off / end.rows.exp().sum(-1) if s.relaxed else off
    mean = (plan * exponents(s, t, known, 0)).sum((-1, -2)) / plan.sum((-1, -2))
    softest = [rho for rho in strengths(s, t) if rho is not None]
    rate = 1 / eps_of(s, t) + sum(1 / rho for rho in softest)
    return (off - end.error.double()).abs(), ROOM * unit * (1 + 2 * mean * rate)
