"""On a CUDA device: parity, gradients, memory, determinism, graphs, streams, devices, compilation; else skipped."""

from __future__ import annotations

import pytest
import torch
from conftest import reference_solution
from torch import Tensor

import otloss
from otloss.backends import reference, triton
from otloss.backends.protocol import Problem, Upstream

WHY_NOT = triton.status() or ("the interpreter is on" if triton.interpreted() else None)
# Marks, not a skip of the module: without a single test collected pytest would fail, and `make bench-gpu` with it.
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=f"needs a GPU: {WHY_NOT}")]

EPS = 0.1
# One or more of every regime: small, medium, large, and few rows with split columns.
SIZES = [(1, 1), (17, 31), (49, 49), (64, 64), (130, 257), (512, 500), (1024, 1000), (1500, 2100), (3, 5000)]


def problem(
    n: int, m: int, dtype: torch.dtype, batch: int = 3, d: int = 20, device: str = "cuda"
) -> tuple[Tensor, ...]:
    x, y = (torch.randn(batch, k, d, device=device, dtype=dtype) for k in (n, m))
    a, b = (torch.randn(batch, k, device=device, dtype=dtype).softmax(-1) for k in (n, m))
    a[:, n // 2 + 1 :: 7] = 0
    return x, y, a / a.sum(-1, keepdim=True), b


def slack(dtype: torch.dtype, eps: float = EPS, room: float = 16.0) -> float:
    return room * torch.finfo(dtype).eps / 2 * max(1.0, 2.0 / eps)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.isfinite().all()
    assert float((got.double() - want).abs().max()) <= tolerance * max(float(want.abs().max()), 0.1)


def wide(given: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in given]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [None, 20, 384])  # None: a dense cost; rows whose length is a multiple of 16 load wider
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_everything_is_that_of_the_reference(n: int, m: int, d: int | None, dtype: torch.dtype) -> None:
    x, y, a, b = problem(n, m, dtype, d=d or 20)
    given = (reference.dense_cost(x, y), None, a, b) if d is None else (x, y, a, b)
    got, want = triton.solve(Problem(*given, EPS), 20, 0.0), reference_solution(Problem(*wide(given), EPS), 20, 0.0)
    for one, other in zip(got[:4], want[:4], strict=True):
        close(one, other, slack(dtype))
    # The implicit gradient is defined by the converged problem.
    f, g = (potential.to(dtype) for potential in reference_solution(Problem(*wide(given), EPS), 500, 1e-12)[:2])
    w, v, p, q = torch.randn_like(a[:, 0]), torch.randn_like(a[:, 0]), torch.randn_like(a) * a, torch.randn_like(b) * b
    q = q + b * (p.sum(-1) - q.sum(-1)).unsqueeze(-1)
    prepared, exact = Problem(*given, EPS), Problem(*wide(given), EPS)
    got, residual = triton.implicit_gradient(prepared, f, g, Upstream(w, v, p, q), True, True)
    want, _ = reference.implicit_gradient(exact, f.double(), g.double(), Upstream(*wide((w, v, p, q))), True, True)
    for k, (one, other) in enumerate(zip(got, want, strict=True)):
        if one.numel():
            if k in (2, 3):
                one, other = one - one.mean(-1, keepdim=True), other - other.mean(-1, keepdim=True)
            close(one, other, slack(dtype, room=300.0))
    assert (residual < (1e-5 if dtype == torch.float32 else 1e-10)).all()
    n_iter = torch.tensor([0, 2, 5], device="cuda")
    got = triton.unrolled_gradient(prepared, n_iter, Upstream(w, v), True, 5)
    want = reference.unrolled_gradient(exact, n_iter, Upstream(w.double(), v.double()), True, 5)
    for one, other in zip(got, want, strict=True):
        if one.numel():
            close(one, other, slack(dtype, room=100.0))


@pytest.mark.parametrize(("n", "m"), [(100, 90), (300, 400), (1200, 1100)])
def test_small_eps(n: int, m: int) -> None:
    cost, a, b = 2 * torch.rand(2, n, m, device="cuda"), *(torch.full((2, k), 1 / k, device="cuda") for k in (n, m))
    for iterations in (1, 3, 100):
        got = triton.solve(Problem(cost, None, a, b, 1e-3), iterations, 0.0)
        want = reference_solution(Problem(*wide((cost, None, a, b)), 1e-3), iterations, 0.0)
        for one, other in zip(got[:2], want[:2], strict=True):
            close(one, other, 2 * torch.finfo(torch.float32).eps * (4 + iterations))


