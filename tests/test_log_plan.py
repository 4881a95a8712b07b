"""``out.log_plan``: right and finite where the plan underflows, with an exact gradient; -inf where there is no mass.

The problems with far points have a cost of 9 between the ends of a line and eps 0.01, so that log T reaches -900, which
neither float32 nor float64 can hold as a mass. Neighbours lie near enough to hold the line together.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import random_problem, relative
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from otloss import ConvergenceWarning, cosine_sinkhorn, sinkhorn
from otloss.backends import triton

EXACT = {"eps": 0.2, "tol": 1e-13, "max_iter": 10_000}
FAR = {"eps": 0.01, "tol": 1e-11, "max_iter": 20_000}


def line(n: int = 12, m: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances of points on a line of length 3, and logits of masses."""
    x, y = torch.linspace(0, 3, n, dtype=torch.double), torch.linspace(0, 3, m, dtype=torch.double)
    cost = (x[:, None] - y).square()
    return cost.requires_grad_(), *(torch.randn(k, dtype=torch.double).requires_grad_() for k in (n, m))


def of(backend: str, **options: object) -> Callable[..., Tensor]:
    return lambda cost, za, zb: sinkhorn(
        cost, za.softmax(-1), log_b=zb.log_softmax(-1), **{**EXACT, "backend": backend, **options}
    ).log_plan


def test_is_the_logarithm_of_the_plan(backend: str) -> None:
    cost, a, b = random_problem(2, 3, n=6, m=5)
    out = sinkhorn(cost, a, b, **EXACT, backend=backend)
    assert out.log_plan.shape == (2, 3, 6, 5)
    # A logarithm of size 10 at most, with potentials and costs of size 1 over eps: rounding of a few of these.
    assert torch.allclose(out.log_plan, out.plan.log(), atol=64 * 2**-53 * 10)
    x, y = torch.randn(2, 6, 3, dtype=torch.double), torch.randn(2, 5, 3, dtype=torch.double)
    out = cosine_sinkhorn(x, y, a[:, 0], backend=backend)
    assert torch.allclose(out.log_plan, out.plan.log(), atol=64 * 2**-53 * 20)


def test_gradient(backend: str) -> None:
    cost, a, b = random_problem(2, n=5, m=4)
    args = cost.requires_grad_(), a.log().requires_grad_(), b.log().requires_grad_()
    assert gradcheck(of(backend), args)


def test_gradient_by_features(backend: str) -> None:
    args = tuple(torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((5, 3), (4, 3), (5,), (4,)))

    def function(x: Tensor, y: Tensor, za: Tensor, zb: Tensor) -> Tensor:
        return cosine_sinkhorn(x, y, za.softmax(-1), zb.softmax(-1), **EXACT, backend=backend).log_plan

    assert gradcheck(function, args)


def test_second_derivative() -> None:
    cost, a, b = random_problem(n=3, m=4)
    args = cost.requires_grad_(), a.log().requires_grad_(), b.log().requires_grad_()
    assert gradgradcheck(of("reference"), args, atol=1e-4)


def test_gradient_where_the_plan_underflows(backend: str) -> None:
    args = line()
    out = sinkhorn(args[0], args[1].softmax(-1), args[2].softmax(-1), **FAR, backend=backend)
    assert (out.plan == 0).any() and out.log_plan.isfinite().all() and out.log_plan.min() < -745
    # A step of 1e-6 changes log T by 1e-6/eps, and the third derivative is 1/eps^3 at most: an error of 1e-12/6/eps^3.
    assert gradcheck(of(backend, **FAR), args, fast_mode=True)


