"""Costs of features that are not stored: squared distances, products, and any of them under a tensor eps.

They are compared with the stored cost. In float32, with u = 2^-24, an entry of the plan is known to about u C / eps,
for costs up to C, and a derivative of it to 1/eps times that.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import relative
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import otloss
from otloss.arguments import Arguments, describe
from otloss.backends import cpu
from otloss.cost import COSTS

KINDS = ("cosine", "sqeuclidean", "dot")
EXACT = {"tol": 1e-13, "max_iter": 10_000}
EPS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


def _points(n: int = 6, m: int = 5, d: int = 4, count: int = 3) -> tuple[Tensor, ...]:
    """Features of costs up to about 2, and masses; the last point of each side has none."""
    x, y = (torch.randn(count, k, d, dtype=torch.float64) * (2 * d) ** -0.5 for k in (n, m))
    a, b = (torch.randn(count, k, dtype=torch.float64).softmax(-1) for k in (n, m))
    a[:, -1] = b[:, -1] = 0
    return x, y, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def _outputs(out: otloss.SinkhornOutput, mode: str) -> list[Tensor]:
    if mode == "none":
        return [out.transport_cost]
    return [out.transport_cost, out.value] + ([out.f, out.g, out.plan] if mode == "implicit" else [])


def _grads(one: Tensor, other: Tensor, by: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradients of two outputs in one random direction."""
    weight = torch.randn_like(one)
    return zip(*(torch.autograd.grad(v, by, weight, retain_graph=True) for v in (one, other)), strict=True)


@pytest.mark.parametrize("mode", ["implicit", "unroll", "none"])
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_as_with_the_stored_cost(backend: str, kind: str, tensor: bool, mode: str) -> None:
    """Outputs and gradients by features, masses and eps; a zero row counts as orthogonal to all, with gradient 0."""
    x, y, a, b = _points()
    if kind == "cosine":
        x[0, 1] = y[0, 2] = y[1, 0] = 0
    leaves = [t.requires_grad_() for t in (x, y, a, b)]
    eps: Any = EPS.clone().requires_grad_() if tensor else 0.3
    by = [*leaves, eps] if tensor else leaves
    by = by[:2] + by[4:] if mode == "none" else by
    options = {"eps": eps, "backend": backend, "gradient": mode}
    options |= EXACT if mode == "implicit" else {"max_iter": 4, "tol": 0.0}
    out = otloss.feature_sinkhorn(x, y, a, b, cost=kind, **options)
    dense = otloss.sinkhorn(COSTS[kind](x, y), a, b, **options)
    assert torch.equal(out.n_iter, dense.n_iter) or mode == "implicit"
    for one, other in zip(_outputs(out, mode), _outputs(dense, mode), strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)
        for mine, theirs in _grads(one, other, by):
            torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)
    if kind == "cosine":
        by_x, by_y = torch.autograd.grad(out.transport_cost.sum(), (x, y))
        assert not by_x[0, 1].any() and not by_y[0, 2].any() and not by_y[1, 0].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [(15, 17), (33, 64), (65, 130)])
def test_sizes_across_lanes_and_blocks(kernel_backend: str, kind: str, n: int, m: int) -> None:
    x, y, a, b = _points(n, m, 7)
    leaves = [t.requires_grad_() for t in (x, y, a, b)]
    eps = EPS.clone().requires_grad_()
    options = {"eps": eps, "backend": kernel_backend, **EXACT}
    out = otloss.feature_sinkhorn(x, y, a, b, cost=kind, **options)
    dense = otloss.sinkhorn(COSTS[kind](x, y), a, b, **options)
    for one, other in zip(_outputs(out, "implicit")[:4], _outputs(dense, "implicit")[:4], strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)
        for mine, theirs in _grads(one, other, [*leaves, eps]):
            torch.testing.assert_close(mine, theirs, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(20, 30, 5), (70, 90, 20)])
