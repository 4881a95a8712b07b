"""What the reference backend alone can get wrong: the linear system of its implicit gradient."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import random_problem, relative
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from otloss import sinkhorn
from otloss.backends import reference
from otloss.backends.protocol import Problem, Shift, Upstream

# MKL 2024.2's batched LU fails on a few matrices of this size, not on smaller ones or on one alone.
MORE_THREADS = """
import torch, otloss
torch.set_num_threads(1)
cost = torch.rand(4, 200, 200, dtype=torch.float64)
za = torch.randn(4, 200, dtype=torch.float64)
direction = torch.randn_like(cost), torch.randn_like(za)

def loss(cost, za):
    a = za.softmax(-1)
    return otloss.sinkhorn(cost, a, eps=0.2, tol=1e-12, max_iter=1000, backend="reference").transport_cost.sum()

def check():
    leaves = cost.clone().requires_grad_(), za.clone().requires_grad_()
    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss(*leaves), leaves), direction))
    ahead, behind = (loss(*(x + t * d for x, d in zip((cost, za), direction))) for t in (1e-5, -1e-5))
    difference = (ahead - behind) / 2e-5
    assert abs(slope - difference) < 1e-6 * abs(difference), (torch.get_num_threads(), slope, difference)

for threads in (1, 2, 1, 2):
    torch.set_num_threads(threads)
    check()
"""


def test_right_after_the_number_of_threads_goes_up() -> None:
    done = subprocess.run([sys.executable, "-c", MORE_THREADS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-3, 5e-3])
def test_a_plan_that_is_a_permutation_has_a_gradient(backend: str, eps: float, dtype: torch.dtype) -> None:
    """The columns' graph has no edges left, so the Schur complement is 0: the gradient by the cost is the plan."""
    order = torch.randperm(10)
    cost = (1 - torch.eye(10, dtype=dtype)[order] + 0.1 * torch.rand(10, 10, dtype=dtype)).requires_grad_()
    a = torch.full((10,), 0.1, dtype=dtype, requires_grad=True)
    out = sinkhorn(cost, a, eps=eps, tol=1e-5, max_iter=1000, backend=backend)
    by_cost, by_a = torch.autograd.grad(out.transport_cost, (cost, a))
    plan = torch.eye(10, dtype=dtype)[order] / 10
    assert relative(by_cost, plan) < 8 * torch.finfo(dtype).eps / eps + float(out.marginal_error)
    assert by_a.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(part, Tensor):
                self.bytes = max(self.bytes, part.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("n, m", [(8, 3000), (3000, 8), (1, 200_000), (200_000, 1)])
@pytest.mark.parametrize("twice", [False, True])
def test_a_gradient_takes_the_memory_of_a_plan(n: int, m: int, twice: bool) -> None:
    """The adjoint system has the size of the shorter side; with that of the longer one, 1 x 200,000 asks for 320 GB."""
    cost, a, b = torch.rand(1, n, m), torch.full((1, n), 1 / n), torch.full((1, m), 1 / m)
    problem, f, g = Problem(cost.requires_grad_(twice), None, a, b, 0.2), torch.rand(1, n), torch.rand(1, m)
    upstream = Upstream(torch.ones(1), torch.ones(1), a - 1 / n, b - 1 / m)
    with LargestTensor() as largest:
        gradients, residual = reference.implicit_gradient(problem, f, g, upstream, True, True)
        if twice:
            torch.autograd.grad(gradients.left.square().sum(), cost)
    assert largest.bytes == 8 * n * m  # the plan in float64
    assert residual.isfinite().all()


@pytest.mark.parametrize("n, m", [(2, 7), (7, 2), (1, 4)])
def test_either_side_gives_the_same_derivatives(n: int, m: int) -> None:
    """Through rows where there are few of them, through columns else: both against finite differences, and twice."""
    cost, a, b = random_problem(2, n=n, m=m)
    args = cost.requires_grad_(), a.log().requires_grad_(), b.log().requires_grad_()
    weight = torch.rand(n, m, dtype=torch.double)

    def loss(cost: Tensor, za: Tensor, zb: Tensor) -> Tensor:
        options = {"eps": 0.2, "tol": 1e-13, "max_iter": 10_000, "backend": "reference"}
        out = sinkhorn(cost, za.softmax(-1), zb.softmax(-1), **options)
        return out.transport_cost + (weight * out.plan).square().sum((-1, -2)) + out.f[..., 0] * out.g[..., -1]

    assert gradcheck(loss, args)
    assert gradgradcheck(loss, args, atol=1e-4)


def test_a_problem_and_its_transpose_have_one_gradient() -> None:
    """Also where a third of the columns has no mass."""
    cost, a, b = random_problem(3, n=9, m=40)
    b[:, ::3] = 0
    b /= b.sum(-1, keepdim=True)
    results = []
    for transposed in (False, True):
        left, p, q = (t.clone().requires_grad_() for t in ((cost.mT, b, a) if transposed else (cost, a, b)))
        out = sinkhorn(left, p, q, eps=0.05, tol=1e-12, max_iter=5000, backend="reference")
        loss = out.transport_cost.sum() + out.plan.square().sum()
        by_cost, *by_masses = torch.autograd.grad(loss, (left, p, q))
        results.append((by_cost.mT, *by_masses[::-1]) if transposed else (by_cost, *by_masses))
    for one, other in zip(*results, strict=True):
        assert relative(one, other) < 1e-9


@pytest.mark.parametrize("few", ["rows", "columns"])
def test_nearly_all_mass_on_one_of_few_points(few: str) -> None:
    """In float32. The heavy point's equation is rounded by more than the light one's equation holds altogether."""
    eps = 0.1
    cost, a, b = random_problem(8, n=2, m=30)
    a[:, 0], b[:, :3] = 1e-20, 1e-28
    cost, a, b = (cost, a, b) if few == "rows" else (cost.mT, b, a)
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    exact = Problem(cost, None, a, b, eps)
    f, g, *_, shift = reference.solve(exact, 2000, 1e-12)
    upstream, results = Upstream(torch.ones(8)), []
    for dtype in (torch.float64, torch.float32):
        problem = Problem(cost.to(dtype), None, a.to(dtype), b.to(dtype), eps)
        moved = Shift(shift.rows.to(dtype), shift.columns.to(dtype))
        up = Upstream(upstream.cost.to(dtype))
        got, _ = reference.implicit_gradient(problem, f.to(dtype), g.to(dtype), up, True, True, shift=moved)
        # By the masses up to the constant that normalising takes out.
        by_mass = [grad.double() - (p * grad.double()).sum(-1, keepdim=True) for p, grad in ((a, got.a), (b, got.b))]
        results.append((got.left, *by_mass))
    known = 16 * 2**-24 * 2 / eps  # an entry of the plan; a gradient to 1/eps times that
    assert all(relative(got, want) < known / eps for want, got in zip(*results, strict=True))
