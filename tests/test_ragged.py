"""Sets of different sizes, as lists and as nested tensors: each problem is the one that its own tensors make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import otloss

F64 = torch.float64
# One point, more than a vector, and in the last batch more than the kernels for short rows take.
LENGTHS = [([3, 1, 9], [5, 4, 1]), ([70, 12], [20, 66])]
OPTIONS: dict[str, Any] = {"eps": 0.3, "tol": 1e-12, "max_iter": 10_000}


def sets(lengths: list[int], *rest: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + sum(lengths))
    return [torch.randn(n, *rest, generator=generator, dtype=F64).requires_grad_() for n in lengths]


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("form", ["uniform", "masses", "logs"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_is_one_problem_at_a_time(backend: str, cost: str, form: str, lengths: tuple[list[int], list[int]]) -> None:
    x, y = (sets(counts, 4) for counts in lengths)
    z, w = (sets(counts, seed=1) for counts in lengths)
    if form == "uniform":
        masses: list[dict[str, Any]] = [{}, *({} for _ in x)]
    else:
        logs = form == "logs"
        a, b = ([t.log_softmax(-1) if logs else t.softmax(-1) for t in ts] for ts in (z, w))
        names = ("log_a", "log_b") if logs else ("a", "b")
        masses = [dict(zip(names, pair, strict=True)) for pair in ((a, b), *zip(a, b, strict=True))]

    def loss(out: otloss.SinkhornOutput) -> Tensor:
        return (out.value + 2 * out.transport_cost).sum() + out.plan.square().sum() + out.f.square().sum()

    whole = otloss.feature_sinkhorn(x, y, cost=cost, **masses[0], **OPTIONS, backend=backend)
    leaves = [*x, *y] if form == "uniform" else [*x, *y, *z, *w]
    got = torch.autograd.grad(loss(whole), leaves, retain_graph=True)
    alone = [
        otloss.feature_sinkhorn(*pair, cost=cost, **mass, **OPTIONS, backend=backend)
        for *pair, mass in zip(x, y, masses[1:], strict=True)
    ]
    want = torch.autograd.grad(sum(loss(out) for out in alone), leaves)  # type: ignore[arg-type]
    for k, (n, m) in enumerate(zip(*lengths, strict=True)):
        for name in ("value", "transport_cost"):
            torch.testing.assert_close(getattr(whole, name)[k], getattr(alone[k], name), rtol=0, atol=1e-9)
        torch.testing.assert_close(whole.plan[k, :n, :m], alone[k].plan, rtol=0, atol=1e-9)
        torch.testing.assert_close(whole.f[k, :n], alone[k].f, rtol=0, atol=1e-8)
        torch.testing.assert_close(whole.g[k, :m], alone[k].g, rtol=0, atol=1e-8)
        for part in (whole.plan[k, n:], whole.plan[k, :, m:], whole.f[k, n:], whole.g[k, m:]):
            assert not part.any()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_a_nested_tensor_is_its_list(backend: str) -> None:
    x, y = sets([3, 1, 9], 4), sets([5, 4, 2], 4)
    a = [t.softmax(-1).detach() for t in sets([3, 1, 9])]
    nested, others, masses = (
        torch.nested.nested_tensor([t.detach() for t in ts], layout=torch.jagged) for ts in (x, y, a)
    )
    nested.requires_grad_()
    options = {**OPTIONS, "backend": backend}
    listed, out = otloss.cosine_sinkhorn(x, y, a, **options), otloss.cosine_sinkhorn(nested, others, masses, **options)
    assert torch.equal(out.value, listed.value) and torch.equal(out.plan, listed.plan)
    want = torch.autograd.grad(listed.value.sum(), x)
    out.value.sum().backward()
    assert nested.grad is not None
    for one, other in zip(nested.grad.unbind(), want, strict=True):
        assert torch.equal(one, other)


def test_one_side_alone(backend: str) -> None:
    x, y = sets([3, 6], 4), torch.randn(2, 5, 4, dtype=F64)
    out = otloss.cosine_sinkhorn(y, x, **OPTIONS, backend=backend)
    for k in range(2):
        alone = otloss.cosine_sinkhorn(y[k], x[k], **OPTIONS, backend=backend)
        torch.testing.assert_close(out.value[k], alone.value, rtol=0, atol=1e-9)


def test_masks_are_lists_too() -> None:
    x, y = sets([3, 6], 4), sets([5, 2], 4)
    keep = [torch.tensor([True, False, True]), torch.tensor([True] * 5 + [False])]
    out = otloss.cosine_sinkhorn(x, y, mask_x=keep, **OPTIONS)
    cropped = otloss.cosine_sinkhorn([t[mask] for t, mask in zip(x, keep, strict=True)], y, **OPTIONS)
    torch.testing.assert_close(out.value, cropped.value, rtol=0, atol=1e-9)
    assert not out.f[0, 1].any() and not out.f[0, 3:].any()


@pytest.mark.parametrize("objective", ["transport_cost", "divergence"])
def test_losses(objective: str) -> None:
    x, y, b = sets([3, 6], 4), sets([5, 2], 4), [t.softmax(-1) for t in sets([5, 2])]
    options: dict[str, Any] = {**OPTIONS, "objective": objective, "reduction": "none"}
    for loss in (otloss.CosineSinkhornLoss(**options), otloss.FeatureSinkhornLoss("sqeuclidean", **options)):
        got = loss(x, y, None, b)
        for k in range(2):
            torch.testing.assert_close(got[k], loss(x[k], y[k], None, b[k]), rtol=0, atol=1e-9)
        _, out = loss.per_problem(x, y, None, b)
        assert (loss.per_problem(x, y, None, b, init=(out.f, out.g))[1].n_iter <= 2).all()
    if objective == "divergence":
        assert not loss(x, x).any()


X = [torch.rand(3, 4), torch.rand(2, 4)]
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: otloss.cosine_sinkhorn([], X), ValueError, r"x must hold at least one tensor \(n, d\), got none"),
    (lambda: otloss.cosine_sinkhorn(X, [X[0]]), ValueError, "the same leading dimensions"),
    (lambda: otloss.cosine_sinkhorn([X[0], X[1][:, :3]], X), ValueError, r"x\[1\] must have shape \(n, 4\) .* got"),
    (lambda: otloss.cosine_sinkhorn(X, [torch.rand(3, 5)] * 2), ValueError, "of one dimension d"),
    (lambda: otloss.cosine_sinkhorn(X, [X[0], X[1].double()]), TypeError, r"y\[1\] must have dtype torch.float32"),
    (lambda: otloss.cosine_sinkhorn(X, [X[0], X[1].to("meta")]), ValueError, r"y\[1\] must be on cpu .* got meta"),
    (lambda: otloss.cosine_sinkhorn([X[0], X[1][:0]], X), ValueError, r"x\[1\] .* at least one point .* got \(0, 4\)"),
    (lambda: otloss.cosine_sinkhorn([X[0], X[1][0]], X), ValueError, r"x\[1\] must have shape \(n, d\), got \(4,\)"),
    (lambda: otloss.cosine_sinkhorn([X[0], X[1][None]], X), ValueError, r"x\[1\] must have shape .* got \(1, 2, 4\)"),
    (lambda: otloss.cosine_sinkhorn([X[0], 3], X), TypeError, r"x\[1\] must be a tensor of shape \(n, d\), got int"),
    (lambda: otloss.cosine_sinkhorn(X, X, [torch.ones(3)]), ValueError, "a must hold 2 tensors as x does, got 1"),
    (lambda: otloss.cosine_sinkhorn(X, X, [torch.ones(3)] * 2), ValueError, r"a\[1\] must have 2 entries as x\[1\]"),
    (lambda: otloss.cosine_sinkhorn(X, X, log_b=torch.ones(2, 3)), TypeError, "log_b must be a list of tensors .* got"),
    (lambda: otloss.cosine_sinkhorn(X, X, mask_x=[torch.ones(3)] * 2), TypeError, r"mask_x\[0\] must be .* dtype bool"),
    (lambda: otloss.cosine_sinkhorn(torch.nested.nested_tensor(X), X), TypeError, "nested tensor of jagged layout"),
    (lambda: otloss.cosine_sinkhorn(X[0], X[0], [torch.ones(3)]), TypeError, "a must be a tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_what_does_not_fit_is_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
