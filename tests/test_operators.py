"""The operators under PyTorch's own machinery: opcheck, compile, vmap, func.grad, autocast, export."""

from __future__ import annotations

import pytest
import torch
from conftest import random_problem
from grids import grid
from torch import Tensor
from torch.func import grad, vmap
from torch.library import opcheck

import otloss
from otloss import operators
from otloss.backends import get_backend
from otloss.backends.protocol import COLD, Backend, Given, Problem, Start
from otloss.gradients import Incoming, State
from otloss.operators import Options

Args = tuple[Tensor, Tensor, Tensor]


def dense_loss(cost: Tensor, za: Tensor, zb: Tensor) -> Tensor:
    out = otloss.sinkhorn(cost, log_a=za.log_softmax(-1), log_b=zb.log_softmax(-1), eps=0.2)
    return (out.transport_cost + out.value).sum() + out.plan.square().sum() + out.f.square().sum()


def feature_loss(x: Tensor, y: Tensor, za: Tensor) -> Tensor:
    out = otloss.cosine_sinkhorn(x, y, log_a=za.log_softmax(-1), eps=0.2)
    return out.transport_cost.sum() + out.value.square().sum()


def unrolled_loss(cost: Tensor, za: Tensor, zb: Tensor) -> Tensor:
    options = {"eps": 0.2, "gradient": "unroll", "max_iter": 5, "tol": 0.0}
    return otloss.sinkhorn(cost, za.softmax(-1), zb.softmax(-1), **options).transport_cost.sum()


DENSE = (torch.rand(3, 5, 6), torch.randn(3, 5), torch.randn(3, 6))
FEATURES = (torch.randn(3, 5, 16), torch.randn(3, 6, 16), torch.randn(3, 5))  # n and m small beside d: the cost is kept
LOSSES = pytest.mark.parametrize(
    ("loss", "args"), [(dense_loss, DENSE), (feature_loss, FEATURES), (unrolled_loss, DENSE)]
)


def eager(loss, args: Args) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    leaves = [arg.clone().requires_grad_() for arg in args]
    return torch.autograd.grad(loss(*leaves), leaves)


@pytest.fixture(autouse=True)
def _backend(backend: str):  # type: ignore[no-untyped-def]
    with otloss.use_backend(backend):
        yield


@LOSSES
def test_func_grad(loss, args: Args) -> None:  # type: ignore[no-untyped-def]
    for got, want in zip(grad(loss, argnums=(0, 1, 2))(*args), eager(loss, args), strict=True):
        assert torch.allclose(got, want, atol=1e-6)


@LOSSES
def test_vmap_of_grad(loss, args: Args) -> None:  # type: ignore[no-untyped-def]
    for got, want in zip(vmap(grad(loss, argnums=(0, 1, 2)))(*args), eager(loss, args), strict=True):
        assert torch.allclose(got, want, atol=1e-6)


@LOSSES
def test_vmap_with_a_shared_argument(loss, args: Args) -> None:  # type: ignore[no-untyped-def]
    got = vmap(loss, in_dims=(0, None, 0))(args[0], args[1][0], args[2])
    want = torch.stack([loss(args[0][i], args[1][0], args[2][i]) for i in range(3)])
    assert torch.allclose(got, want, atol=1e-6)


