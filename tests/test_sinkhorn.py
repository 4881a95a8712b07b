"""The verb: closed forms, shapes, dtypes, limits and bad input."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import ot
import pytest
import torch
from conftest import random_problem, relative

import otloss
from otloss import cosine_sinkhorn, sinkhorn


def test_one_row_sends_its_mass_to_b(backend: str) -> None:
    cost, _, b = random_problem(3, n=1, m=7)
    out = sinkhorn(cost, None, b, backend=backend)
    assert torch.allclose(out.plan[:, 0], b, atol=1e-14)
    assert torch.allclose(out.transport_cost, (cost[:, 0] * b).sum(-1), atol=1e-14)
    assert torch.allclose(out.value, out.transport_cost, atol=1e-12)  # KL(ab' | ab') = 0


def test_two_by_two_closed_form(backend: str) -> None:
    # Uniform marginals, C = [[0, c], [c, 0]]: T = [[t, 1/2 - t], ...] with t / (1/2 - t) = exp(c / eps).
    c, eps = 0.3, 0.1
    cost = torch.tensor([[0.0, c], [c, 0.0]], dtype=torch.float64)
    out = sinkhorn(cost, eps=eps, tol=1e-13, max_iter=1000, backend=backend)
    ratio = torch.exp(torch.tensor(c / eps, dtype=torch.float64))
    t = 0.5 * ratio / (1 + ratio)
    assert torch.allclose(out.plan[0, 0], t, atol=1e-12)
    assert torch.allclose(out.transport_cost, 2 * c * (0.5 - t), atol=1e-12)


def test_permutation_is_found(backend: str) -> None:
    order = torch.randperm(9)
    cost = 1 - torch.eye(9, dtype=torch.float64)[order]
    out = sinkhorn(cost, eps=0.01, backend=backend)
    assert torch.allclose(out.plan, (1 - cost) / 9, atol=1e-12)


def test_large_eps_gives_the_independent_coupling(backend: str) -> None:
    cost, a, b = random_problem(2, n=6, m=4)
    out = sinkhorn(cost, a, b, eps=1e4, tol=1e-10, backend=backend)
    # |log k| <= 2 max C / eps
    assert torch.allclose(out.plan, a[:, :, None] * b[:, None, :], rtol=3e-4, atol=0)


def test_small_eps_tends_to_emd(backend: str) -> None:
    """0 <= <T, C> - emd <= eps * (entropy of the plan's support) <= eps * log(n m)."""
    cost, a, b = random_problem(n=20, m=15)
    for eps in (0.01, 0.003):
        out = sinkhorn(cost, a, b, eps=eps, max_iter=50000, tol=1e-9, backend=backend)
        exact = ot.emd2(a.numpy(), b.numpy(), cost.numpy())
        gap = float(out.transport_cost) - exact
        assert -1e-8 < gap < eps * float(torch.tensor(20.0 * 15).log())
        assert out.converged


def test_tiny_eps_in_float32_is_finite_and_near_emd(backend: str) -> None:
    cost, a, b = random_problem(n=64, m=64, dtype=torch.float32)
    out = sinkhorn(cost, a, b, eps=1e-3, max_iter=3000, tol=0.0, backend=backend)
    a64, b64 = a.double() / a.double().sum(), b.double() / b.double().sum()
    exact = ot.emd2(a64.numpy(), b64.numpy(), cost.double().numpy())
    assert abs(float(out.transport_cost) - exact) < 0.02 * exact
    for part in (out.f, out.g, out.plan, out.value):
        assert part.isfinite().all()


@pytest.mark.parametrize("eps", [1e-3, 1e-2, 0.05, 0.5])
def test_float32_follows_float64(backend: str, eps: float) -> None:
    cost, a, b = random_problem(4, n=33, m=70)
    cost = 2 * cost
    exact = sinkhorn(cost, a, b, eps=eps, max_iter=200, tol=0.0, backend="reference")
    got = sinkhorn(cost.float(), a.float(), b.float(), eps=eps, max_iter=200, tol=0.0, backend=backend)
    # A rounding of the cost by 2^-24 |C| moves the exponent by that over eps, and the plan by as much.
    slack = max(1e-5, 8 * 2 * 2**-24 / eps)
    assert relative(got.transport_cost, exact.transport_cost) < slack
    assert relative(got.value, exact.value) < slack
    assert float((got.f - exact.f).abs().max()) < 1e-5


def test_leading_dimensions_are_free(backend: str) -> None:
    cost, a, b = random_problem(2, 3, n=4, m=5)
    out = sinkhorn(cost, a, b, backend=backend)
    assert out.plan.shape == (2, 3, 4, 5) and out.f.shape == (2, 3, 4) and out.g.shape == (2, 3, 5)
    for part in (out.transport_cost, out.value, out.n_iter, out.marginal_error, out.converged):
        assert part.shape == (2, 3)
    alone = sinkhorn(cost[1, 2], a[1, 2], b[1, 2], backend=backend)
    assert alone.transport_cost.shape == () and alone.plan.shape == (4, 5)
    assert torch.equal(alone.transport_cost, out.transport_cost[1, 2]) or backend == "reference"
    assert torch.allclose(alone.transport_cost, out.transport_cost[1, 2], atol=1e-12)


def test_empty_batch(backend: str) -> None:
    cost = torch.rand(0, 4, 5, requires_grad=True)
    out = sinkhorn(cost, backend=backend)
    assert out.transport_cost.shape == (0,) and out.plan.shape == (0, 4, 5)
    out.transport_cost.sum().backward()
    assert cost.grad is not None and cost.grad.shape == (0, 4, 5)


def test_shared_marginals_broadcast(backend: str) -> None:
    cost, a, b = random_problem(3, n=4, m=5)
    shared = sinkhorn(cost, a[0], log_b=b[0].log(), backend=backend)
    full = sinkhorn(cost, a[:1].expand(3, 4), b[:1].expand(3, 5), backend=backend)
    assert torch.allclose(shared.plan, full.plan, atol=1e-12)


def test_masses_are_normalised(backend: str) -> None:
    cost, a, b = random_problem(3, n=4, m=5)
    assert torch.allclose(
        sinkhorn(cost, 7 * a, 7 * b, backend=backend).plan, sinkhorn(cost, a, b, backend=backend).plan, atol=1e-14
    )


def test_value_is_cost_plus_entropy_also_unconverged(backend: str) -> None:
    cost, a, b = random_problem(3, n=4, m=5)
    out = sinkhorn(cost, a, b, eps=0.1, max_iter=2, tol=0.0, backend=backend)
    kl = (out.plan * (out.plan / (a[:, :, None] * b[:, None, :])).log()).sum((-1, -2)) - out.plan.sum((-1, -2)) + 1
    assert torch.allclose(out.value, (out.plan * cost).sum((-1, -2)) + 0.1 * kl, atol=1e-12)
    assert torch.allclose(out.transport_cost, (out.plan * cost).sum((-1, -2)), atol=1e-12)


def test_marginal_error_and_iterations_are_reported(backend: str) -> None:
    cost, a, b = random_problem(5, n=12, m=9)
    out = sinkhorn(cost, a, b, tol=1e-6, max_iter=5000, backend=backend)
    assert torch.allclose(out.marginal_error, (out.plan.sum(-1) - a).abs().sum(-1), atol=1e-12)
    assert torch.allclose(out.plan.sum(-2), b, atol=1e-12)
    assert out.converged.all() and (out.marginal_error < 1e-6).all()
    # One iteration fewer would not have been enough: the stop is the first state below tol.
    for i in range(5):
        before = sinkhorn(cost[i], a[i], b[i], tol=0.0, max_iter=int(out.n_iter[i]) - 1, backend=backend)
        assert before.marginal_error >= 1e-6


def test_not_converged_warns_and_says_so(backend: str) -> None:
    cost, a, b = random_problem(3, n=12, m=9)
    with pytest.warns(otloss.ConvergenceWarning, match="did not reach tol") as caught:
        out = sinkhorn(cost, a, b, eps=0.01, max_iter=2, backend=backend)
    assert caught[0].filename == __file__  # of the caller's line, not PyTorch's
    with pytest.warns(otloss.ConvergenceWarning):
        exec("sinkhorn(cost, eps=0.01, max_iter=2)", {"sinkhorn": sinkhorn, "cost": cost})
    assert not out.converged.any() and (out.n_iter == 2).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkhorn(cost, a, b, eps=0.01, max_iter=2, tol=0.0, backend=backend)  # asked for: no warning


def test_warns_of_the_caller_where_compiled_code_lies_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/scratch/kernels")
    for file, found in (("/scratch/kernels/ab/cab.py", __file__), ("/home/scratch/kernels/train.py",) * 2):
        call = compile("sinkhorn(cost, eps=0.01, max_iter=2)", file, "exec")
        with pytest.warns(otloss.ConvergenceWarning) as caught:
            exec(call, {"sinkhorn": sinkhorn, "cost": random_problem(3, n=12, m=9)[0]})
        assert caught[0].filename == found


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_float32(backend: str, half: torch.dtype) -> None:
    cost = torch.rand(2, 6, 5).to(half).requires_grad_()
    a = torch.rand(2, 6).softmax(-1)
    out = sinkhorn(cost, a, backend=backend)
    assert out.transport_cost.dtype == torch.float32
    assert torch.equal(out.transport_cost, sinkhorn(cost.float(), a, backend=backend).transport_cost)
    out.transport_cost.sum().backward()
    assert cost.grad is not None and cost.grad.dtype == half
    # Masses that went through half precision no longer sum to 1; they are renormalised.
    rounded = sinkhorn(cost, a.to(half), backend=backend)
    assert torch.allclose(rounded.plan.sum((-1, -2)), torch.ones(2))


def test_layouts_do_not_matter(backend: str) -> None:
    cost, a, b = random_problem(3, n=6, m=4)
    expected = sinkhorn(cost, a, b, backend=backend).transport_cost
    strided = cost.transpose(-1, -2).contiguous().transpose(-1, -2)
    other = sinkhorn(strided, a, b, backend=backend)
    expanded = sinkhorn(cost[:1].expand(3, 6, 4), a[0], b[0], backend=backend).transport_cost
    # PyTorch, unlike the kernels, sums in an order that follows the layout. An iteration takes two sums of up to 6
    # terms, exponentials and logarithms: some 20 roundings, of numbers up to 1 in an exponent that is over eps = 0.05.
    slack = 0.0 if backend == "cpu" else 20 * float(other.n_iter.max()) * 2**-53 / 0.05
    assert torch.allclose(other.transport_cost, expected, rtol=slack, atol=0)
    assert torch.allclose(expanded[0], expanded[2], rtol=slack, atol=0)


@pytest.mark.parametrize("scale", [1e3, -1e3])
def test_far_costs_are_solved(backend: str, scale: float) -> None:
    """|C| / eps of 1e4 and more, of either sign: only differences matter."""
    cost, a, b = random_problem(n=6, m=5, dtype=torch.float64)
    near = sinkhorn(cost, a, b, backend=backend)
    far = sinkhorn(cost + scale, a, b, backend=backend)
    assert torch.allclose(near.plan, far.plan, atol=1e-9)
    single = sinkhorn((cost * scale).float(), a.float(), b.float(), eps=0.1, max_iter=100, tol=0.0, backend=backend)
    assert single.plan.isfinite().all() and single.f.isfinite().all()


def test_masked_is_cropped(backend: str) -> None:
    cost, a, b = random_problem(n=9, m=7)
    rows, columns = torch.tensor([0, 2, 3, 7]), torch.tensor([1, 2, 6])
    log_a, log_b = torch.full((9,), -torch.inf), torch.full((7,), -torch.inf)
    log_a, log_b = log_a.double(), log_b.double()
    log_a[rows], log_b[columns] = a[rows].log(), b[columns].log()
    with pytest.raises(ValueError, match="same total mass"):
        sinkhorn(cost, log_a=log_a, log_b=log_b, backend=backend)
    log_a, log_b = log_a.log_softmax(-1), log_b.log_softmax(-1)
    masked = sinkhorn(cost, log_a=log_a, log_b=log_b, backend=backend)
    cropped = sinkhorn(cost[rows][:, columns], log_a=log_a[rows], log_b=log_b[columns], backend=backend)
    assert torch.allclose(masked.transport_cost, cropped.transport_cost, atol=1e-14)
    assert torch.allclose(masked.f[rows], cropped.f, atol=1e-13) and masked.f.isfinite().all()
    assert int(masked.n_iter) == int(cropped.n_iter)
    # Two sums of the same 12 masses, which total 1, in any order: 11 roundings each.
    live = float(masked.plan[rows][:, columns].sum())
    assert float(masked.plan.sum()) == pytest.approx(live, abs=2 * 11 * 2**-53)


def test_features_equal_their_cost(backend: str) -> None:
    x, y = torch.randn(3, 10, 4, dtype=torch.float64), torch.randn(3, 8, 4, dtype=torch.float64)
    x[0, 3] = 0  # a dead channel: cost 1 to everything
    from_features = cosine_sinkhorn(x, y, max_iter=1000, backend=backend)
    from_cost = sinkhorn(otloss.cosine_cost(x, y), max_iter=1000, backend=backend)
    assert torch.allclose(from_features.transport_cost, from_cost.transport_cost, atol=1e-12)
    assert torch.allclose(from_features.plan, from_cost.plan, atol=1e-12)


def test_cosine_cost() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-29, 0.0], [1e30, 0.0]], requires_grad=True)
    cost = otloss.cosine_cost(x, x.detach())
    expected = torch.tensor([[0, 1, 0.4, 0.4], [1, 1, 1, 1], [0.4, 1, 0, 0], [0.4, 1, 0, 0]])
    assert torch.allclose(cost, expected, atol=1e-6) and (cost[1] == 1).all() and (cost >= 0).all()
    (grad,) = torch.autograd.grad(cost.sum(), x)
    assert (grad[1] == 0).all() and grad.isfinite().all()
    pair = (torch.randn(2, 5, 3, dtype=torch.double, requires_grad=True), torch.randn(2, 4, 3, dtype=torch.double))
    assert torch.autograd.gradcheck(otloss.cosine_cost, pair) and torch.autograd.gradgradcheck(otloss.cosine_cost, pair)


