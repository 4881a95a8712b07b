"""The rows of the table of capabilities: what a library is asked for, and how far its answer is from the true one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.cases import Case, Missing, slope, solution, truth

Check = Callable[[Any], float]
"""From a mode, or from a function of its own signature, to the largest relative error."""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        short: its name in the README; empty where that does not show it.
        asks: names the functions that are asked in place of a library's modes, where it has some.
        in_jax: the check of a library that computes in JAX, where that is another one.
    """

    title: str
    check: Check
    short: str = ""
    asks: str = ""
    in_jax: Check | None = None


# --- problems --------------------------------------------------------------------------------------------------------


def case(count: int = 1, n: int = 6, m: int = 5, **options: Any) -> Case:
    """Random points in the unit square with masses of total 1; ``dense`` gives their cost in place of them."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    x, y = draw(count, n, 2), draw(count, m, 2)
    a, b = (0.2 + draw(count, k) for k in (n, m))
    made = Case(a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True), x=x, y=y)
    if options.pop("dense", False):
        made = replace(made, cost=made.matrix(), x=None, y=None)
    return replace(made, **options)


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest entry; NaN where something is not finite."""
    if found.shape != wanted.shape:
        raise ValueError(f"the shape is {tuple(found.shape)}, not {tuple(wanted.shape)}")
    return float((found.detach() - wanted).abs().max() / wanted.abs().max())


def value_by_points(given: Case) -> Tensor:
    """The true gradient of the value by x."""
    x, y = given.points()
    plan = truth(given, "plan")
    return 2 * (plan.sum(-1, keepdim=True) * x - plan @ y)


def plan_or_value(way: Any, given: Case, exact: Case | None = None) -> float:
    """The error of the plan, or of the value where a mode returns no plan."""
    for name in ("plan", "value"):
        try:
            found = way(given, name)
        except Missing as missing:
            if name == "value" or not str(missing).startswith("returns no"):
                raise
            continue
        return off(found, truth(exact or given, name))
    raise AssertionError


def gradient(way: Any, given: Case, name: str, *by: str, exact: Callable[[Case], Tensor] | None = None) -> float:
    """The largest error of the derivatives of an output, in fixed random weights, along random directions.

    They are compared with differences of ``exact``, or of the true output. Directions in the masses keep their total,
    unless there are penalties. Points without mass keep none.
    """
    generator = torch.Generator().manual_seed(3)
    weights: Tensor | None = None
    worst = 0.0
    for field in by:
        at = torch.as_tensor(getattr(given, field), dtype=torch.float64)
        leaf = at.clone().requires_grad_()
        out = way(replace(given, **{field: leaf}), name)
        if weights is None:
            weights = torch.rand(out.shape, generator=generator, dtype=torch.float64)
        if not out.requires_grad:
            raise Missing(f"{name} has no gradient by {field}")
        (grad,) = torch.autograd.grad((weights * out).sum(), leaf, allow_unused=True)
        if grad is None:
            raise Missing(f"{name} has no gradient by {field}")
        if not grad.isfinite().all():
            return float("nan")

        def wanted(value: Tensor, field: str = field, weights: Tensor = weights) -> Tensor:
            changed = replace(given, **{field: value})
            return (weights * (truth(changed, name) if exact is None else exact(changed))).sum()

        pairs = []
        for _ in range(3):
            direction = torch.randn(at.shape, generator=generator, dtype=torch.float64)
            if field in ("a", "b"):
                direction = direction * at
                if given.rho_a is None and given.rho_b is None:
                    direction = direction - at * direction.sum(-1, keepdim=True)
            if field == "cost":
                direction = torch.where(at.isfinite(), direction, 0.0)
            pairs.append((float((grad * direction).sum()), float(slope(wanted, at, direction))))
        found, true = torch.tensor(pairs, dtype=torch.float64).T
        worst = max(worst, off(found, true))
    return worst


def first_of(way: Any, given: Case, *by: str, own: bool = False) -> float:
    """The error of the gradient of <T, C>, or of the value where a mode does not return that.

    ``own`` compares it with differences of what the mode itself returns, whatever its convention is.
    """

    def of(name: str) -> float:
        return gradient(way, given, name, *by, exact=(lambda changed: way(changed, name).detach()) if own else None)

    try:
        return of("cost")
    except Missing as missing:
        if not str(missing).startswith("returns no"):
            raise
        return of("value")


# --- rows ------------------------------------------------------------------------------------------------------------


def _without_mass(way: Any) -> float:
    given = case(2, 7, 6)
    a, b = given.a.clone(), given.b.clone()
    a[:, 2] = b[:, -1] = 0
    given = replace(given, a=a / a.sum(-1, keepdim=True), b=b / b.sum(-1, keepdim=True))
    parts = [replace(given, **{f: getattr(given, f)[k : k + 1] for f in ("a", "b", "x", "y")}) for k in (0, 1)]
    try:
        return max(plan_or_value(way, given), first_of(way, given, "a"))
    except Missing as missing:
        if "one problem" not in str(missing):
            raise
        return max(max(plan_or_value(way, part), first_of(way, part, "a")) for part in parts)