@pytest.mark.parametrize("rho", [None, 0.5])
@pytest.mark.parametrize("n", [49, 300, 1500])
def test_a_set_with_itself_takes_few_sweeps(n: int, rho: float | None) -> None:
    x, _, a, _ = problem(n, n, torch.float32)
    cost = otloss.sqeuclidean_cost(x, x) / 40
    options = {"eps": 0.05, "rho_a": rho, "rho_b": rho, "max_iter": 5000}
    for solve in (
        lambda **more: otloss.cosine_sinkhorn(x, x.clone(), a, a, **options, **more),
        lambda **more: otloss.sinkhorn((cost + cost.mT) / 2, a, a, **options, **more),
    ):
        out, plain = solve(), solve(solver="plain")
        assert out.converged.all() and (out.n_iter <= 10).all()
        close(out.value, plain.value.double(), 1e-4)
        close(out.f, out.g.double(), slack(torch.float32))
        again = solve(init=(out.f, out.g))
        assert (again.n_iter <= 2).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    x, y, *_ = problem(196, 196, torch.float32)
    x, y = (t.to(dtype).requires_grad_() for t in (x, y))
    out = otloss.cosine_sinkhorn(x, y, eps=EPS)
    out.transport_cost.sum().backward()
    with otloss.use_backend("reference"):
        exact = [t.detach().double().requires_grad_() for t in (x, y)]
        want = otloss.cosine_sinkhorn(*exact, eps=EPS)
        want.transport_cost.sum().backward()
    close(out.transport_cost, want.transport_cost, slack(torch.float32))
    close(out.plan, want.plan, slack(torch.float32, room=64.0))
    for got, right in zip((x, y), exact, strict=True):
        assert got.grad is not None and right.grad is not None and got.grad.dtype == dtype
        close(got.grad, right.grad, torch.finfo(dtype).eps)


@pytest.mark.parametrize(("n", "m"), [(40, 5), (300, 200), (2000, 1500)])
def test_columns_that_no_row_prefers(n: int, m: int) -> None:
    """Their shares underflow, so that they are found by half-steps in the log-domain."""
    cost = torch.rand(2, n, m, device="cuda")
    cost[..., 1] += 100
    a, b = (torch.full((2, k), 1 / k, device="cuda") for k in (n, m))
    got = triton.solve(Problem(cost, None, a, b, EPS), 3, 0.0)
    want = reference_solution(Problem(*wide((cost, None, a, b)), EPS), 3, 0.0)
    for one, other in zip(got[:4], want[:4], strict=True):
        close(one, other, slack(torch.float32, room=16.0 * 50))


@pytest.mark.parametrize("kind", ["cosine", "sqeuclidean", "dot"])
@pytest.mark.parametrize(("n", "m"), [(49, 40), (300, 200), (3000, 2900)])  # the last is not stored
def test_penalties_and_kinds(n: int, m: int, kind: str) -> None:
    x, y, a, b = problem(n, m, torch.float32)
    given = (x / 4, y / 4, a, b, torch.tensor([0.5, 1.0, 4.0], device="cuda"))

    def run(dtype: torch.dtype, tol: float, backend: str) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in given]
        options = {"eps": EPS, "rho_b": 0.5, "tol": tol, "max_iter": 2000, "backend": backend}
        out = otloss.feature_sinkhorn(*leaves[:4], cost=kind, rho_a=leaves[4], **options)
        return out.value.detach(), *torch.autograd.grad((out.transport_cost + out.value).sum(), leaves)

    for got, want in zip(run(torch.float32, 1e-6, "triton"), run(torch.float64, 1e-10, "reference"), strict=True):
        close(got, want, slack(torch.float32, room=300.0) + 1e-6 / EPS)