BAD = [
    (lambda c, a: sinkhorn([[1.0]]), TypeError, "cost must be a tensor"),
    (lambda c, a: sinkhorn(c.long()), TypeError, "cost must be a floating-point"),
    (lambda c, a: sinkhorn(c[0, 0]), ValueError, r"cost must have shape \(B, n, m\)"),
    (lambda c, a: sinkhorn(c[:, :0]), ValueError, "at least one row"),
    (lambda c, a: sinkhorn(c, a[:, :-1]), ValueError, r"a must have shape \(B, 4\)"),
    (lambda c, a: sinkhorn(c, torch.rand(5, 4)), ValueError, "broadcastable"),
    (lambda c, a: sinkhorn(c, a, log_a=a), ValueError, "a or log_a, not both"),
    (lambda c, a: sinkhorn(c, a.double()), TypeError, "float64 does not mix"),
    (lambda c, a: sinkhorn(c, a, torch.rand(2, 5)), ValueError, "same total mass"),
    (lambda c, a: sinkhorn(c, -a), ValueError, "a must be finite masses with a positive total"),
    (lambda c, a: sinkhorn(c, a - a.amax()), ValueError, "a must"),
    (lambda c, a: sinkhorn(c, torch.tensor([0.5, 0.7, -0.2, 0.0])), ValueError, "a must not hold negative mass"),
    (lambda c, a: sinkhorn(c, a * float("nan")), ValueError, "a must be finite"),
    (lambda c, a: sinkhorn(c, log_a=torch.full((4,), -torch.inf)), ValueError, "^log_a must be .* a positive total"),
    (lambda c, a: sinkhorn(c, b=torch.full((5,), torch.nan)), ValueError, "^b must be finite"),
    (lambda c, a: sinkhorn(c, log_a=a, log_b=torch.full((5,), torch.nan)), ValueError, "^log_b must be log"),
    (lambda c, a: sinkhorn(c, a.numpy()), TypeError, r"a must be a tensor of shape \(B, n\), got ndarray"),
    (lambda c, a: sinkhorn(c, b=[0.2] * 5), TypeError, r"b must be a tensor of shape \(B, m\), got list"),
    (lambda c, a: sinkhorn(c.masked_fill(c > 0.5, torch.nan)), ValueError, "cost must be finite, got NaN"),
    (lambda c, a: sinkhorn(c * torch.inf), ValueError, "cost must be finite for one pair .* row 0 of problem 0"),
    (lambda c, a: sinkhorn(c.masked_fill(c > 0.5, -torch.inf)), ValueError, "cost must be finite, got -inf"),
    (lambda c, a: sinkhorn(c.to_sparse()), TypeError, "cost must be a dense tensor, got one that is torch.sparse"),
    (lambda c, a: sinkhorn(torch.nested.nested_tensor([c[0]])), TypeError, "cost must be a dense .* is nested"),
    (lambda c, a: sinkhorn(c, b=torch.full((5,), 2e38)), ValueError, "^b must be masses whose total is finite in"),
    (lambda c, a: sinkhorn(c, eps=0), ValueError, "eps must be positive"),
    (lambda c, a: sinkhorn(c, eps=float("nan")), ValueError, "eps must be positive"),
    (lambda c, a: sinkhorn(c, eps="0.1"), TypeError, "eps must be a number"),
    (lambda c, a: sinkhorn(c, tol=-1.0), ValueError, "tol must be at least 0"),
    (lambda c, a: sinkhorn(c, max_iter=0), ValueError, "max_iter must be at least 1"),
    (lambda c, a: sinkhorn(c, max_iter=2.5), TypeError, "max_iter must be an integer"),
    (lambda c, a: sinkhorn(c, gradient="envelope"), ValueError, "gradient must be one of 'implicit'"),
    (lambda c, a: sinkhorn(c, backend="gpu"), ValueError, "backend must be one of"),
    (lambda c, a: sinkhorn(c, backend=[]), ValueError, "backend must be one of"),
    (lambda c, a: cosine_sinkhorn(c, c[..., :-1]), ValueError, "one dimension d"),
    (lambda c, a: cosine_sinkhorn(c, c[:1]), ValueError, "same leading dimensions"),
    (lambda c, a: cosine_sinkhorn(c * float("nan"), c), ValueError, "x must be finite"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call(torch.rand(2, 4, 5), torch.rand(2, 4).softmax(-1))


def test_backends_and_their_choice() -> None:
    status = otloss.backends()
    assert status["reference"] and str(status["reference"]) == "usable"
    cost, a, b = random_problem(n=3, m=3, dtype=torch.float64)
    with otloss.use_backend("reference"):
        out = sinkhorn(cost.requires_grad_(), a, b, eps=0.5, gradient="unroll")
        (first,) = torch.autograd.grad(out.value.sum(), cost, create_graph=True)
        assert first.grad_fn is not None
        torch.autograd.grad(first.square().sum(), cost)  # only the reference differentiates iterations twice
    with pytest.raises(ValueError, match="backend must be one of"), otloss.use_backend("tpu"):
        pass


def test_plan_notices_that_the_cost_was_changed_in_place() -> None:
    cost = torch.rand(3, 4, 4)
    out, early = sinkhorn(cost), sinkhorn(cost)
    plan = early.plan
    cost.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        _ = out.plan
    assert early.plan is plan


def test_plan_read_without_gradients_does_not_lose_them() -> None:
    cost = torch.rand(3, 4, 4, requires_grad=True)
    out = sinkhorn(cost)
    with torch.no_grad():
        assert not out.plan.requires_grad
    assert out.plan.requires_grad and out.plan is out.plan


@pytest.mark.parametrize("unbatched", [False, True])
def test_plan_of_a_problem_solved_without_gradients_has_none(backend: str, unbatched: bool) -> None:
    """Its potentials do not follow the cost, so that what the plan would pass on is a part of the gradient only."""
    shape = (3, 4) if unbatched else (2, 3, 4)
    cost, late = torch.rand(shape, requires_grad=True), torch.rand(shape)
    with torch.no_grad():
        constant = sinkhorn(cost, backend=backend)
    with torch.inference_mode():
        inferred = sinkhorn(cost, backend=backend)
    before = sinkhorn(late, backend=backend)
    late.requires_grad_()
    assert not constant.plan.requires_grad and not inferred.plan.requires_grad and not before.plan.requires_grad
    assert torch.equal(constant.plan, inferred.plan)
    x, y = torch.rand(3, 2, requires_grad=True), torch.rand(4, 2)
    partly, whole = (cosine_sinkhorn(x, y, backend=backend) for _ in range(2))
    expected = torch.autograd.grad(whole.plan.square().sum(), x)
    y.requires_grad_()
    assert torch.equal(torch.autograd.grad(partly.plan.square().sum(), (x, y), allow_unused=True)[0], expected[0])


def test_outputs_can_be_pickled() -> None:
    cost = torch.rand(3, 4).add_(1)  # written in place before it was solved
    out = sinkhorn(cost)
    again = pickle.loads(pickle.dumps(out))
    assert torch.equal(again.plan, out.plan)
    tracked = torch.rand(3, 4, requires_grad=True)
    copy, solved = pickle.loads(pickle.dumps((tracked, sinkhorn(tracked))))
    # Its potentials no longer follow the cost, so that the plan does not either.
    assert torch.autograd.grad(solved.plan.square().sum(), copy, allow_unused=True) == (None,)
    cost.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        pickle.dumps(out)


def test_numbers_may_be_of_numpy() -> None:
    cost = torch.rand(3, 4)
    out = sinkhorn(cost, eps=np.float32(0.25), max_iter=np.int64(50), tol=np.float64(1e-4))
    assert torch.equal(out.plan, sinkhorn(cost, eps=0.25, max_iter=50, tol=1e-4).plan)


def test_large_totals_are_compared_exactly() -> None:
    a = torch.tensor([1.1e7, 3.3e6, 1.2e6, 0.7e6])
    assert sinkhorn(torch.rand(4, 4), a, a.flip(0)).plan.sum() == pytest.approx(1, abs=1e-5)
    for masses, off in ((a, 1.001), (a.double(), 1.00001)):
        with pytest.raises(ValueError, match="same total mass"):
            sinkhorn(torch.rand(4, 4, dtype=masses.dtype), masses, masses * off)
    log_a = 1e4 + torch.rand(4)  # a float32 of this size is known to 5e-4, and its exponential is not finite
    assert sinkhorn(torch.rand(4, 4), log_a=log_a, log_b=log_a.flip(0)).plan.sum() == pytest.approx(1, abs=1e-5)


def test_a_softmax_over_many_points_has_total_one() -> None:
    """Logits of two values round alike: in float32 the masses of PyTorch's own softmax are 2e-6 off together.

    How far depends on the processor, so that here they are put off by that much.
    """
    logits = torch.where(torch.rand(4, 4096) < 0.5, 0.0, 0.1).double()
    b, cost = torch.full((3,), 1 / 3), torch.rand(4, 4096, 3)
    a = ((1 + 2e-6) * logits.softmax(-1)).float()  # each mass rounds by 6e-8 of itself at most, hence so does the total
    assert (a.double().sum(-1) - 1).min() > 1.9e-6
    for masses in ({"a": a}, {"log_a": a.log()}):
        assert sinkhorn(cost, **masses, b=b, eps=0.5).converged.all()


def test_rows_too_small_to_have_a_direction_are_zero(backend: str) -> None:
    x, y = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
    x[:, 1] *= 1e-32
    out = cosine_sinkhorn(x, y, max_iter=1000, backend=backend)
    zero = x.index_fill(1, torch.tensor(1), 0.0)
    assert torch.equal(out.transport_cost, cosine_sinkhorn(zero, y, max_iter=1000, backend=backend).transport_cost)
    assert torch.allclose(out.plan.sum(-1), torch.full((2, 5), 0.2), atol=1e-4)


def test_a_device_without_autocast() -> None:
    assert sinkhorn(torch.rand(3, 4, 5, device="meta"), backend="reference").plan.shape == (3, 4, 5)


def test_repr_counts_the_converged() -> None:
    assert "converged=2/2" in repr(sinkhorn(torch.rand(2, 3, 3)))