def test_a_loss_over_known_matches_trains(backend: str) -> None:
    """-sum log T over pairs that the plan has given up: its gradient moves mass there; that of plan.log() is NaN."""
    cost, a, b = (t.detach() for t in line())
    cost, rows = cost.float().requires_grad_(), torch.arange(11)
    out = sinkhorn(cost, a.float().softmax(-1), b.float().softmax(-1), eps=0.01, tol=1e-4, backend=backend)
    loss = -out.log_plan[rows, 10 - rows].mean()
    (grad,) = torch.autograd.grad(loss, cost, retain_graph=True)
    assert loss.isfinite() and grad.isfinite().all() and (grad[rows, 10 - rows].sum() > 0)
    with pytest.warns(ConvergenceWarning, match="linear system"):
        (bad,) = torch.autograd.grad(-out.plan.log()[rows, 10 - rows].mean(), cost)
    assert not bad.isfinite().all()


@pytest.mark.parametrize("n, m", [(9, 70), (70, 9), (33, 40)])
def test_float32_follows_float64(backend: str, n: int, m: int) -> None:
    """An entry is known to u (|f| + |g| + |C|)/eps and 10 tol, the gradient to 1/eps times that (test_offsets.py)."""
    eps, tol = 0.3, 1e-6
    cost, a, b = random_problem(2, n=n, m=m)
    pairs = (slice(None), torch.arange(min(n, m)), torch.arange(min(n, m)))
    found = []
    for dtype, which in ((torch.float64, "reference"), (torch.float32, backend)):
        args = [t.to(dtype).requires_grad_() for t in (cost, a.log(), b.log())]
        out = sinkhorn(args[0], args[1].softmax(-1), args[2].softmax(-1), eps=eps, tol=tol, backend=which)
        loss = -out.log_plan[pairs].mean(-1).sum()
        found.append((out.log_plan.detach(), *torch.autograd.grad(loss, args)))
    known = 10 * tol + 16 * 2**-24 * 2 / eps
    (exact, *want), (log_t, *got) = found
    assert float((log_t - exact).abs().max()) < known + 4 * 2**-24 * float(exact.abs().max())
    for one, other in zip(got, want, strict=True):
        assert relative(one, other) < known / eps