def _masks(way: Any) -> float:
    """What stands in the costs of points that are left out does not matter: here NaN."""
    given = case(2, 7, 6, dense=True)
    mask_x, mask_y = torch.ones_like(given.a, dtype=torch.bool), torch.ones_like(given.b, dtype=torch.bool)
    mask_x[0, 3:] = mask_y[1, 2:] = False
    assert given.cost is not None
    live = mask_x.unsqueeze(-1) & mask_y.unsqueeze(-2)
    a, b = (torch.where(mask, mass, 0.0) for mask, mass in ((mask_x, given.a), (mask_y, given.b)))
    exact = replace(given, a=a / a.sum(-1, keepdim=True), b=b / b.sum(-1, keepdim=True))
    left = torch.where(live, given.cost, torch.nan).requires_grad_()
    found = way(replace(exact, cost=left, mask_x=mask_x, mask_y=mask_y), "value")
    (grad,) = torch.autograd.grad(found.sum(), left)
    return max(off(found, truth(exact, "value")), off(grad, truth(exact, "plan")))


def _ragged(function: Any) -> float:
    sets = [case(1, n, m) for n, m in ((4, 6), (7, 3), (5, 5))]
    x, y = ([s.points()[k][0].clone().requires_grad_() for s in sets] for k in (0, 1))
    uniform = [replace(s, a=torch.ones_like(s.a) / s.a.shape[1], b=torch.ones_like(s.b) / s.b.shape[1]) for s in sets]
    found = function(x, y, 0.2)
    grads = torch.autograd.grad(found.sum(), x)
    worst = off(found, torch.cat([truth(s, "value") for s in uniform]))
    return max(worst, *(off(grad, value_by_points(s)[0]) for grad, s in zip(grads, uniform, strict=True)))


def _forbidden(way: Any) -> float:
    given = case(1, dense=True)
    assert given.cost is not None
    cost = given.cost.clone()
    cost[0, 0, 1:3] = cost[0, 4, 0] = torch.inf
    given = replace(given, cost=cost)
    return max(plan_or_value(way, given), first_of(way, given, "cost", "a"))


def _partial(way: Any) -> float:
    """The share arrives, no point sends or gets too much, and at small eps the cost is that of the exact problem.

    Libraries count the entropy of what stays behind in different ways, so that plans differ at larger eps.
    """
    from scipy.optimize import linprog

    given = case(1, share=0.6, eps=0.002, iterations=20_000)
    plan, cost, (n, m) = way(given, "plan").detach()[0], given.matrix()[0], (given.a.shape[1], given.b.shape[1])
    sums = torch.cat((torch.eye(n).repeat_interleave(m, 1), torch.eye(m).repeat(1, n)))
    most = torch.cat((given.a[0], given.b[0]))
    exact = linprog(cost.flatten().numpy(), sums.numpy(), most.numpy(), torch.ones(1, n * m).numpy(), [0.6]).fun
    sent = float((plan * cost).sum())
    # Entropy may cost as much as eps times its range.
    dear = max(0.0, sent - exact - 0.002 * float(torch.tensor(float(n * m)).log()), exact - sent) / exact
    over = float((torch.cat((plan.sum(1), plan.sum(0))) / most).max()) - 1
    return max(abs(float(plan.sum()) / 0.6 - 1), over, dear)


def _eps_each(way: Any) -> float:
    return plan_or_value(way, case(3, eps=torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64)))


def _by_eps(way: Any) -> float:
    return first_of(way, case(1, eps=torch.tensor(0.2, dtype=torch.float64)), "eps")


def _log_plan(way: Any) -> float:
    """One pair is so far that its share of the mass underflows, in float64."""
    given = case(1, dense=True)
    assert given.cost is not None
    cost = given.cost.clone()
    cost[0, 2, 3] += 400
    given = replace(given, cost=cost)
    try:
        return max(off(way(given, "log_plan"), truth(given, "log_plan")), gradient(way, given, "log_plan", "cost", "a"))
    except (Missing, AttributeError, KeyError):
        if not way(given, "plan").log().isfinite().all():
            raise Missing("returns no logarithm of the plan, which underflows") from None
        raise


def _started(way: Any) -> float:
    """From the solution itself it takes less than a third of the iterations."""
    given = case(1, 12, 9, eps=0.02)
    cold = way(given, "n_iter")
    f, g, _ = solution(given)
    warm_case = replace(given, start=(f, g))
    warm = way(warm_case, "n_iter")
    return max(off(way(warm_case, "plan"), truth(given, "plan")), 1.0 if 3 * float(warm) > float(cold) else 0.0)


