"""Identities that every solution obeys, for random problems on every backend at sizes across block boundaries."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from otloss import cosine_sinkhorn, sinkhorn

SIZES = st.one_of(st.integers(1, 40), st.sampled_from([47, 48, 49, 63, 64, 65, 127, 129, 191, 257, 600]))
EPS = st.sampled_from([0.01, 0.05, 0.2, 1.0])
fixed = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def problem(seed: int, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    return 2 * uniform(n, m), (4 * uniform(n)).softmax(-1), (4 * uniform(m)).softmax(-1)


def solve(cost: Tensor, a: Tensor, b: Tensor, eps: float, backend: str, **options: object):  # type: ignore[no-untyped-def]
    # A fixed number of iterations: the identities hold for each iterate, not only in the limit.
    return sinkhorn(cost, a, b, eps=eps, **({"max_iter": 30, "tol": 0.0, "backend": backend} | options))


@fixed
@given(seed=st.integers(0, 10**6), n=SIZES, m=SIZES, eps=EPS)
def test_agrees_with_the_reference(kernel_backend: str, seed: int, n: int, m: int, eps: float) -> None:
    cost, a, b = problem(seed, n, m)
    leaves, grads, outs = [], [], []
    for which in ("reference", kernel_backend):
        leaves = [t.clone().requires_grad_() for t in (cost, a, b)]
        out = solve(*leaves, eps, which, max_iter=1000, tol=1e-9)
        outs.append(out)
        grads.append(torch.autograd.grad(out.transport_cost + out.value + out.plan.square().sum(), leaves))
    assert torch.allclose(outs[0].f, outs[1].f, atol=1e-9) and torch.allclose(outs[0].g, outs[1].g, atol=1e-9)
    assert abs(int(outs[0].n_iter) - int(outs[1].n_iter)) <= 1
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-6 * float(one.abs().max()))


@fixed
@given(seed=st.integers(0, 10**6), n=SIZES, m=SIZES, eps=EPS)
def test_permuting_rows_and_columns_permutes_the_plan(backend: str, seed: int, n: int, m: int, eps: float) -> None:
    cost, a, b = problem(seed, n, m)
    rows, columns = torch.randperm(n), torch.randperm(m)
    plain = solve(cost, a, b, eps, backend)
    permuted = solve(cost[rows][:, columns], a[rows], b[columns], eps, backend)
    assert torch.allclose(permuted.plan, plain.plan[rows][:, columns], atol=1e-12)


@fixed
@given(seed=st.integers(0, 10**6), n=SIZES, m=SIZES, eps=EPS)
def test_swapping_the_sides_transposes_the_solution(backend: str, seed: int, n: int, m: int, eps: float) -> None:
    cost, a, b = problem(seed, n, m)
    plain = solve(cost, a, b, eps, backend, max_iter=1000, tol=1e-10)
    swapped = solve(cost.T, b, a, eps, backend, max_iter=1000, tol=1e-10)
    error = float(plain.marginal_error + swapped.marginal_error)
    # The order of the half-steps differs, so the two agree up to what is left of the marginal error.
    assert float((plain.plan - swapped.plan.T).abs().sum()) < 1e-9 + 2 * error / min(eps, 1)


@fixed
@given(seed=st.integers(0, 10**6), n=SIZES, m=SIZES, eps=EPS, shift=st.floats(-5, 5))
def test_shifting_the_cost(backend: str, seed: int, n: int, m: int, eps: float, shift: float) -> None:
    """C + c moves the value by c; C + p ⊕ q leaves the solution's plan (and moves each iterate's first potential)."""
    cost, a, b = problem(seed, n, m)
    plain, moved = solve(cost, a, b, eps, backend), solve(cost + shift, a, b, eps, backend)
    assert torch.allclose(moved.plan, plain.plan, atol=1e-11)
    assert torch.allclose(moved.value, plain.value + shift, atol=1e-9)
    p = torch.linspace(-1, 1, n, dtype=torch.float64)
    tilted = solve(cost + shift * p[:, None], a, b, eps, backend)  # absorbed by the first f-step
    assert torch.allclose(tilted.plan, plain.plan, atol=1e-11)


@fixed
@given(seed=st.integers(0, 10**6), n=SIZES, m=SIZES, eps=EPS, scale=st.floats(0.01, 100))
def test_scaling_cost_and_eps(backend: str, seed: int, n: int, m: int, eps: float, scale: float) -> None:
    cost, a, b = problem(seed, n, m)
    plain, scaled = solve(cost, a, b, eps, backend), solve(scale * cost, a, b, scale * eps, backend)
    assert torch.allclose(scaled.plan, plain.plan, atol=1e-11)
    assert torch.allclose(scaled.f, scale * plain.f, atol=1e-10 * scale)


@fixed
@given(seed=st.integers(0, 10**6), n=SIZES, m=SIZES, eps=EPS, dropped=st.integers(0, 5))
def test_masking_is_cropping(backend: str, seed: int, n: int, m: int, eps: float, dropped: int) -> None:
    cost, a, b = problem(seed, n, m)
    keep = torch.ones(n, dtype=torch.bool)
    keep[torch.randperm(n)[: min(dropped, n - 1)]] = False
    a = torch.where(keep, a, 0.0)
    masked = solve(cost, a / a.sum(), b, eps, backend)
    cropped = solve(cost[keep], a[keep] / a.sum(), b, eps, backend)
    assert torch.allclose(masked.plan[keep], cropped.plan, atol=1e-12)
    assert not masked.plan[~keep].any() and masked.f.isfinite().all()


@fixed
@given(seed=st.integers(0, 10**6), n=SIZES, m=SIZES, d=st.integers(1, 70), eps=EPS)
def test_a_batch_is_a_loop_and_features_are_their_cost(
    backend: str, seed: int, n: int, m: int, d: int, eps: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, n, d, generator=generator, dtype=torch.float64)
    y = torch.randn(3, m, d, generator=generator, dtype=torch.float64)
    options = {"eps": eps, "max_iter": 20, "tol": 0.0, "backend": backend}
    # The kernels do not see the batch. PyTorch may take another order of sums for it: a cosine of d terms is known to
    # (d + 3) u, u = 2^-53, and <T, C> moves by that of C, and of T = exp(C/eps), of which C <= 2.
    slack = 0.0 if backend == "cpu" else 2 * (d + 3) * 2**-53 * (1 + 2 / eps)
    batch = cosine_sinkhorn(x, y, **options)
    for i in range(3):
        alone = cosine_sinkhorn(x[i], y[i], **options)
        assert torch.allclose(batch.transport_cost[i], alone.transport_cost, rtol=slack, atol=slack)
    unit = torch.nn.functional.normalize
    dense = sinkhorn(1 - unit(x, dim=-1) @ unit(y, dim=-1).mT, **options)
    assert torch.allclose(batch.transport_cost, dense.transport_cost, atol=1e-12)
    assert torch.allclose(batch.f, dense.f, atol=1e-11)
