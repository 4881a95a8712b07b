"""Validation against POT, and the cases in which peers go wrong, judged by finite differences.

Where a peer is wrong, the test asserts that *ours* agrees with finite differences and records the peer's number next to
it; it does not assert that the peer stays wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import ot
import ot.batch
import pytest
import torch
from conftest import random_problem, relative
from torch import Tensor

from otloss import sinkhorn

# Problems (202 in all), n, m, eps, span of the cost, most iterations. At the smallest eps the span is kept to 20
# eps, else single problems out of sixty need 10^5 iterations, through all of which POT would be differentiated;
# `test_small_eps_against_emd` has the rest.
GROUPS = [
    (60, 8, 11, 0.005, 0.1, 2000),
    (50, 20, 16, 0.02, 0.4, 2000),
    (40, 49, 64, 0.05, 1.0, 1000),
    (30, 128, 96, 0.1, 1.0, 300),
    (18, 200, 257, 0.3, 1.0, 80),
    (4, 512, 384, 1.0, 2.0, 20),
]
Solved = tuple[Tensor, Tensor, Tensor, list[Tensor]]


def _objective(cost: Tensor, value: Tensor) -> Tensor:
    return cost.sum() + 0.5 * value.sum()


@functools.lru_cache
def _pot(group: int) -> tuple[tuple[Tensor, Tensor, Tensor], Solved]:
    """A group's problem and POT's cost, value, plan and autodiff gradients by cost and the marginals' logits."""
    batch, n, m, eps, span, iterations = GROUPS[group]
    torch.manual_seed(group)
    cost, a, b = random_problem(batch, n=n, m=m)
    leaves = [t.requires_grad_() for t in (span * cost, a.log(), b.log())]
    a, b = leaves[1].softmax(-1), leaves[2].softmax(-1)
    res = ot.batch.solve_batch(
        leaves[0], eps, a, b, max_iter=iterations, tol=1e-11, method="log_sinkhorn", reg_type="kl", grad="autodiff"
    )
    kl = (res.plan * (res.plan / (a[:, :, None] * b[:, None, :])).log()).sum((-1, -2))
    value = res.value_linear + eps * kl
    grads = torch.autograd.grad(_objective(res.value_linear, value), leaves)
    inputs = tuple(leaf.detach() for leaf in leaves)
    return inputs, (res.value_linear.detach(), value.detach(), res.plan.detach(), list(grads))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_agrees_with_pot(
    backend: str, group: int, dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    (cost, za, zb), (pot_cost, pot_value, pot_plan, pot_grads) = _pot(group)
    batch, n, m, eps, span, iterations = GROUPS[group]
    leaves = [t.to(dtype).requires_grad_() for t in (cost, za, zb)]
    tol = 1e-11 if dtype == torch.float64 else 1e-6
    out = sinkhorn(
        leaves[0], leaves[1].softmax(-1), leaves[2].softmax(-1), eps=eps, tol=tol, max_iter=iterations, backend=backend
    )
    grads = torch.autograd.grad(_objective(out.transport_cost, out.value), leaves)
    cost, value, plan = (part.detach() for part in (out.transport_cost, out.value, out.plan))
    errors = {
        "cost": float(((cost - pot_cost) / pot_cost).abs().max()),
        "value": float(((value - pot_value) / pot_value).abs().max()),
        "plan": float((plan - pot_plan).abs().sum((-1, -2)).max()),
        "gradient": max(relative(one, other) for one, other in zip(grads, pot_grads, strict=True)),
    }
    found = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    record_property("against POT", f"{backend} {dtype}, {batch} of {n}x{m}, eps {eps}, span {span}: {found}")
    if dtype == torch.float64:
        bounds = {"cost": 1e-7, "value": 1e-7, "plan": 1e-6, "gradient": 1e-5}
    else:  # a rounding of the potentials and the cost moves every exponent by a few 2^-24 / eps
        rounding = 2**-24 / eps
        bounds = {"cost": 1e-5 + 4 * rounding, "value": 1e-5 + 4 * rounding, "plan": 1e-5 + 20 * rounding}
        bounds["gradient"] = 1e-3
    assert {name: error for name, error in errors.items() if error > bounds[name]} == {}


def test_agrees_with_pot_single_problem(backend: str) -> None:
    cost, a, b = random_problem(n=37, m=52)
    plan = ot.sinkhorn(a.numpy(), b.numpy(), cost.numpy(), 0.05, method="sinkhorn_log", numItermax=20000, stopThr=1e-13)
    out = sinkhorn(cost, a, b, eps=0.05, tol=1e-12, max_iter=20000, backend=backend)
    assert float((out.plan - torch.from_numpy(plan)).abs().sum()) < 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_small_eps_against_emd(backend: str, seed: int) -> None:
    """The sharp cost tends to the unregularised one from above, by at most eps log(n m)."""
    torch.manual_seed(seed)
    cost, a, b = random_problem(n=30, m=24)
    exact = ot.emd2(a.numpy(), b.numpy(), cost.numpy())
    gaps = []
    for eps in (0.02, 0.005):
        out = sinkhorn(cost, a, b, eps=eps, tol=1e-9, max_iter=100_000, backend=backend)
        gaps.append(float(out.transport_cost) - exact)
        assert -1e-8 < gaps[-1] < eps * np.log(30 * 24)
    assert gaps[1] < gaps[0]


def difference_quotient(loss: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor, step: float = 1e-5) -> float:
    with torch.no_grad():
        return float(loss(at + step * direction) - loss(at - step * direction)) / (2 * step)


EXACT = {"tol": 1e-13, "max_iter": 100_000}


def test_value_by_learned_marginals_where_pots_kl_envelope_errs(
    backend: str, record_property: Callable[[str, object], None]
) -> None:
    """POT 0.9.7: ot.solve(reg_type="KL", grad="envelope") sets reg * log u where KL needs reg * (log u - log a)."""
    cost, a, b = random_problem(n=6, m=5)
    direction = torch.zeros(6, dtype=torch.float64)
    direction[0], direction[3] = 1, -1
    eps = 0.2
    a.requires_grad_()
    true = difference_quotient(
        lambda a: sinkhorn(cost, a, b, eps=eps, **EXACT, backend="reference").value, a, direction
    )
    (ours,) = torch.autograd.grad(sinkhorn(cost, a, b, eps=eps, **EXACT, backend=backend).value, a)
    assert float(ours @ direction) == pytest.approx(true, rel=1e-6)
    (pots,) = torch.autograd.grad(ot.solve(cost, a, b, reg=eps, reg_type="KL", grad="envelope").value, a)
    record_property("POT's envelope", float(pots @ direction))
    record_property("finite difference", true)


@pytest.mark.parametrize("mode", ["envelope", "last_step", "autodiff"])
def test_sharp_cost_by_cost_where_pot_errs_outside_autodiff(
    backend: str, mode: str, record_property: Callable[[str, object], None]
) -> None:
    """The plan moves with the cost; POT's envelope and last_step return a gradient without saying that it is off."""
    cost, a, b = random_problem(n=6, m=5)
    direction = torch.zeros_like(cost)
    direction[0, 1] = 1
    eps = 0.2
    true = difference_quotient(
        lambda c: sinkhorn(c, a, b, eps=eps, **EXACT, backend="reference").transport_cost, cost, direction
    )
    cost.requires_grad_()
    (ours,) = torch.autograd.grad(sinkhorn(cost, a, b, eps=eps, **EXACT, backend=backend).transport_cost, cost)
    assert float(ours[0, 1]) == pytest.approx(true, rel=1e-6)
    res = ot.batch.solve_batch(cost[None], eps, a[None], b[None], method="log_sinkhorn", grad=mode, tol=1e-12)
    if res.value_linear.requires_grad:
        (pots,) = torch.autograd.grad(res.value_linear.sum(), cost)
        record_property(f"POT's {mode}", float(pots[0, 1]))
    record_property("finite difference", true)


def test_zero_mass_where_pots_autodiff_is_nan(backend: str, record_property: Callable[[str, object], None]) -> None:
    cost, a, b = random_problem(n=5, m=4)
    a[2] = 0
    a = (a / a.sum()).requires_grad_()
    direction = torch.tensor([-1.0, 0, 1, 0, 0], dtype=torch.float64)

    def loss(a: Tensor) -> Tensor:
        return sinkhorn(cost, a, b, eps=0.2, **EXACT, backend=backend).transport_cost

    (ours,) = torch.autograd.grad(loss(a), a)
    step = 1e-5
    with torch.no_grad():  # one-sided, of second order
        true = float(-3 * loss(a) + 4 * loss(a + step * direction) - loss(a + 2 * step * direction)) / (2 * step)
    assert float(ours @ direction) == pytest.approx(true, rel=1e-5)
    res = ot.batch.solve_batch(cost[None], 0.2, a[None], b[None], method="log_sinkhorn", grad="autodiff", max_iter=100)
    (pots,) = torch.autograd.grad(res.value_linear.sum(), a)
    record_property("POT's gradient at the empty row", float(pots[2]))


def test_value_by_cost_where_geomloss_doubles_it(backend: str, record_property: Callable[[str, object], None]) -> None:
    """geomloss 0.3.1's new API returns twice the gradient by the cost; dV/dC is the plan."""
    geomloss_ot = pytest.importorskip("geomloss.ot", reason="geomloss is not installed")
    cost, a, b = random_problem(n=6, m=5)
    cost.requires_grad_()
    out = sinkhorn(cost, a, b, eps=0.2, **EXACT, backend=backend)
    (ours,) = torch.autograd.grad(out.value, cost, retain_graph=True)
    direction = torch.zeros_like(cost)
    direction[1, 2] = 1
    true = difference_quotient(
        lambda c: sinkhorn(c, a, b, eps=0.2, **EXACT, backend="reference").value, cost.detach(), direction
    )
    assert float(ours[1, 2]) == pytest.approx(true, rel=1e-6) and torch.allclose(ours, out.plan, atol=1e-10)
    theirs = geomloss_ot.solve_batch(cost[None], reg=0.2, a=a[None], b=b[None], max_iter=200)
    (gradient,) = torch.autograd.grad(theirs.value.sum(), cost)
    record_property("geomloss's gradient", float(gradient[1, 2]))
    record_property("finite difference", true)
