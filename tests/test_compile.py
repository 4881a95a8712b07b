"""``torch.compile`` where it is hard: tensors that come in twice, transforms inside, sizes that change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import relative
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap

import otloss


@pytest.fixture(autouse=True)
def _backend(kernel_backend: str) -> Iterator[None]:
    torch._dynamo.reset()
    with otloss.use_backend(kernel_backend):
        yield


def self_cost(cost: Tensor, logits: Tensor) -> Tensor:
    mass = logits.softmax(-1)
    return otloss.sinkhorn(cost, mass, mass, eps=0.2).value.sum()


def self_features(x: Tensor, logits: Tensor) -> Tensor:
    log_mass = logits.log_softmax(-1)
    return otloss.cosine_sinkhorn(x, x, log_a=log_mass, log_b=log_mass, eps=0.2).transport_cost.sum()


def dense_divergence(cost: Tensor, logits: Tensor) -> Tensor:
    loss = otloss.SinkhornLoss(0.2, "divergence")
    return loss(cost, logits.softmax(-1), cost_xx=cost, cost_yy=cost)


@pytest.mark.parametrize("loss", [self_cost, self_features, dense_divergence])
def test_a_tensor_that_comes_in_twice_gets_both_gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    args = torch.rand(3, 5, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*args), args) for f in (compiled, loss))
    for one, other in zip(got, want, strict=True):
        assert relative(one, other) < 1e-5


def test_the_divergence_of_optiml() -> None:
    loss = otloss.OPTiMLLoss(8, objective="divergence", num_heads=2)
    z_s, z_t = (torch.randn(4, 8, 5, 5, requires_grad=True) for _ in range(2))
    q_s, q_t = torch.randn(4, 6), torch.randn(4, 6)
    compiled = torch.compile(lambda *args: loss(*args).loss, fullgraph=True, backend="aot_eager")
    leaves = (z_s, z_t, *loss.parameters())
    got = torch.autograd.grad(compiled(z_s, z_t, q_s, q_t), leaves)
    want = torch.autograd.grad(loss(z_s, z_t, q_s, q_t).loss, leaves)
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-4)


def problem(cost: Tensor, logits: Tensor) -> Tensor:
    out = otloss.sinkhorn(cost, log_a=logits.log_softmax(-1), eps=0.2)
    return out.transport_cost + out.value + out.plan.square().sum()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_vmap(compiler: str) -> None:
    args = torch.rand(3, 5, 6), torch.randn(3, 5)
    got = torch.compile(vmap(problem), fullgraph=True, backend=compiler)(*args)
    assert torch.allclose(got, vmap(problem)(*args), atol=1e-6)


def test_a_compiled_vmap_of_gradients() -> None:
    args = torch.rand(3, 5, 6), torch.randn(3, 5)
    each = vmap(grad(problem, argnums=(0, 1)))
    for one, other in zip(torch.compile(each, fullgraph=True, backend="aot_eager")(*args), each(*args), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_the_gradient_of_a_compiled_vmap() -> None:
    args = torch.rand(3, 5, 6, requires_grad=True), torch.randn(5, requires_grad=True)
    each = vmap(problem, in_dims=(0, None))
    compiled = torch.compile(each, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*args).square().sum(), args) for f in (compiled, each))
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def dense(count: int, n: int, m: int) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    def loss(cost: Tensor, logits: Tensor) -> Tensor:
        out = otloss.sinkhorn(cost, log_a=logits.log_softmax(-1), eps=0.2)
        return out.transport_cost.sum() + out.plan.square().sum()

    return loss, {"cost": torch.rand(count, n, m), "logits": torch.randn(count, n)}


def masked_features(count: int, n: int, m: int) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    def loss(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return otloss.cosine_sinkhorn(x, y, mask_x=mask, eps=0.2).value.sum()

    mask = torch.rand(count, n) < 0.5
    mask[:, 0] = True
    return loss, {"x": torch.randn(count, n, 3), "y": torch.randn(count, m, 3), "mask": mask}


def features_with_eps(count: int, n: int, m: int) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    def loss(x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        out = otloss.feature_sinkhorn(x, y, cost="sqeuclidean", eps=eps)
        return out.value.sum() + out.converged.sum()

    return loss, {"x": torch.randn(count, n, 3), "y": torch.randn(count, m, 3), "eps": 0.5 + torch.rand(count)}


SIZES = [(3, 5, 6), (4, 7, 9), (2, 8, 5), (6, 10, 12)]
#: The dimensions of each tensor that may have any size.
FREE = {"cost": (0, 1, 2), "logits": (0, 1), "x": (0, 1), "y": (0, 1), "mask": (0, 1), "eps": (0,)}


@pytest.mark.parametrize("case", [dense, masked_features, features_with_eps])
@pytest.mark.parametrize("marked", [True, False])
def test_one_graph_serves_every_size(case: Callable[..., Any], marked: bool) -> None:
    """Marked, or as PyTorch finds out at the second size."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = None
    for size in SIZES:
        loss, tensors = case(*size)
        compiled = compiled or torch.compile(loss, fullgraph=True, backend=counter)
        leaves = [t.requires_grad_() for t in tensors.values() if t.is_floating_point()]
        for name, t in tensors.items():
            for dim in FREE[name] if marked else ():
                torch._dynamo.mark_dynamic(t, dim)
        got = torch.autograd.grad(compiled(**tensors), leaves)
        for one, other in zip(got, torch.autograd.grad(loss(**tensors), leaves), strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    assert counter.frame_count == (1 if marked else 2)