def test_a_tensor_eps_in_float32(kernel_backend: str, kind: str, size: tuple[int, int, int]) -> None:
    x, y, a, b = (t.float() for t in _points(*size))
    if kind == "sqeuclidean":
        x, y = x + 1000, y + 1000
    found = []
    for dtype, backend in ((torch.float32, kernel_backend), (torch.float64, "reference")):
        leaves = [t.to(dtype).requires_grad_() for t in (x, y, EPS.float())]
        options = {"tol": 1e-6, "max_iter": 3000} if dtype == torch.float32 else EXACT
        if backend == kernel_backend:
            out = otloss.feature_sinkhorn(*leaves[:2], a, b, cost=kind, eps=leaves[2], backend=backend, **options)
        else:
            masses = (t.to(dtype) for t in (a, b))
            out = otloss.sinkhorn(COSTS[kind](*leaves[:2]), *masses, eps=leaves[2], backend=backend, **options)
        grads = [torch.autograd.grad(v.sum(), leaves, retain_graph=True) for v in (out.transport_cost, out.value)]
        found.append((out, *grads))
    (out, *got), (exact, *want) = found
    largest = float(COSTS[kind](x.detach().double(), y.detach().double()).abs().max())
    known = 16 * 2**-24 * max(1.0, largest / float(EPS.min()))
    for name in ("transport_cost", "value", "f", "g"):
        difference = (getattr(out, name) - getattr(exact, name)).detach().abs().max()
        assert float(difference) <= known * max(1.0, largest), name
    assert float((out.plan - exact.plan).detach().abs().sum((-1, -2)).max()) <= known
    for mine, theirs in zip(got, want, strict=True):
        for one, other, lengths in zip(mine, theirs, (x, y, None), strict=True):
            scale = lengths.detach().norm(dim=-1, keepdim=True) if kind == "cosine" and lengths is not None else 1.0
            assert relative(one * scale, other.detach() * scale) <= 16 * known / float(EPS.min())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tensor", [False, True])