def test_no_mass_is_minus_infinity_with_gradient_zero(backend: str) -> None:
    """The pairs that have mass: value and gradient are those of the problem without the others."""
    cost, a, b = random_problem(2, n=6, m=5)
    rows, columns = [0, 2, 3, 5], [1, 2, 4]
    keep_a, keep_b = torch.zeros(6, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
    keep_a[rows], keep_b[columns] = True, True
    both = keep_a[:, None] & keep_b
    cost.requires_grad_()
    za, zb = a.log().requires_grad_(), b.log().requires_grad_()

    def log_plan(c: Tensor, za: Tensor, zb: Tensor) -> Tensor:
        return sinkhorn(
            c, log_a=za.log_softmax(-1), log_b=zb.log_softmax(-1), **EXACT, backend=backend
        ).log_plan

    got = log_plan(cost, za.masked_fill(~keep_a, -torch.inf), zb.masked_fill(~keep_b, -torch.inf))
    assert torch.equal(got == -torch.inf, ~both.expand_as(got)) and got[:, both].isfinite().all()
    weight = torch.rand(6, 5, dtype=torch.double)
    losses = (got[:, both] * weight[both]).sum(), torch.where(both, got, 0.0).mul(weight).sum(), (weight * got).sum()
    crop = log_plan(cost[:, rows][..., columns], za[:, rows], zb[:, columns])
    want = torch.autograd.grad((crop * weight[rows][:, columns]).sum(), (cost, za, zb))
    for loss in losses:  # the last is -inf itself
        for one, other in zip(torch.autograd.grad(loss, (cost, za, zb), retain_graph=True), want, strict=True):
            assert torch.allclose(one, other, atol=1e-9)


def test_a_forbidden_pair_is_finite(backend: str) -> None:
    cost = torch.rand(4, 4)
    cost[0, 1] = torch.finfo(torch.float32).max
    cost.requires_grad_()
    out = sinkhorn(cost, backend=backend)
    assert out.plan[0, 1] == 0 and out.log_plan.isfinite().all()
    assert out.log_plan[0, 1] == torch.finfo(torch.float32).min
    (grad,) = torch.autograd.grad(out.log_plan.mean(), cost)
    assert grad.isfinite().all()


def test_large_offsets_cost_no_digits(backend: str) -> None:
    cost, a, b = random_problem(2, n=20, m=18, dtype=torch.float32)
    plain, moved = (
        sinkhorn(c, a, b, eps=0.3, tol=1e-6, backend=backend).log_plan for c in (cost, (cost + 2.0**13) - 2.0**13)
    )
    offset = sinkhorn(cost + 2.0**13, a, b, eps=0.3, tol=1e-6, backend=backend).log_plan
    # The offset rounds the cost itself; the problem made of the rounded one is the same.
    assert float((offset - moved).abs().max()) < 2e-5 + 32 * 2**-24 * 2 / 0.3
    assert float((plain - moved).abs().max()) > 1e-4


@pytest.mark.parametrize("gradient", ["unroll", "none"])
def test_is_a_constant_in_other_modes(backend: str, gradient: str) -> None:
    cost, a, b = random_problem(n=4, m=5)
    out = sinkhorn(cost.requires_grad_(), a.requires_grad_(), b, gradient=gradient, backend=backend, max_iter=2000)
    assert not out.log_plan.requires_grad and torch.allclose(out.log_plan, out.plan.log(), atol=1e-11)


def test_is_built_once_and_from_an_unchanged_cost() -> None:
    cost = torch.rand(4, 5)
    out, other = sinkhorn(cost.requires_grad_()), sinkhorn(cost)
    with torch.no_grad():
        assert not out.log_plan.requires_grad
    assert out.log_plan.requires_grad and out.log_plan is out.log_plan
    with torch.no_grad():
        cost.mul_(2)
    with pytest.raises(RuntimeError, match="the cost was changed in place"):
        _ = other.log_plan


def test_under_autocast_and_transforms() -> None:
    cost, a, _ = random_problem(3, n=4, m=5, dtype=torch.float32)

    def loss(cost: Tensor, a: Tensor) -> Tensor:
        return -sinkhorn(cost, a, eps=0.1).log_plan.diagonal(dim1=-2, dim2=-1).mean()

    want = torch.func.grad(lambda c: loss(c, a))(cost)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.func.grad(lambda c: loss(c, a))(cost), want)
    each = torch.func.vmap(torch.func.grad(loss))(cost, a) / 3
    assert relative(each, want) < 1e-5
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert abs(float(compiled(cost, a) - loss(cost, a))) < 1e-5


IN_THE_INTERPRETER = """
import torch, otloss
torch.manual_seed(0)
cost, za, zb = torch.rand(2, 9, 6), torch.randn(2, 9), torch.randn(2, 6)
y = torch.randn(2, 6, 3)
results = []
for dtype, backend in ((torch.float64, "reference"), (torch.float32, "triton")):
    leaves = [t.to(dtype).requires_grad_() for t in (cost, za, zb)]
    out = otloss.sinkhorn(leaves[0], leaves[1].softmax(-1), leaves[2].softmax(-1), eps=0.3, tol=1e-6, backend=backend)
    parts = out.log_plan, otloss.barycentric(out, y.to(dtype))
    loss = sum(part.square().mean() for part in parts)
    results.append((*parts, *torch.autograd.grad(loss, leaves), otloss.assign(out, mutual=True)))
for exact, got in zip(*results):
    # As in float32 on the other backends: 10 tol + 16 u 2/eps for an entry, 1/eps times that for a gradient.
    assert got.isfinite().all() and (got - exact).abs().max() < 6e-5 * exact.abs().max(), (got - exact).abs().max()
"""


@pytest.mark.skipif(
    find_spec("triton") is None or bool(triton._TOO_OLD or triton._MISFIT), reason="no interpreter of Triton runs here"
)
def test_in_tritons_interpreter() -> None:
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-c", IN_THE_INTERPRETER],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
