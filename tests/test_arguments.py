"""What the verbs take beside the balanced problem with one eps: masks, broadcasting, eps as a tensor, kinds of cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpu_problems import needs_cpu
from torch import Tensor

import otloss
from otloss.backends import choose_backend, cpu

EXACT = {"tol": 1e-12, "max_iter": 5000}
ROWS, COLUMNS = [0, 1, 3, 4], [0, 2, 3, 4]


def _problem(dtype: torch.dtype = torch.float64, count: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of 6 and 5 points, and masses of the same total."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(count, k, 4, generator=generator, dtype=torch.float64) for k in (6, 5))
    a, b = (torch.rand(count, k, generator=generator, dtype=torch.float64).softmax(-1) for k in (6, 5))
    return x.to(dtype), y.to(dtype), a.to(dtype), b.to(dtype)


def _masks() -> tuple[Tensor, Tensor]:
    mask_x, mask_y = torch.zeros(6, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
    mask_x[ROWS], mask_y[COLUMNS] = True, True
    return mask_x, mask_y


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if not otloss.backends()[request.param]:
        pytest.skip(str(otloss.backends()[request.param]))
    return str(request.param)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("masses", ["uniform", "masses", "logs"])
def test_a_mask_is_a_crop(backend: str, dense: bool, masses: str) -> None:
    x, y, a, b = _problem()
    mask_x, mask_y = _masks()
    a_in, b_in = a[:, ROWS], b[:, COLUMNS]
    a, b = a / a_in.sum(-1, keepdim=True), b / b_in.sum(-1, keepdim=True)
    given: dict[str, Any] = {
        "uniform": {},
        "masses": {"a": a, "b": b},
        "logs": {"log_a": a.log(), "log_b": b.log()},
    }[masses]
    cropped = {name: t[:, ROWS if name.endswith("a") else COLUMNS] for name, t in given.items()}
    x[:, 2], y[:, 1] = torch.nan, torch.inf  # what stands there does not matter
    left, right = x[:, ROWS], y[:, COLUMNS]
    for t in (x, y):
        t.requires_grad_()
    if dense:
        cost = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
        options = {"eps": 1.0, "backend": backend, **EXACT}
        out = otloss.sinkhorn(cost, **given, mask_x=mask_x, mask_y=mask_y, **options)
        crop = otloss.sinkhorn(otloss.sqeuclidean_cost(left, right), **cropped, **options)
        inputs: tuple[Tensor, ...] = (cost,)
    else:
        out = otloss.cosine_sinkhorn(x, y, **given, mask_x=mask_x, mask_y=mask_y, backend=backend, **EXACT)
        crop = otloss.cosine_sinkhorn(left, right, **cropped, backend=backend, **EXACT)
        inputs = (x, y)
    for mine, theirs in (
        (out.transport_cost, crop.transport_cost),
        (out.value, crop.value),
        (out.f[:, ROWS], crop.f),
        (out.g[:, COLUMNS], crop.g),
        (out.plan[:, ROWS][..., COLUMNS], crop.plan),
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)
    assert float(out.f[:, 2].abs().max()) == 0.0 and float(out.plan[:, 2].abs().max()) == 0.0
    loss = (out.transport_cost + out.value).sum() + out.f.square().sum() + out.g.cos().sum()
    grads = torch.autograd.grad(loss, inputs)
    outside = [grads[0][:, 2], *(g[..., 1] for g in grads[:1] if dense), *(g[:, 1] for g in grads[1:])]
    for grad in outside:
        assert float(grad.abs().max()) == 0.0
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_uniform_masses_under_a_mask_stand_beside_masses_of_any_total(backend: str) -> None:
    cost, mask = torch.rand(6, 5, dtype=torch.float64), _masks()[1]
    a = (0.5 + torch.rand(6, dtype=torch.float64)).requires_grad_()
    options = {"mask_y": mask, "backend": backend, **EXACT}
    got, want = (otloss.sinkhorn(cost, mass, **options).value for mass in (a, a / a.sum()))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(value, a)[0] for value in (got, want)))


def test_a_mask_for_each_problem() -> None:
    x, y, _, _ = _problem()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    out = otloss.cosine_sinkhorn(x, y, mask_y=mask, **EXACT)
    for k in range(3):
        alone = otloss.cosine_sinkhorn(x[k], y[k, mask[k]], **EXACT)
        torch.testing.assert_close(out.value[k], alone.value)


@pytest.mark.parametrize("verb", ["dense", "features", "relaxed"])
def test_eps_for_each_problem_and_its_gradient(backend: str, verb: str) -> None:
    x, y, a, b = _problem()
    cost = otloss.cosine_cost(x, y)
    eps = torch.tensor([0.05, 0.1, 0.4], dtype=torch.float64, requires_grad=True)

    def outputs(eps: Any, some: slice = slice(None)) -> tuple[Tensor, ...]:
        options = {"a": a[some], "b": b[some], "backend": backend, "eps": eps, "tol": 1e-13, "max_iter": 5000}
        if verb == "relaxed":
            options |= {"rho_a": 0.5, "rho_b": 0.7}
        if verb == "features":
            out = otloss.cosine_sinkhorn(x[some], y[some], **options)
        else:
            out = otloss.sinkhorn(cost[some], **options)
        return out.transport_cost, out.value, out.f, out.g, out.plan

    assert torch.autograd.gradcheck(outputs, (eps,), atol=1e-6, rtol=1e-5)
    together = outputs(eps)
    for k, one in enumerate(eps.tolist()):
        for mine, alone in zip(together, outputs(one, slice(k, k + 1)), strict=True):
            torch.testing.assert_close(mine[k], alone[0], atol=1e-9, rtol=1e-9)


def test_one_compiled_graph_serves_every_eps() -> None:
    x, y, _, _ = _problem(torch.float32)
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def loss(x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        return otloss.cosine_sinkhorn(x, y, eps=eps, mask_x=_masks()[0]).transport_cost.sum()

    for value in (0.05, 0.1, 0.2):
        expected = otloss.cosine_sinkhorn(x, y, eps=value, mask_x=_masks()[0]).transport_cost.sum()
        # Both solve the same problem in other units: their exponents of size 2 / eps round differently.
        torch.testing.assert_close(loss(x, y, torch.tensor(value)), expected, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1


def test_leading_dimensions_are_broadcast(backend: str) -> None:
    x, y, _, _ = _problem()
    cost = otloss.cosine_cost(x, y)
    a = torch.rand(2, 1, 6, dtype=torch.float64).softmax(-1).requires_grad_()
    eps = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    out = otloss.sinkhorn(cost, a, eps=eps, backend=backend, **EXACT)
    assert out.transport_cost.shape == (2, 3) and out.f.shape == (2, 3, 6) and out.plan.shape == (2, 3, 6, 5)
    (by_a,) = torch.autograd.grad(out.value.sum(), a)
    total = torch.zeros_like(by_a)
    for i in range(2):
        for k in range(3):
            mass = a[i, 0].detach().requires_grad_()
            one = otloss.sinkhorn(cost[k], mass, eps=float(eps[k]), backend=backend, **EXACT)
            torch.testing.assert_close(out.value[i, k], one.value, atol=1e-9, rtol=1e-9)
            total[i, 0] += torch.autograd.grad(one.value, mass)[0]
    torch.testing.assert_close(by_a, total, atol=1e-8, rtol=1e-8)
    many = otloss.sinkhorn(cost[0], torch.rand(7, 6, dtype=torch.float64).softmax(-1), backend=backend)
    assert many.f.shape == (7, 6)


@pytest.mark.parametrize("kind", ["cosine", "sqeuclidean", "dot"])
def test_kinds_of_cost(backend: str, kind: str) -> None:
    x, y, a, b = _problem()
    costs: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "cosine": otloss.cosine_cost,
        "sqeuclidean": otloss.sqeuclidean_cost,
        "dot": lambda x, y: -x @ y.transpose(-1, -2),
    }
    leaves = [t.requires_grad_() for t in (x, y, a, b)]
    options = {"eps": 0.3, "backend": backend, **EXACT}
    out = otloss.feature_sinkhorn(x, y, a, b, cost=kind, **options)
    dense = otloss.sinkhorn(costs[kind](x, y), a, b, **options)
    for mine, theirs in zip((out.value, out.transport_cost), (dense.value, dense.transport_cost), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)
        grads = zip(*(torch.autograd.grad(v.sum(), leaves, retain_graph=True) for v in (mine, theirs)), strict=True)
        for one, other in grads:
            torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)
    loss = otloss.FeatureSinkhornLoss(kind, eps=0.3, reduction="none", backend=backend, **EXACT)(x, y, a, b)
    torch.testing.assert_close(loss, out.transport_cost)


def test_eps_may_be_a_parameter_of_a_loss() -> None:
    x, y, _, _ = _problem(torch.float32)
    loss = otloss.CosineSinkhornLoss(eps=torch.nn.Parameter(torch.tensor(0.2)))
    assert [name for name, _ in loss.named_parameters()] == ["eps"]
    loss(x, y).backward()
    assert loss.eps.grad is not None and float(loss.eps.grad) > 0  # a larger eps blurs the plan


def test_the_divergence_under_penalties() -> None:
    """Séjourné et al. 2019 (arXiv 1910.12958): with its term in the totals it is positive, and zero for equal sets."""
    x, y, a, b = _problem()
    options = {"eps": 0.2, "rho_a": 0.5, "rho_b": 0.5, "objective": "divergence", "reduction": "none", **EXACT}
    loss = otloss.FeatureSinkhornLoss("sqeuclidean", **options)
    assert bool((loss(x, y, 3 * a, b) > 0).all())
    torch.testing.assert_close(loss(x, x, 3 * a, 3 * a), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0.0)
    leaves = [t.requires_grad_() for t in (x[:1, :3].clone(), y[:1, :2].clone(), a[:1, :3].clone(), b[:1, :2].clone())]
    assert torch.autograd.gradcheck(loss, leaves, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="one penalty for both sides"):
        otloss.FeatureSinkhornLoss(objective="divergence", rho_a=0.5)


REFUSED: list[tuple[Callable[[Tensor, Tensor], object], type[Exception], str]] = [
    (lambda x, y: otloss.cosine_sinkhorn(x, y, mask_x=torch.ones(6)), TypeError, "mask_x must be .* of dtype bool"),
    (lambda x, y: otloss.cosine_sinkhorn(x, y, mask_x=_masks()[1]), ValueError, r"mask_x must have shape \(B, 6\)"),
    (
        lambda x, y: otloss.cosine_sinkhorn(x, y, mask_y=torch.zeros(5, dtype=torch.bool)),
        ValueError,
        "mask_y must keep at least one point in every problem, unlike problem 0",
    ),
    (lambda x, y: otloss.cosine_sinkhorn(x, y, eps=torch.tensor([0.1, 0.0, 0.1])), ValueError, "eps must be positive"),
    (lambda x, y: otloss.cosine_sinkhorn(x, y, eps=torch.ones(2)), ValueError, r"broadcastable.* eps \(2,\)"),
    (
        lambda x, y: otloss.cosine_sinkhorn(x, y, torch.ones(2, 6), eps=torch.tensor(0.1)),
        ValueError,
        r"got x \(3, 6, 4\), .*, a \(2, 6\).*; beside x \(3, 6, 4\) take a \(3, 6\), \(1, 6\) or \(6,\), eps",
    ),
    (
        lambda x, y: otloss.sinkhorn(x, torch.ones(2, 7, 6)),
        ValueError,
        r"beside a \(2, 7, 6\) take cost \(2, 7, 6, 4\), \(1, 1, 6, 4\) or \(6, 4\)$",
    ),
    (
        lambda x, y: otloss.cosine_sinkhorn(x, y, b=torch.ones(3, 6)),
        ValueError,
        r"b must have shape \(B, 5\) or \(5,\) beside y \(3, 5, 4\), got \(3, 6\)",
    ),
    (lambda x, y: otloss.cosine_sinkhorn(x, y[0]), ValueError, r"got \(3, 6, 4\) and \(5, 4\); .* expand it"),
    (lambda x, y: otloss.feature_sinkhorn(x, y, cost="l1"), ValueError, "cost must be one of 'cosine', 'sqeuclidean'"),
    (lambda x, y: otloss.cosine_sinkhorn(x, y, rho_a=True), TypeError, "rho_a must be a number"),
    (
        lambda x, y: otloss.cosine_sinkhorn(x, y, mask_x=torch.tensor(True)),
        ValueError,
        r"mask_x must have shape \(B, n\), got \(\)",
    ),
    (
        lambda x, y: otloss.feature_sinkhorn(1e30 * x, 1e30 * y, cost="sqeuclidean"),
        ValueError,
        "the cost is too large for torch.float32 at eps=0.05, results are not finite; rescale both",
    ),
]


@pytest.mark.parametrize("call, kind, message", REFUSED)
def test_refusals(call: Callable[[Tensor, Tensor], object], kind: type[Exception], message: str) -> None:
    x, y, _, _ = _problem(torch.float32)
    with pytest.raises(kind, match=message):
        call(x, y)


@needs_cpu
def test_a_backend_without_penalties_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "RELAXES", False)
    x, y, _, _ = _problem()
    with pytest.raises(ValueError, match=r"'cpu' has no penalties rho_a and rho_b; take .*'reference'"):
        otloss.cosine_sinkhorn(x, y, rho_a=1.0, backend="cpu")
    assert choose_backend(None, "cpu", relaxed=True) == "reference"


@needs_cpu
@pytest.mark.parametrize("n, m", [(12, 9), (70, 90)])
@pytest.mark.parametrize("rho", [None, 1.0])
def test_what_all_problems_share_is_read_from_one_place(n: int, m: int, rho: float | None) -> None:
    """Bits are those of copies; the gradient is the sum of theirs."""
    cost, a = torch.rand(n, m), torch.rand(5, n)
    copies, once = cost.expand(5, n, m).clone().requires_grad_(), cost.clone().requires_grad_()
    outs = [otloss.sinkhorn(c, a, rho_a=rho, backend="cpu", max_iter=50) for c in (copies, once)]
    assert torch.equal(outs[0].f, outs[1].f) and torch.equal(outs[0].transport_cost, outs[1].transport_cost)
    grads = [torch.autograd.grad(out.value.sum(), c)[0] for out, c in zip(outs, (copies, once), strict=True)]
    torch.testing.assert_close(grads[1], grads[0].sum(0))
    x, y = torch.rand(n, 4), torch.rand(5, m, 4)
    for kind in ("cosine", "sqeuclidean", "dot"):
        f = [otloss.feature_sinkhorn(x.expand(5, n, 4).clone(), y, cost=kind, backend="cpu", rho_a=rho).f]
        f += [otloss.feature_sinkhorn(x.expand(5, n, 4), y, cost=kind, backend="cpu", rho_a=rho).f]
        assert torch.equal(*f)
