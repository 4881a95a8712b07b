"""``out.summary()``: each figure is its definition, and the text says them."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import random_problem

from otloss import ConvergenceWarning, cosine_sinkhorn, sinkhorn


def perplexity(shares: list[float]) -> float:
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


def test_figures_are_their_definitions(backend: str) -> None:
    cost, a, b = random_problem(3, n=6, m=4)
    a[:, 2], b[1, 0] = 0, 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    cost[0] /= 100  # converges sooner
    with pytest.warns(ConvergenceWarning):
        out = sinkhorn(cost.requires_grad_(), a, b, eps=0.02, tol=1e-9, max_iter=12, solver="plain", backend=backend)
    got, plan = out.summary(), out.plan.tolist()
    assert (got.problems, got.n, got.m) == (3, 6, 4)
    assert got.converged == int(out.converged.sum()) == 1
    assert (got.iterations, got.most_iterations) == (sorted(out.n_iter.tolist())[1], max(out.n_iter.tolist()))
    assert got.marginal_error == max(out.marginal_error.tolist())
    assert got.perplexity_a == pytest.approx(sum(map(perplexity, a.tolist())) / 3)
    assert got.perplexity_b == pytest.approx(sum(map(perplexity, b.tolist())) / 3)
    totals = [[sum(row) for row in problem] for problem in plan]
    of_rows = [
        sum(t * perplexity([p / t for p in row]) for row, t in zip(problem, total, strict=True) if t) / sum(total)
        for problem, total in zip(plan, totals, strict=True)
    ]
    assert got.perplexity_rows == pytest.approx(sum(of_rows) / 3)
    assert got.matched == pytest.approx(sum(map(sum, totals)) / 3) == pytest.approx(1, abs=1e-12)
    assert all(isinstance(figure, (int, float)) for figure in got)


def test_limits(backend: str) -> None:
    """A permutation sends each row to one column; at a large eps a row goes to all of them."""
    x = torch.eye(5)
    sharp, flat = (cosine_sinkhorn(x, x, eps=eps, backend=backend).summary() for eps in (0.01, 1e4))
    assert sharp.perplexity_rows == pytest.approx(1, abs=1e-6) and flat.perplexity_rows == pytest.approx(5, rel=1e-3)
    assert sharp.perplexity_a == flat.perplexity_b == pytest.approx(5, rel=1e-6)


def test_one_problem_and_none() -> None:
    assert sinkhorn(torch.rand(3, 4)).summary().problems == 1
    empty = sinkhorn(torch.rand(0, 3, 4)).summary()
    assert empty.problems == empty.converged == 0 and math.isnan(empty.marginal_error)
    assert "0 of 0 problems of 3 x 4" in str(empty)


def test_text() -> None:
    text = str(sinkhorn(torch.rand(2, 3, 4, 5), eps=0.5).summary())
    assert text.startswith("6 of 6 problems of 4 x 5 points converged in ")
    assert "perplexity: a 4 of 4, b 5 of 5" in text and text.endswith("mass matched: 1")


def test_leaves_the_plan_with_its_gradient() -> None:
    cost = torch.rand(3, 4, requires_grad=True)
    out = sinkhorn(cost)
    out.summary()
    out.plan[0, 0].backward()
    assert cost.grad is not None and cost.grad.any()
