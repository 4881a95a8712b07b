"""The calls of the soak test: a setting's verb or module, what it returns, and one gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

import otloss
from benchmarks.soak.problems import SENT, Tensors
from benchmarks.soak.settings import Setting
from otloss import assignment

POINTS = ("cost", "cost_xx", "cost_yy", "x", "y")
INPUTS = (*POINTS, "a", "b", "log_a", "log_b", "eps", "rho_a", "rho_b", "partial", "points")
#: The problems that a divergence is made of, and their weights.
TERMS = (("x", "y", 1.0), ("x", "x", -0.5), ("y", "y", -0.5))


class Ends(NamedTuple):
    """The marginals of a plan ``(B, n)`` and ``(B, m)`` as logarithms, in float64; under ``partial`` with the slack."""

    rows: Tensor
    columns: Tensor
    f: Tensor
    g: Tensor
    error: Tensor
    converged: Tensor
    n_iter: Tensor


@dataclass
class Run:
    """Outputs and gradients by name, one row a problem, and how the plans of its terms end."""

    found: Tensors
    ends: list[Ends]

    def of(self, here: slice | Tensor) -> Run:
        """Of some problems."""
        ends = [Ends(*(x[here] for x in end)) for end in self.ends]
        return Run({name: x[here] for name, x in self.found.items()}, ends)


def leaves(s: Setting, t: Tensors) -> Tensors:
    """The tensors that get a gradient in this mode, as leaves."""
    every = [name for name in INPUTS if name in t and (name != "partial" or s.partial == "tensor")]
    if s.gradient == "none":
        every = [name for name in every if name in (("points",) if s.output == "barycentric" else POINTS)]
    return {name: t[name].detach().requires_grad_() for name in every}


def arguments(s: Setting, t: Tensors) -> dict[str, Any]:
    """The keyword arguments of a call that all verbs take."""
    said: dict[str, Any] = {k: t[k] for k in ("a", "b", "log_a", "log_b", "mask_x", "mask_y") if k in t}
    said |= {"eps": t.get("eps", s.eps), "gradient": s.gradient, "solver": s.solver, "tol": s.tol}
    said["max_iter"] = s.max_iter
    for name, how, number in (
        ("rho_a", s.rho[0], s.rho_size),
        ("rho_b", s.rho[1], s.rho_size),
        ("partial", s.partial, SENT),
    ):
        if how:
            said[name] = t[name] if how == "tensor" else number
    if s.init:
        said["init"] = (t["f"], t["g"])
    return said


def _lists(t: dict[str, Any]) -> dict[str, Any]:
    """Padded tensors as lists of what the masks keep."""
    of = {"x": "mask_x", "a": "mask_x", "log_a": "mask_x", "y": "mask_y", "b": "mask_y", "log_b": "mask_y"}
    sizes = {name: t[name].sum(-1).tolist() for name in ("mask_x", "mask_y")}
    cut = {k: [row[:size] for row, size in zip(t[k], sizes[mask], strict=True)] for k, mask in of.items() if k in t}
    return {k: v for k, v in t.items() if not k.startswith("mask")} | cut


def solve(s: Setting, t: Tensors, backend: str) -> otloss.SinkhornOutput:
    """The call of the verb; of a divergence, that between the two sets."""
    said = arguments(s, t) | {name: t[name] for name in ("cost", "x", "y") if name in t} | {"backend": backend}
    if s.masked == "ragged":
        said = _lists(said)
    if s.kind == "dense":
        return otloss.sinkhorn(said.pop("cost"), **said)
    if s.verb == "cosine_sinkhorn":
        return otloss.cosine_sinkhorn(said.pop("x"), said.pop("y"), **said)
    return otloss.feature_sinkhorn(said.pop("x"), said.pop("y"), cost=s.kind, **said)


def divergence(s: Setting, t: Tensors, backend: str) -> Tensor:
    """The divergence ``(B,)``, by the module."""
    said = arguments(s, t)
    names = ("eps", "gradient", "solver", "tol", "max_iter", "rho_a", "rho_b")
    options = {name: said.pop(name) for name in names if name in said}
    options |= {"objective": "divergence", "reduction": "none", "backend": backend}
    said |= {name: t[name] for name in POINTS if name in t}
    if s.masked == "ragged":
        said = _lists(said)
    if s.kind == "dense":
        return otloss.SinkhornLoss(**options)(said.pop("cost"), **said)
    return otloss.FeatureSinkhornLoss(s.kind, **options)(said.pop("x"), said.pop("y"), **said)


def term(s: Setting, t: Tensors, left: str, right: str) -> tuple[Setting, Tensors]:
    """The problem between two sets of a divergence, as a problem of its own."""
    if (left, right) == ("x", "y"):
        return s, t
    of = {"x": ("a", "mask_x", 0, s.n), "y": ("b", "mask_y", 1, s.m)}
    (a, mask_x, i, n), (b, mask_y, j, m) = of[left], of[right]
    names = {"x": left, "y": right, "cost": f"cost_{left}{right}", "mask_x": mask_x, "mask_y": mask_y, "eps": "eps"}
    names |= {"a": a, "b": b, "log_a": f"log_{a}", "log_b": f"log_{b}"}
    inner = {to: t[name] for to, name in names.items() if name in t}
    return replace(s, n=n, m=m, masses=(s.masses[i], s.masses[j]), init=""), inner


def terms(s: Setting) -> tuple[tuple[str, str, float], ...]:
    """The problems that are solved, and their weights."""
    return TERMS if s.divergence else TERMS[:1]


def _filled(x: Tensor, *sizes: int, value: float = 0.0) -> Tensor:
    """Lists are padded to the longest of the call. This pads on, to the setting's sizes."""
    missing = [size - have for size, have in zip(sizes, x.shape[1:], strict=True)]
    return pad(x, [k for size in reversed(missing) for k in (0, size)], value=value) if any(missing) else x