def test_a_compiled_function_follows_the_backend_that_is_forced(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []

    def note(name: str) -> Backend:
        used.append(name)
        return get_backend(name)

    monkeypatch.setattr(operators, "get_backend", note)
    compiled = torch.compile(lambda cost: otloss.sinkhorn(cost).value, fullgraph=True, backend="aot_eager")
    compiled(DENSE[0])
    with otloss.use_backend("reference"):
        compiled(DENSE[0])
    compiled(DENSE[0])
    assert used == [backend, "reference", backend]


@LOSSES
def test_compile_fullgraph(loss, args: Args) -> None:  # type: ignore[no-untyped-def]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*args), loss(*args))
    for got, want in zip(eager(compiled, args), eager(loss, args), strict=True):
        assert torch.allclose(got, want, atol=1e-6)


def test_an_output_leaves_a_compiled_function() -> None:
    torch._dynamo.reset()
    out = torch.compile(otloss.sinkhorn, fullgraph=True, backend="aot_eager")(DENSE[0])
    assert torch.allclose(out.plan, otloss.sinkhorn(DENSE[0]).plan)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_warns_of_the_callers_line(compiler: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda cost: otloss.sinkhorn(cost, eps=0.01, max_iter=2).value, backend=compiler)
    with pytest.warns(otloss.ConvergenceWarning) as caught:
        compiled(DENSE[0])
    assert {warning.filename for warning in caught if warning.category is otloss.ConvergenceWarning} == {__file__}


def test_compile_checks_values() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(dense_loss, fullgraph=True, backend="aot_eager")
    compiled(*DENSE)
    with pytest.raises(ValueError, match="cost must be finite, got NaN"):
        compiled(DENSE[0] * torch.nan, *DENSE[1:])


@LOSSES
def test_forward_mode_names_the_cure(loss, args: Args) -> None:  # type: ignore[no-untyped-def]
    for derivative in (torch.func.jacfwd(loss), torch.func.hessian(loss)):
        with pytest.raises(RuntimeError, match=r"reverse mode: torch\.func\.vjp or jacrev, and jacrev\(jacrev\(f\)\)"):
            derivative(*args)


def test_a_hessian_in_reverse_mode() -> None:
    cost, za, zb = (t.double() for t in DENSE)

    def loss(cost: Tensor) -> Tensor:
        return otloss.sinkhorn(cost, za[0].softmax(-1), zb[0].softmax(-1), eps=0.2, tol=1e-12).transport_cost

    got = torch.func.jacrev(torch.func.jacrev(loss))(cost[0])
    want = torch.autograd.functional.hessian(loss, cost[0])
    assert torch.allclose(got, want, atol=1e-10) and want.abs().max() > 0.01


def test_vmap_checks_values() -> None:
    with pytest.raises(ValueError, match="a must not hold negative mass"):
        vmap(lambda c, a: otloss.sinkhorn(c, a).value)(DENSE[0], torch.tensor([0.5, 0.5, 0.5, -0.5, 0]).repeat(3, 1))


def test_export() -> None:
    class Loss(torch.nn.Module):
        def forward(self, cost: Tensor, za: Tensor, zb: Tensor) -> Tensor:
            return dense_loss(cost, za, zb)

    exported = torch.export.export(Loss(), DENSE)
    assert torch.allclose(exported.module()(*DENSE), dense_loss(*DENSE))


def test_export_with_a_free_batch() -> None:
    class Cost(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return otloss.cosine_sinkhorn(x, y).transport_cost

    free = {0: torch.export.Dim("B", min=2, max=100)}
    exported = torch.export.export(Cost(), FEATURES[:2], dynamic_shapes=(free, free)).module()
    more = [t.repeat(3, 1, 1) for t in FEATURES[:2]]
    assert torch.allclose(exported(*more), Cost()(*more))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_while_eps_changes(dynamic: bool | None) -> None:
    torch._dynamo.reset()

    def loss(cost: Tensor, eps: float) -> Tensor:
        return otloss.sinkhorn(cost, eps=eps).transport_cost

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for eps in (0.5, 0.4, 0.3):
        assert torch.allclose(compiled(DENSE[0], eps), loss(DENSE[0], eps))
    with pytest.raises(ValueError, match="eps must be positive and finite"):
        loss(DENSE[0], float("nan"))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Observed exception"):
        compiled(DENSE[0], float("nan"))


def test_vmap_of_nothing() -> None:
    assert vmap(lambda cost: otloss.sinkhorn(cost).transport_cost)(torch.empty(0, 3, 4)).shape == (0,)
    assert vmap(lambda cost: otloss.sinkhorn(cost).transport_cost)(torch.empty(2, 0, 3, 4)).shape == (2, 0)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(half: torch.dtype) -> None:
    """The products inside stay in float32; only what happens outside the library is autocast."""
    for loss, args in ((dense_loss, DENSE), (feature_loss, FEATURES)):
        with torch.autocast("cpu", dtype=half):
            got = eager(loss, args)
        for one, other in zip(got, eager(loss, args), strict=True):
            assert torch.equal(one, other)
    with torch.autocast("cpu", dtype=half):
        by_func = grad(feature_loss, argnums=(0, 1, 2))(*FEATURES)
    for one, other in zip(by_func, eager(feature_loss, FEATURES), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    with torch.autocast("cpu", dtype=half):
        assert otloss.cosine_cost(*FEATURES[:2]).dtype == torch.float32


@pytest.mark.parametrize(
    ("dimension", "permuted", "given"),
    grid((None, 3, 16), (False, True), (("masses", "logs"), ("uniform", "masses"))),
)
def test_opcheck(backend: str, dimension: int | None, permuted: bool, given: tuple[str, str]) -> None:
    """With a dense cost, with features whose cost is not kept for the gradient, and where the cpu backend keeps it."""
    cost, a, b = random_problem(2, n=4, m=5, dtype=torch.float32)
    if given[1] == "logs":
        b = b.log()
    if permuted:
        a, cost = a.T.contiguous().T, cost.mT.contiguous().mT
    left, right = (torch.randn(2, 4, dimension), torch.randn(2, 5, dimension)) if dimension else (cost, None)
    problem, forms = Problem(left, right, a, b, 0.1), Given(*given, 1e-4)
    options = Options(50, 1e-5, True, True, "implicit", backend)
    start = Start(torch.rand(2, 4), torch.rand(2, 5)) if permuted else COLD
    opcheck(operators.solve, (*problem, *forms, *options, *start))
    state = State(*operators.solve(*problem, *forms, *options, *start)[3:])
    assert state.kept.numel() == (40 if dimension == 16 and backend == "cpu" else 0)
    w, p, q = torch.rand(2), torch.rand(2, 4), torch.rand(2, 5)
    unrolled = options._replace(mode="unroll")
    for need_cost in (True, False):
        for incoming, how in (((w, None, p, q, p, None), options), ((w, w, None, None, None, q), unrolled)):
            opcheck(operators.gradient, (*problem, *state, *Incoming(*incoming), need_cost, *forms, *how))


def test_module_in_a_compiled_training_step() -> None:
    """A compiled step of a small model with the loss: the same parameters as the eager one."""
    torch._dynamo.reset()

    def step(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = x @ weight
        return otloss.cosine_sinkhorn(features, y, eps=0.1, max_iter=500).transport_cost.mean()

    weight = torch.randn(16, 16, requires_grad=True)
    x, y = FEATURES[:2]
    (want,) = torch.autograd.grad(step(weight, x, y), weight)
    (got,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(weight, x, y), weight)
    assert torch.allclose(got, want, rtol=1e-2, atol=1e-3)