def _twice(way: Any) -> float:
    """A product with the Hessian of the value by the points: the change of its gradient."""
    given = case(1)
    x, _ = given.points()
    leaf = x.clone().requires_grad_()
    direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (grad,) = torch.autograd.grad(way(replace(given, x=leaf), "value").sum(), leaf, create_graph=True)
    if not grad.requires_grad:
        raise Missing("the gradient has no gradient")
    (second,) = torch.autograd.grad((grad * direction).sum(), leaf)
    return off(second, slope(lambda x: value_by_points(replace(given, x=x)), x, direction))


def _twice_in_jax(function: Any) -> float:
    """The same by the cost, whose gradient is the plan."""
    given = case(1, dense=True)
    assert given.cost is not None
    direction = torch.randn(given.cost.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    second = (function(given) * direction).sum((-1, -2))[None]
    return off(second, slope(lambda cost: truth(replace(given, cost=cost), "plan"), given.cost, direction))


def _with_gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> list[Tensor]:
    leaf = at.clone().requires_grad_()
    out = function(leaf)
    return [out.detach(), *torch.autograd.grad(out.sum(), leaf)]


def _compiled(way: Any) -> float:
    """Value and gradient of one graph without breaks, beside those of the same mode as it is."""
    given = case(1, iterations=20)

    def value(a: Tensor) -> Tensor:
        return way(replace(given, a=a), "value")  # type: ignore[no-any-return]

    plain = _with_gradient(value, given.a)
    torch._dynamo.reset()
    one = _with_gradient(torch.compile(value, fullgraph=True, backend="aot_eager"), given.a)
    return max(off(x, y) for x, y in zip(one, plain, strict=True))


def _jitted(way: Any) -> float:
    given = case(1)
    return max(off(way(given, "value"), truth(given, "value")), gradient(way, given, "value", "a"))


def _vmapped_in_jax(way: Any) -> float:
    return gradient(way, case(3, dense=True), "value", "cost", "a")


def _vmapped(way: Any) -> float:
    """The gradient by the points of each of three problems, by ``vmap`` of ``grad``."""
    given = case(3)

    def value(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return way(replace(given, x=x[None], y=y[None], a=a[None], b=b[None]), "value")[0]  # type: ignore[no-any-return]

    found = torch.func.vmap(torch.func.grad(value))(*given.points(), given.a, given.b)
    return off(found, value_by_points(given))


def _batch(way: Any) -> float:
    return plan_or_value(way, case(3))


def _stream(grown: Callable[[], float]) -> float:
    """By how many costs a process grows in a call with its gradient: half of one is enough for what is not stored."""
    costs = grown()
    if costs > 0.5:
        raise Missing(f"memory grew by {costs:.2g} times the cost")
    return 0.0


def _unbalanced(rho_a: float | None, rho_b: float | None) -> Check:
    return lambda way: plan_or_value(way, case(1, rho_a=rho_a, rho_b=rho_b))


def _gradient(name: str, *by: str) -> Check:
    return lambda way: gradient(way, case(1), name, *by)


ROWS = {
    "batch": Row("a batch of problems in one call", _batch, "batch"),
    "without_mass": Row("points without mass, gradients finite", _without_mass),
    "masks": Row("masks", _masks, "masks"),
    "ragged": Row("sets of unequal sizes in one call", _ragged, "ragged sets", asks="ragged"),
    "forbidden": Row("forbidden pairs (infinite cost)", _forbidden, "forbidden pairs"),
    "unbalanced": Row("unbalanced", _unbalanced(0.5, 0.5), "unbalanced"),
    "semi": Row("unbalanced on one side", _unbalanced(0.5, None)),
    "two_penalties": Row("unbalanced, two penalties", _unbalanced(0.3, 0.8)),
    "unbalanced_gradient": Row(
        "unbalanced: gradient by points and masses",
        lambda way: first_of(way, case(1, rho_a=0.5, rho_b=0.5), "x", "a", "b", own=True),
    ),
    "partial": Row("partial transport of a given share", _partial, "partial"),
    "eps_each": Row("eps for each problem", _eps_each, "eps for each"),
    "by_eps": Row("gradient by eps", _by_eps, "gradient by eps"),
    "value_masses": Row("value: gradient by masses", _gradient("value", "a", "b")),
    "value_points": Row("value: gradient by points", _gradient("value", "x", "y")),
    "cost_masses": Row("⟨T, C⟩: gradient by masses", _gradient("cost", "a", "b")),
    "cost_points": Row("⟨T, C⟩: gradient by points", _gradient("cost", "x", "y")),
    "plan": Row("plan: gradient by points and masses", _gradient("plan", "x", "a")),
    "log_plan": Row("log-plan where the plan underflows", _log_plan, "log-plan"),
    "started": Row("warm start from potentials", _started, "warm start"),
    "stream": Row("squared distance of one large problem, cost not stored", _stream, asks="stream"),
    "twice": Row("second derivatives", _twice, "second derivatives", asks="twice", in_jax=_twice_in_jax),
    "compiled": Row("compiled as one graph, with gradient", _compiled, asks="compiled", in_jax=_jitted),
    "vmapped": Row("vmap of grad", _vmapped, asks="vmapped", in_jax=_vmapped_in_jax),
}