@pytest.mark.parametrize("gradient", ["implicit", "unroll", "none"])
@pytest.mark.parametrize("n", [49, 300, 1500])
def test_the_verb_in_every_mode(n: int, gradient: str) -> None:
    x, y, a, b = problem(n, n, torch.float64, batch=2)
    x = x.mT.contiguous().mT  # not contiguous
    leaves = [t.detach().requires_grad_() for t in (x, y, a, b)]

    def grads(backend: str) -> tuple[Tensor | None, ...]:
        options = {"eps": EPS, "max_iter": 500 if gradient == "implicit" else 6, "tol": 1e-12, "gradient": gradient}
        out = otloss.cosine_sinkhorn(*leaves, **options, backend=backend)
        total = out.transport_cost.sum()
        total = total if gradient == "none" else total + 2 * out.value.sum()
        total = total + out.plan.square().sum() if gradient == "implicit" else total
        return torch.autograd.grad(total, leaves, allow_unused=True)

    for got, want in zip(grads("triton"), grads("reference"), strict=True):
        assert (got is None) == (want is None)
        assert got is None or want is None or torch.allclose(got, want, atol=1e-8)


def test_a_half_precision_cost_is_not_copied() -> None:
    cost = torch.rand(16, 512, 512, device="cuda").half()
    otloss.sinkhorn(cost, eps=EPS)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    otloss.sinkhorn(cost, eps=EPS)
    assert torch.cuda.max_memory_allocated() - before < cost.numel()  # bytes; a float32 copy would take four times that


def loss(x: Tensor, y: Tensor, za: Tensor) -> Tensor:
    out = otloss.cosine_sinkhorn(x, y, log_a=za.log_softmax(-1), eps=EPS, max_iter=20, tol=0.0)
    return out.transport_cost.sum() + out.value.sum()


def gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    return torch.autograd.grad(loss(*leaves), leaves)


@pytest.mark.parametrize("n", [49, 300, 1500])
def test_the_same_bit_for_bit_in_every_run_and_on_every_stream(n: int) -> None:
    x, y, a, _ = problem(n, n, torch.float32)
    first = gradients(x, y, a)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = gradients(x, y, a)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("n", [49, 300, 1500])
def test_captured_in_a_cuda_graph(n: int) -> None:
    x, y, a, b = problem(n, n, torch.float32)

    def both() -> tuple[Tensor, ...]:
        solution = triton.solve(Problem(x, y, a, b, EPS), 20, 0.0)[:6]
        f, g, w, _, n_iter, _ = solution
        unrolled = torch.ops.otloss.unrolled_gradient(x, y, a, b, n_iter, w, None, EPS, True, 20, "triton")
        implicit, residual = triton.implicit_gradient(Problem(x, y, a, b, EPS), f, g, Upstream(w), True, True)
        return (*solution, *implicit, residual, *unrolled)

    want = both()  # compiles what the capture launches
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, want))


def peak_of_gradients(*leaves: Tensor) -> int:
    """Bytes that a warm call takes beside its inputs, at most."""
    gradients(*leaves)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(*leaves)
    return torch.cuda.max_memory_allocated() - before


def test_the_stored_cost_is_bounded() -> None:
    """The cost of all problems would take 256 MiB; groups of it and of its gradient take 32 MiB each."""
    x, y, a, _ = problem(512, 512, torch.float32, batch=256)
    features = 8 * (x.numel() + y.numel())  # bytes of unit rows and gradients
    assert peak_of_gradients(x, y, a) < (64 << 20) + (32 << 20) + 2 * features


def test_features_never_become_a_cost_matrix() -> None:
    x, y, a, _ = problem(4096, 4096, torch.float32, batch=4)
    assert peak_of_gradients(x, y, a) < 4 * 4096 * 4096  # bytes; the cost would take 16 times as many


@pytest.mark.parametrize("n", [49, 300])
def test_compiled(n: int) -> None:
    x, y, a, _ = problem(n, n, torch.float32)
    leaves = tuple(t.detach().requires_grad_() for t in (x, y, a))
    value = torch.compile(loss, fullgraph=True)(*leaves)
    assert torch.allclose(value, loss(*leaves))
    for one, other in zip(torch.autograd.grad(value, leaves), gradients(*leaves), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_every_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device only")
    x, y, a, _ = problem(200, 200, torch.float32)
    one = gradients(x, y, a)
    other = gradients(*(t.to("cuda:1") for t in (x, y, a)))
    assert all(torch.allclose(p, q.to(p.device), atol=1e-6) for p, q in zip(one, other, strict=True))


def test_many_problems() -> None:
    x, y, a, b = problem(5, 4, torch.float32, batch=70_000)
    got = triton.solve(Problem(x, y, a, b, EPS), 5, 0.0)
    want = reference_solution(Problem(*(t[-3:].double() for t in (x, y, a, b)), EPS), 5, 0.0)
    close(got[2][-3:], want[2], slack(torch.float32))
