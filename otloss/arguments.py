"""From the arguments of a call to a `Problem`: checks, dtypes, one batch dimension, masks, penalties, eps and start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from otloss.backends import choose_backend, get_backend
from otloss.backends.protocol import COLD, Given, Problem, Start
from otloss.checks import check_device, check_mask, check_strength, check_tensor, working_dtype
from otloss.compat import broadcast_shapes, has_values
from otloss.cost import COSTS, KINDS_IN_UNITS, centred, in_units
from otloss.partial import Slack, with_slack

__all__ = ["Arguments", "Described", "Ragged", "describe"]

#: A tensor; or of sets of different sizes a list of tensors or a nested tensor, until it is padded.
Ragged: TypeAlias = Tensor | Sequence[Tensor]

#: How far the totals of a and b may lie apart, relatively: a softmax over 10^5 points is off by 1e-5 in float32.
#: In half precision 2e-2.
MASS_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
MASSES = ("a", "log_a", "b", "log_b")
POTENTIALS = ("f of init", "g of init")
#: Arguments whose values are looked at here; those of the others are looked at in the operators.
VALUES = ("mask_x", "mask_y", "rho_a", "rho_b", "partial", "eps")


class Arguments(NamedTuple):
    """What a call says of its problems, beside the cost or the features."""

    eps: float | Tensor
    a: Ragged | None = None
    b: Ragged | None = None
    log_a: Ragged | None = None
    log_b: Ragged | None = None
    mask_x: Ragged | None = None
    mask_y: Ragged | None = None
    rho_a: float | Tensor | None = None
    rho_b: float | Tensor | None = None
    partial: float | Tensor | None = None
    init: tuple[Tensor, Tensor] | None = None


class Described(NamedTuple):
    """A problem, ready for the operators."""

    problem: Problem
    given: Given
    start: Start
    backend: str
    batch: torch.Size
    """The leading dimensions of every output."""
    unit: Tensor | None
    """What the outputs are to be multiplied by ``(B,)``, where eps is a tensor: costs are then in units of eps."""
    mask_x: Tensor | None
    """``(B, n)``: which points take part."""
    mask_y: Tensor | None
    """``(B, m)``."""
    slack: Slack | None = None
    """Of a partial problem, whose extension ``problem`` is."""


def _named(left: Tensor, right: Tensor | None, said: Arguments) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """Every tensor of a call by its name, with the shape that follows its leading dimensions. All are checked."""
    n, m = left.shape[-2], left.shape[-1] if right is None else right.shape[-2]
    named = {"cost" if right is None else "x": (left, tuple(left.shape[-2:]))}
    if right is not None:
        named["y"] = (right, tuple(right.shape[-2:]))
    for side, mass, log_mass in (("a", said.a, said.log_a), ("b", said.b, said.log_b)):
        if mass is not None and log_mass is not None:
            raise ValueError(f"give {side} or log_{side}, not both")
    masses: tuple[tuple[str, Any, int, str], ...] = (
        ("a", said.a, n, "(B, n)"),
        ("log_a", said.log_a, n, "(B, n)"),
        ("b", said.b, m, "(B, m)"),
        ("log_b", said.log_b, m, "(B, m)"),
    )
    for name, x, count, size in masses:
        if x is not None:
            check_tensor(name, x, 1, size)
            named[name] = (x, (count,))
    mask: Any
    for name, mask, count, size in (("mask_x", said.mask_x, n, "(B, n)"), ("mask_y", said.mask_y, m, "(B, m)")):
        if mask is not None:
            check_mask(name, mask, size)
            named[name] = (mask, (count,))
    init: Any = said.init
    if init is not None:
        if not isinstance(init, (tuple, list)) or len(init) != 2:
            got = f"{len(init)} of them" if isinstance(init, (tuple, list)) else type(init).__name__
            raise TypeError(f"init must be a pair of potentials (f, g), got {got}")
        if said.partial is not None:
            raise ValueError("give init or partial, not both: the potentials of what is not sent are not known")
        for name, potential, count, size in zip(POTENTIALS, init, (n, m), ("(B, n)", "(B, m)"), strict=True):
            check_tensor(name, potential, 1, size)
            named[name] = (potential.detach(), (count,))
    strengths = (("rho_a", said.rho_a), ("rho_b", said.rho_b), ("partial", said.partial), ("eps", said.eps))
    for name, strength in strengths:
        if strength is not None or name == "eps":
            check_strength(name, strength)
        if isinstance(strength, Tensor):
            named[name] = (strength, ())
    for name, (x, rest) in named.items():
        if len(rest) == 1 and x.shape[-1] != rest[0]:
            points = "cost" if right is None else "x" if name in ("a", "log_a", "mask_x") else "y"
            beside = f"{points} {tuple(named[points][0].shape)}"
            raise ValueError(
                f"{name} must have shape (B, {rest[0]}) or ({rest[0]},) beside {beside}, got {tuple(x.shape)}"
            )
    return named


def _batch(named: dict[str, tuple[Tensor, tuple[int, ...]]]) -> torch.Size:
    """The common leading dimensions."""
    shapes = [x.shape[: x.dim() - len(rest)] for x, rest in named.values()]
    if all(shape == shapes[0] or not shape for shape in shapes):
        return shapes[0]
    try:
        return broadcast_shapes(*shapes)
    except RuntimeError:
        got = ", ".join(f"{name} {tuple(x.shape)}" for name, (x, _) in named.items())
        raise ValueError(
            f"the leading dimensions must be broadcastable to each other, got {got}; {_fitting(named)}"
        ) from None


def _fitting(named: dict[str, tuple[Tensor, tuple[int, ...]]]) -> str:
    """Shapes that fit the tensor with most leading dimensions: of two such, the cost's or the features'."""
    most = max(named, key=lambda name: named[name][0].dim() - len(named[name][1]))
    x, rest_of_x = named[most]
    batch = tuple(x.shape[: x.dim() - len(rest_of_x)])
    wanted = [
        f"{name} {batch + rest}, {(1,) * len(batch) + rest} or {rest}"
        for name, (_, rest) in named.items()
        if name != most and (len(rest) < 2 or name == "cost")
    ]
    return f"beside {most} {tuple(x.shape)} take {', '.join(wanted)}"


def _spread(x: Tensor, batch: torch.Size, rest: tuple[int, ...]) -> Tensor:
    """``x`` for every problem of the batch, whose dimensions are joined into one; what all share is not copied."""
    if x.dim() == len(rest):
        return x.expand(math.prod(batch), *rest)
    if x.dim() != len(batch) + len(rest) or x.shape[: len(batch)] != batch:
        x = x.expand(*batch, *rest)
    return x if len(batch) == 1 else x.reshape(math.prod(batch), *rest)


def _mass(
    mass: Tensor | None, log_mass: Tensor | None, mask: Tensor | None, like: Tensor, count: int, n: int
) -> tuple[Tensor, str]:
    """Masses ``(B, n)``, and the form in which they were given, see `Given`."""
    if log_mass is not None:
        return log_mass if mask is None else torch.where(mask, log_mass, -torch.inf), "logs"
    if mass is not None:
        return mass if mask is None else torch.where(mask, mass, 0.0), "masses"
    if mask is None:
        return like.new_full((count, n), 1 / n), "uniform"
    share = mask.to(like.dtype)
    return share / share.sum(-1, keepdim=True), "uniform"


def _check_values(tensors: dict[str, Tensor]) -> None:
    """Raise unless masks keep a point and numbers are positive; only where that waits for no device or compiler."""
    for name, x in tensors.items():
        if not has_values(x):
            continue
        if x.dtype == torch.bool:
            kept = x.any(-1).flatten()
            if not bool(kept.all()):
                first = int(kept.int().argmin())
                raise ValueError(f"{name} must keep at least one point in every problem, unlike problem {first}")
        elif not bool(((x > 0) & x.isfinite()).all()):
            raise ValueError(f"{name} must be positive and finite in every problem, got {x.detach().tolist()}")


def _only(x: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """``x`` with 0 where a point takes no part, so that it does not matter what stood there."""
    return x if mask is None else torch.where(mask.unsqueeze(dim), x, 0.0)


def _each(value: float | Tensor | None, put: Tensor | None, like: Tensor, count: int) -> Tensor | None:
    """A number ``(B,)`` for each problem, from one for all problems or from what came as a tensor."""
    return put if value is None or isinstance(value, Tensor) else like.new_full((count,), float(value))


def _start(put: dict[str, Tensor], unit: Tensor | None) -> Start:
    """The potentials to start from: 0 where a mask leaves a point out, and in units of eps where costs are."""
    if POTENTIALS[0] not in put:
        return COLD
    f, g = (put[name] for name in POTENTIALS)
    if unit is not None:
        f, g = f / unit.detach().unsqueeze(-1), g / unit.detach().unsqueeze(-1)
    if "mask_x" in put:
        f = torch.where(put["mask_x"], f, 0.0)
    if "mask_y" in put:
        g = torch.where(put["mask_y"], g, 0.0)
    return Start(f, g)


def _cost_or_features(
    put: dict[str, Tensor], kind: str, makes_cost: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The cost, or the features that the backend makes it of, in units of eps; 0 where a mask leaves a point out."""
    mask_x, mask_y, unit = put.get("mask_x"), put.get("mask_y"), put.get("eps")
    if "cost" in put:
        cost = _only(_only(put["cost"], mask_x, -1), mask_y, -2)
    else:
        x, y = _only(put["x"], mask_x, -1), _only(put["y"], mask_y, -1)
        if kind == "sqeuclidean" and not (unit is None and mask_x is None and mask_y is None):
            # So points far from 0 are divided by eps without loss, and those left out lie among the others.
            x, y = centred(x.to(dtype), y.to(dtype), mask_x, mask_y)
            x, y = _only(x, mask_x, -1), _only(y, mask_y, -1)
        if makes_cost:
            return (x, y) if unit is None else in_units(kind, x, y, unit)
        cost = COSTS[kind](x, y)
    if unit is not None:
        # A forbidden pair must not make the gradient by eps NaN.
        allowed = cost != torch.inf
        cost = torch.where(allowed, torch.where(allowed, cost, 0.0) / unit[:, None, None], torch.inf)
    return cost, None


