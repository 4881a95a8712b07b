"""What the reference backend alone can get wrong: the linear system of its implicit gradient."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import relative

from otloss import sinkhorn

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