def test_a_mask_is_a_crop(backend: str, kind: str, tensor: bool) -> None:
    """Also where the points that take part lie far from 0, and what is left out is not finite."""
    x, y, _, _ = _points()
    offset = 1e4 if kind == "sqeuclidean" else 0.0
    x, y = (t + offset for t in (x, y))
    rows, columns = [0, 2, 3, 4], [0, 1, 3]
    mask_x, mask_y = torch.zeros(6, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
    mask_x[rows], mask_y[columns] = True, True
    x[:, 1], y[:, 2] = torch.nan, torch.inf
    leaves = [t.requires_grad_() for t in (x, y)]
    options: dict[str, Any] = {"cost": kind, "eps": EPS if tensor else 0.3, "backend": backend, **EXACT}
    out = otloss.feature_sinkhorn(x, y, mask_x=mask_x, mask_y=mask_y, **options)
    crop = otloss.feature_sinkhorn(x[:, rows], y[:, columns], **options)
    torch.testing.assert_close(out.plan[:, rows][:, :, columns], crop.plan, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(out.value, crop.value, atol=1e-9, rtol=1e-9)
    assert not out.f[:, [1, 5]].any() and not out.g[:, [2, 4]].any()
    got, want = (torch.autograd.grad(o.transport_cost.sum(), leaves) for o in (out, crop))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_solved_in_float32(backend: str, kind: str, half: torch.dtype) -> None:
    x, y, _, _ = _points()
    x, y, eps = x.to(half), y.to(half), EPS.to(half)
    with torch.autocast("cpu", dtype=half):
        out = otloss.feature_sinkhorn(x.requires_grad_(), y, cost=kind, eps=eps, backend=backend)
    want = otloss.feature_sinkhorn(x.float(), y.float(), cost=kind, eps=eps.float(), backend=backend)
    assert out.value.dtype == torch.float32 and torch.equal(out.value, want.value)
    (grad,) = torch.autograd.grad(out.value.sum(), x)
    assert grad.dtype == half and grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tensor", [False, True])
def test_derivatives_of_both_orders(kind: str, tensor: bool) -> None:
    x, y, a, _ = _points(3, 2, 2, 2)
    leaves = [t.requires_grad_() for t in (x, y, a.clamp_min(0.1), EPS[:2].clone())]

    def outputs(x: Tensor, y: Tensor, a: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
        given: Any = eps if tensor else 0.3
        out = otloss.feature_sinkhorn(x, y, a, cost=kind, eps=given, backend="reference", **EXACT)
        return out.transport_cost, out.value, out.plan, out.f

    leaves = leaves if tensor else leaves[:3]
    call = outputs if tensor else lambda x, y, a: outputs(x, y, a, EPS[:2])
    assert gradcheck(call, leaves, atol=1e-6, rtol=1e-5)
    assert gradgradcheck(call, leaves, atol=1e-5, rtol=1e-4, fast_mode=True)


def test_a_compiled_function_in_one_graph(backend: str) -> None:
    x, y, a, _ = _points()
    torch._dynamo.reset()

    def loss(x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        out = otloss.feature_sinkhorn(x, y, a, cost="sqeuclidean", eps=eps, backend=backend, **EXACT)
        return (out.value + out.transport_cost).sum()

    leaves = [t.requires_grad_() for t in (x, y, EPS.clone())]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_divergence_of_equal_sets(backend: str, offset: float) -> None:
    """It and its gradient vanish: V(x, y) has half the gradient of V(x, x) by its first argument."""
    x = (torch.randn(2, 20, 3) + offset).requires_grad_()
    loss = otloss.FeatureSinkhornLoss("sqeuclidean", eps=0.5, objective="divergence", reduction="none", backend=backend)
    known = 16 * 2**-24 * float(otloss.sqeuclidean_cost(x, x).max()) / 0.5
    same = loss(x, x.detach().clone())
    (grad,) = torch.autograd.grad(same.sum(), x)
    assert same.abs().max() <= known + 1e-5 and grad.abs().max() <= (known + 1e-5) / 0.5
    other = loss(x, x.detach() + torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(other, torch.ones(2), atol=1e-3, rtol=0.0)  # of a shift it is the squared distance
    (grad,) = torch.autograd.grad(other.sum(), x)
    torch.testing.assert_close(grad, torch.tensor([-2 / 20, 0.0, 0.0]).expand_as(grad), atol=2e-4, rtol=0.0)


class LargestTensor(TorchDispatchMode):
    """The numbers in the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(part, Tensor):
                self.numbers = max(self.numbers, part.untyped_storage().nbytes() // part.element_size())
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tensor", [False, True])
def test_no_matrix_is_stored(kernel_backend: str, kind: str, tensor: bool) -> None:
    x, y = torch.randn(3, 100, 3, requires_grad=True), torch.randn(3, 80, 3)
    eps: Any = torch.tensor([1.0, 2.0, 3.0], requires_grad=True) if tensor else 1.0
    with LargestTensor() as largest:
        out = otloss.feature_sinkhorn(x, y, cost=kind, eps=eps, backend=kernel_backend)
        (out.transport_cost + out.value).sum().backward()
    assert largest.numbers <= 3 * 100 * 5


PEAK = """
import gc, torch, otloss
torch.set_num_threads(1)

def status(key):
    with open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith(key)).split()[1])

def step(count, n):
    x, y = torch.randn(count, n, 16, requires_grad=True), torch.randn(count, n, 16, requires_grad=True)
    out = otloss.feature_sinkhorn(x, y, cost="sqeuclidean", eps=torch.full((count,), 8.0), max_iter=20, tol=0.0)
    (out.transport_cost + out.value).sum().backward()

step(1, 1000)  # what a first call leaves, and the scratch of one problem
gc.collect()
with open("/proc/self/clear_refs", "w") as reset:  # sets the recorded peak back to what is held now
    reset.write("5")
before = status("VmRSS")
step(32, 1000)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_a_step(kernel_backend: str) -> None:
    """32 costs of 1000 x 1000 would take 128 MB. Scratch for one of them is there before; features take 2 MB."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 32 * 1000 * 1000 * 4 / 1024 / 4


def test_a_backend_that_makes_only_the_cosine_cost(kernel_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, a, b = _points()
    calls: list[Callable[[], otloss.SinkhornOutput]] = [
        lambda eps=eps, kind=kind: otloss.feature_sinkhorn(x, y, a, b, cost=kind, eps=eps, backend="cpu", **EXACT)
        for kind, eps in (("sqeuclidean", 0.3), ("dot", EPS), ("cosine", EPS))
    ]
    made = [call().value for call in calls]
    monkeypatch.setattr(cpu, "KINDS", ("cosine",))
    for kind in KINDS:
        for eps in (0.3, EPS):
            stored = describe(x, y, kind, Arguments(eps, a, b), "cpu").problem.right is None
            assert stored == (kind != "cosine" or eps is EPS)
    for call, want in zip(calls, made, strict=True):
        torch.testing.assert_close(call().value, want, atol=1e-11, rtol=1e-11)


def test_a_warning_says_what_eps_was(backend: str) -> None:
    x, y, _, _ = _points()
    options = {"cost": "sqeuclidean", "max_iter": 1, "tol": 1e-9, "backend": backend}
    with pytest.warns(otloss.ConvergenceWarning, match="in max_iter=1 iterations at an eps given as a tensor"):
        otloss.feature_sinkhorn(x, y, eps=EPS / 10, **options)
    with pytest.warns(otloss.ConvergenceWarning, match="in max_iter=1 iterations at eps=0.02"):
        otloss.feature_sinkhorn(x, y, eps=0.02, **options)