def describe(left: Tensor, right: Tensor | None, kind: str, said: Arguments, backend: str | None) -> Described:
    """The problem of a cost, or of two sets of features and the kind of their cost."""
    named = _named(left, right, said)
    check_device(**{name: x for name, (x, _) in named.items()})
    dtype = working_dtype(**{name: x for name, (x, _) in named.items() if x.dtype != torch.bool})
    batch, n, m = _batch(named), left.shape[-2], left.shape[-1] if right is None else right.shape[-2]
    _check_values({name: x for name, (x, _) in named.items() if name in VALUES})
    relaxed = said.rho_a is not None or said.rho_b is not None
    if relaxed and said.partial is not None:
        raise ValueError("give partial, or rho_a and rho_b, not both")
    chosen = choose_backend(backend, left.device.type, relaxed)

    made = KINDS_IN_UNITS[kind] if "eps" in named else kind
    # Whether the backend makes the cost of features.
    makes_cost = made in get_backend(chosen).KINDS and said.partial is None
    reads_half = makes_cost and "eps" not in named and get_backend(chosen).READS_HALF
    put: dict[str, Tensor] = {}
    for name, (x, rest) in named.items():
        stays = x.dtype in (dtype, torch.bool) or (reads_half and len(rest) == 2)
        put[name] = _spread(x if stays else x.to(dtype), batch, rest)
    mask_x, mask_y, unit = put.get("mask_x"), put.get("mask_y"), put.get("eps")
    left, right = _cost_or_features(put, kind, makes_cost, dtype)
    like, count = left if left.dtype == dtype else left.new_empty(0, dtype=dtype), left.shape[0]
    rho_a, rho_b, sent = (_each(getattr(said, k), put.get(k), like, count) for k in ("rho_a", "rho_b", "partial"))
    eps = 1.0 if isinstance(said.eps, Tensor) else float(said.eps)
    if unit is not None:  # the same problem, with costs and penalties in units of eps
        rho_a, rho_b = (None if rho is None else rho / unit for rho in (rho_a, rho_b))
    a, form_a = _mass(put.get("a"), put.get("log_a"), mask_x, like, count, n)
    b, form_b = _mass(put.get("b"), put.get("log_b"), mask_y, like, count, m)
    tolerance = max((MASS_TOLERANCE.get(named[k][0].dtype, 2e-2) for k in MASSES if k in named), default=1e-4)
    slack = None
    if sent is not None:
        a, b = (mass.exp() if form == "logs" else mass for mass, form in ((a, form_a), (b, form_b)))
        left, a, b, slack = with_slack(left, a, b, sent, tolerance)
        form_a = form_b = "masses"
    given = Given(form_a, form_b, tolerance, unit is not None)
    problem, start = Problem(left, right, a, b, eps, rho_a, rho_b, made), _start(put, unit)
    return Described(problem, given, start, chosen, batch, unit, mask_x, mask_y, slack)