def ends(s: Setting, out: otloss.SinkhornOutput) -> Ends:
    """The marginals of its plan, summed in float64, also where its entries underflow."""
    more = 1 if s.partial else 0
    with torch.no_grad():
        logs = out._matrix(assignment.log_plan).double()
        if not more:
            logs = _filled(logs, s.n, s.m, value=-torch.inf)
        f, g = _filled(out.f.detach().double(), s.n), _filled(out.g.detach().double(), s.m)
        return Ends(logs.logsumexp(-1), logs.logsumexp(-2), f, g, out.marginal_error, out.converged, out.n_iter)


def outputs(s: Setting, t: Tensors, out: otloss.SinkhornOutput) -> Tensors:
    """Every output by name, with its gradient."""
    found = {
        "transport_cost": out.transport_cost,
        "value": out.value,
        "plan": _filled(out.plan, s.n, s.m),
        "log_plan": _filled(out.log_plan, s.n, s.m, value=-torch.inf),
        "f": _filled(out.f, s.n),
        "g": _filled(out.g, s.m),
    }
    if s.output == "barycentric":
        found["barycentric"] = _filled(otloss.barycentric(out, t["points"][:, : out.plan.shape[-1]]), s.n, 3)
    return found


def loss(s: Setting, t: Tensors, found: Tensors) -> Tensor:
    """A random linear function of the output that is differentiated."""
    if s.output == "potentials":
        return (t["weight 0"] * found["f"]).sum() + (t["weight 1"] * found["g"]).sum()
    shown = found[s.output]
    return (t["weight 0"] * torch.where(shown == -torch.inf, 0.0, shown)).sum()


def by_name(given: Tensors, total: Tensor, more: tuple[Tensor, ...] = ()) -> tuple[Tensors, list[Tensor | None]]:
    """The gradients by the leaves that have one, and those by further tensors."""
    grads = torch.autograd.grad(total, (*given.values(), *more), allow_unused=True)
    found = {f"by {name}": g for name, g in zip(given, grads, strict=False) if g is not None}
    return found, list(grads[len(given) :])


def run(s: Setting, t: Tensors, backend: str) -> Run:
    """What the call returns, and the gradients of one output."""
    given = leaves(s, t)
    t = t | given
    if s.divergence:
        found = {"divergence": divergence(s, t, backend)}
        with torch.no_grad():  # the same problems once more, for their plans
            each = [term(s, t, left, right) for left, right, _ in terms(s)]
            ended = [ends(one, solve(one, its, backend)) for one, its in each]
    else:
        out = solve(s, t, backend)
        found, ended = outputs(s, t, out), [ends(s, out)]
    grads, _ = by_name(given, loss(s, t, found))
    return Run({name: x.detach() for name, x in (found | grads).items()}, ended)
