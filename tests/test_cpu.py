"""The C++ kernels against a float64 log-domain oracle, finite differences and the reference; then what C++ alone can
get wrong: block and vector boundaries, threads, forks, instruction levels.

Tolerances. A float carries ``u`` = 2^-24 (2^-53) of relative error. A cost of size c enters an exponent as c/eps, so an
entry of the plan is known to about ``u c / eps``; sums of n terms add little to that, a gradient of the plan another
1/eps. ``slack`` is that bound with room for the constants.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import Tensor

from otloss.backends import cpu, reference

pytestmark = pytest.mark.skipif(cpu.status() is not None, reason=f"cpu backend: {cpu.status()}")

DTYPES = (torch.float32, torch.float64)
EPS = 0.1
# Around the lanes (2, 4, 8, 16), the row blocks (8), the tiles (32) and the product's panels (32 columns of float32).
SIZES = [
    (1, 1),
    (1, 7),
    (9, 1),
    (2, 3),
    (7, 8),
    (8, 9),
    (15, 17),
    (16, 16),
    (17, 31),
    (31, 33),
    (33, 32),
    (65, 63),
    (130, 257),
]


def slack(dtype: torch.dtype, eps: float = EPS, size: float = 2.0, room: float = 16.0) -> float:
    return room * torch.finfo(dtype).eps / 2 * max(1.0, size / eps)


def close(got: Tensor, want: Tensor | np.ndarray, tolerance: float) -> None:
    """Largest difference, relative to the largest entry wanted; what vanishes is what is left of terms above 0.1."""
    want = torch.as_tensor(want, dtype=torch.float64)
    size = float(want.abs().max()) if want.numel() else 0.0
    assert got.isfinite().all()
    difference = float((got.double() - want).abs().max()) if want.numel() else 0.0
    assert difference <= tolerance * max(size, 0.1), (difference / max(size, 0.1), tolerance)


def features(n: int, m: int, dtype: torch.dtype, batch: int = 2, d: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = torch.randn(batch, n, d, dtype=dtype), torch.randn(batch, m, d, dtype=dtype)
    return x, y, torch.randn(batch, n, dtype=dtype).softmax(-1), torch.randn(batch, m, dtype=dtype).softmax(-1)


def upstream(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w, v, p, q = torch.randn_like(a[:, 0]), torch.randn_like(a[:, 0]), torch.randn_like(a) * a, torch.randn_like(b) * b
    return w, v, p, q + b * (p.sum(-1) - q.sum(-1)).unsqueeze(-1)


def oracle(cost: Tensor, a: Tensor, b: Tensor, eps: float, iterations: int) -> tuple[np.ndarray, ...]:
    """f, g, transport cost and value of plain log-domain iterations in float64."""
    c, a, b = (np.asarray(t.double()) for t in (cost, a, b))
    with np.errstate(divide="ignore"):
        log_a, log_b = np.log(a)[:, :, None], np.log(b)[:, None, :]
    f, g = np.zeros_like(a), np.zeros_like(b)
    for _ in range(iterations):
        f = -eps * logsumexp((g[:, None, :] - c) / eps + log_b, axis=2)
        g = -eps * logsumexp((f[:, :, None] - c) / eps + log_a, axis=1)
    f_dead = -eps * logsumexp((g[:, None, :] - c) / eps + log_b, axis=2)
    f = np.where(a > 0, f, f_dead)
    shift = ((b * g).sum(1) - (a * f).sum(1))[:, None] / 2
    f, g = f + shift, g - shift
    plan = np.exp((f[:, :, None] + g[:, None, :] - c) / eps + log_a + log_b)
    sharp = (plan * c).sum((1, 2))
    value = (plan.sum(2) * f).sum(1) + (plan.sum(1) * g).sum(1) - eps * (plan.sum((1, 2)) - 1)
    return f, g, sharp, value


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return reference.dense_cost(x.double(), y.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_solve_runs_the_iterations_of_the_oracle(n: int, m: int, dtype: torch.dtype) -> None:
    x, y, a, b = features(n, m, dtype)
    want = oracle(cosine(x, y), a, b, EPS, 6)
    for problem in ((x, y), (cosine(x, y).to(dtype), None)):
        *got, n_iter, error = cpu.solve(*problem, a, b, EPS, 6, 0.0)
        for g, w in zip(got, want, strict=True):
            close(g, w, slack(dtype))
        assert n_iter.tolist() == [6, 6]
        f, g = want[:2]
        plan = np.exp((f[:, :, None] + g[:, None] - np.asarray(cosine(x, y))) / EPS) * np.asarray(a.double())[..., None]
        rows = (plan * np.asarray(b.double())[:, None]).sum(2)
        assert np.allclose(error, np.abs(rows - np.asarray(a.double())).sum(1), rtol=1e-2, atol=slack(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_implicit_gradient_is_that_of_the_reference(n: int, m: int, adjoint: bool, dtype: torch.dtype) -> None:
    x, y, a, b = features(n, m, dtype)
    f, g = (t.to(dtype) for t in cpu.solve(x.double(), y.double(), a.double(), b.double(), EPS, 2000, 1e-13)[:2])
    up = upstream(a, b)
    for left, right in ((x, y), (cosine(x, y).to(dtype), None)):
        problem = (left, right, a, b, f, g, *up)
        want = reference.implicit_gradient(*(None if t is None else t.double() for t in problem), EPS, adjoint, True)
        got = cpu.implicit_gradient(*problem, EPS, adjoint, True)
        # The system's own condition, 1/(1 - sigma^2), multiplies the error of the right-hand side.
        for k, (p, q) in enumerate(zip(got[:4], want[:4], strict=True)):
            if k in (2, 3):  # the marginals' gradients up to a constant: the gauge of U and V is free
                p, q = p - p.mean(-1, keepdim=True), q - q.mean(-1, keepdim=True)
            close(p, q, slack(dtype, room=300.0))
        assert (got[4] < (1e-5 if dtype == torch.float32 else 1e-10)).all()
        without = cpu.implicit_gradient(*problem, EPS, adjoint, False)
        assert without[0].numel() == without[1].numel() == 0
        assert torch.equal(without[2], got[2]) and torch.equal(without[3], got[3])


def tangents(cost: Tensor, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """One direction in the cost and one mass-preserving direction in each marginal."""
    da, db = torch.randn_like(a) * a, torch.randn_like(b) * b
    da, db = da - a * da.sum(-1, keepdim=True), db - b * db.sum(-1, keepdim=True)
    zero = torch.zeros_like
    return [(torch.randn_like(cost), zero(a), zero(b)), (zero(cost), da, zero(b)), (zero(cost), zero(a), db)]


@pytest.mark.parametrize("eps", [0.05, 1.0])
def test_implicit_gradient_against_finite_differences(eps: float) -> None:
    x, y, a, b = features(6, 9, torch.float64)
    cost, (w, v, p, q) = cosine(x, y), upstream(a, b)

    def loss(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        f, g, sharp, value, *_ = cpu.solve(cost, None, a, b, eps, 20000, 1e-14)
        return (w * sharp + v * value + (p * f).sum(-1) + (q * g).sum(-1)).sum()

    f, g = cpu.solve(cost, None, a, b, eps, 20000, 1e-14)[:2]
    grads = cpu.implicit_gradient(cost, None, a, b, f, g, w, v, p, q, eps, True, True)
    step = 1e-5
    for tangent in tangents(cost, a, b):
        ahead, behind = (
            loss(*(z + s * dz for z, dz in zip((cost, a, b), tangent, strict=True))) for s in (step, -step)
        )
        slope = sum((grads[k] * dz).sum() for k, dz in zip((0, 2, 3), tangent, strict=True))
        # Third derivatives grow as 1/eps^3: a central difference is right to step^2 / eps^3.
        assert float(slope) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-5, abs=10 * step**2 / eps**3)


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_unrolled_gradient_against_finite_differences(iterations: int) -> None:
    x, y, a, b = features(6, 9, torch.float64)
    cost, (w, v, *_) = cosine(x, y), upstream(a, b)

    def loss(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        sharp, value = cpu.solve(cost, None, a, b, EPS, iterations, 0.0)[2:4]
        return (w * sharp + v * value).sum()

    counts = torch.full((2,), iterations)
    grads = cpu.unrolled_gradient(cost, None, a, b, counts, w, v, EPS, True)
    step = 1e-5
    for tangent in tangents(cost, a, b):
        ahead, behind = (
            loss(*(z + s * dz for z, dz in zip((cost, a, b), tangent, strict=True))) for s in (step, -step)
        )
        slope = sum((grads[k] * dz).sum() for k, dz in zip((0, 2, 3), tangent, strict=True))
        assert float(slope) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-5, abs=10 * step**2 / EPS**3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_unrolled_gradient_is_that_of_the_reference(n: int, m: int, dtype: torch.dtype) -> None:
    x, y, a, b = features(n, m, dtype)
    w, v, *_ = upstream(a, b)
    counts = torch.tensor([3, 8])
    for problem in ((x, y, a, b), (cosine(x, y).to(dtype), None, a, b)):
        double = [None if t is None else t.double() for t in problem]
        want = reference.unrolled_gradient(*double, counts, w.double(), v.double(), EPS, True, 8)
        got = cpu.unrolled_gradient(*problem, counts, w, v, EPS, True)
        for p, q in zip(got, want, strict=True):
            close(p, q, slack(dtype, room=100.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_mass_is_cropping(dtype: torch.dtype) -> None:
    x, y, a, b = features(19, 37, dtype)
    rows, columns = torch.arange(19) % 3 != 0, torch.arange(37) % 4 != 1
    a, b = a * rows, b * columns
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    small = [t.contiguous() for t in (x[:, rows], y[:, columns], a[:, rows], b[:, columns])]
    whole, crop = cpu.solve(x, y, a, b, EPS, 30, 0.0), cpu.solve(*small, EPS, 30, 0.0)
    f, g = oracle(cosine(x, y), a, b, EPS, 30)[:2]
    close(whole[0], f, slack(dtype))
    close(whole[1], g, slack(dtype))
    for got, want in zip((whole[0][:, rows], whole[1][:, columns], *whole[2:4]), crop[:4], strict=True):
        close(got, want, slack(dtype))
    w, v, p, q = upstream(a, b)
    big = cpu.implicit_gradient(x, y, a, b, *whole[:2], w, v, p, q, EPS, True, True)
    cut = cpu.implicit_gradient(*small, *crop[:2], w, v, p[:, rows], q[:, columns], EPS, True, True)
    assert not big[0][:, ~rows].any() and not big[1][:, ~columns].any()
    keeps = (rows, columns, rows, columns)
    for k, keep in enumerate(keeps):
        assert big[k].isfinite().all()
        got, want = big[k][:, keep], cut[k]
        if k > 1:
            got, want = got - got.mean(-1, keepdim=True), want - want.mean(-1, keepdim=True)
        close(got, want, slack(dtype, room=300.0))
    unrolled = cpu.unrolled_gradient(x, y, a, b, torch.tensor([4, 5]), w, v, EPS, True)
    want = cpu.unrolled_gradient(*small, torch.tensor([4, 5]), w, v, EPS, True)
    for k, keep in enumerate(keeps):
        assert unrolled[k].isfinite().all()
        close(unrolled[k][:, keep], want[k], slack(dtype, room=100.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_features_have_no_cosine_and_no_gradient(dtype: torch.dtype) -> None:
    x, y, a, b = features(6, 5, dtype)
    x[:, 2], y[0, 1] = 0, 0
    f, g, *_ = cpu.solve(x, y, a, b, EPS, 500, 0.0)
    gx, gy, *_ = cpu.implicit_gradient(x, y, a, b, f, g, torch.ones_like(a[:, 0]), None, None, None, EPS, True, True)
    assert gx.isfinite().all() and gy.isfinite().all()
    assert not gx[:, 2].any() and not gy[0, 1].any()
    assert gx[:, 1].any() and gy[1, 1].any()


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_the_length_of_a_feature_does_not_matter(scale: float) -> None:
    x, y, a, b = features(6, 5, torch.float32)
    for got, want in zip(
        cpu.solve(x * scale, y, a, b, EPS, 20, 0.0)[:4], cpu.solve(x, y, a, b, EPS, 20, 0.0)[:4], strict=True
    ):
        close(got, want.double(), slack(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-3, 1e-2])
def test_small_eps_follows_the_oracle(eps: float, dtype: torch.dtype) -> None:
    cost = torch.rand(2, 20, 23, dtype=torch.float64).mul(2).to(dtype)
    a, b = torch.randn(2, 20, dtype=dtype).softmax(-1), torch.randn(2, 23, dtype=dtype).softmax(-1)
    for iterations in (1, 3, 200):
        *got, _, error = cpu.solve(cost, None, a, b, eps, iterations, 0.0)
        want = oracle(cost, a, b, eps, iterations)
        # Potentials are averages of costs: each iteration adds a rounding of the cost, not of cost/eps.
        tolerance = torch.finfo(dtype).eps * 2 * (4 + iterations)
        for p, q in zip(got[:2], want[:2], strict=True):
            close(p, q, tolerance)
        for p, q in zip(got[2:], want[2:], strict=True):
            close(p, q, tolerance / eps)
        assert error.isfinite().all()


def test_small_eps_reaches_optimal_transport() -> None:
    ot = pytest.importorskip("ot")
    cost = torch.rand(2, 64, 64)
    a = torch.full((2, 64), 1 / 64)
    sharp = cpu.solve(cost, None, a, a, 1e-3, 3000, 0.0)[2]
    for k in range(2):
        exact = ot.emd2(a[k].double().numpy(), a[k].double().numpy(), cost[k].double().numpy())
        assert float(sharp[k]) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["wide", "one-hot", "identical", "far columns", "separable"])
def test_hard_problems_stay_finite_and_right(kind: str, dtype: torch.dtype) -> None:
    n, m, eps, size = 12, 18, 0.1, 2.0
    cost = torch.rand(1, n, m, dtype=torch.float64)
    a, b = torch.randn(1, n, dtype=torch.float64), torch.randn(1, m, dtype=torch.float64)
    if kind == "wide":
        cost, size = cost * 2000 - 1000, 1000.0
    elif kind == "one-hot":
        a, b = a * 15, b * 15
    elif kind == "identical":
        cost = cost[:, :1].expand(1, n, m)
    elif kind == "far columns":
        cost[..., ::3] += 1000
        size = 1000.0
    else:
        cost = torch.linspace(-500, 500, n, dtype=torch.float64)[:, None] + 300 * torch.rand(m, dtype=torch.float64)
        cost, size = cost[None], 800.0
    cost, a, b = cost.to(dtype), a.softmax(-1).to(dtype), b.softmax(-1).to(dtype)
    want = oracle(cost, a, b, eps, 40)
    *got, _, error = cpu.solve(cost, None, a, b, eps, 40, 0.0)
    for p, q in zip(got[:2], want[:2], strict=True):
        close(p, q, 50 * torch.finfo(dtype).eps * size / float(np.abs(q).max()) + slack(dtype))
    close(got[2], want[2], slack(dtype, eps, size))
    grads = cpu.implicit_gradient(cost, None, a, b, *got[:2], *upstream(a, b), eps, True, True)
    unrolled = cpu.unrolled_gradient(cost, None, a, b, torch.tensor([40]), torch.ones(1, dtype=dtype), None, eps, True)
    assert all(t.isfinite().all() for t in (error, *grads, *unrolled))


@pytest.mark.parametrize("dtype", DTYPES)
def test_stops_at_the_first_iteration_below_tol(dtype: torch.dtype) -> None:
    x, y, a, b = features(21, 14, dtype, batch=6)
    a = (a.log() * torch.arange(1, 7, dtype=dtype)[:, None]).softmax(-1)
    tol = 1e-3
    n_iter, error = cpu.solve(x, y, a, b, EPS, 500, tol)[4:]
    assert len(set(n_iter.tolist())) > 1 and (error < tol).all() and (n_iter < 500).all()
    for k, count in enumerate(n_iter.tolist()):
        one = [t[k : k + 1] for t in (x, y, a, b)]
        assert float(cpu.solve(*one, EPS, count, 0.0)[5]) == pytest.approx(float(error[k]), rel=0.01)
        assert count == 1 or float(cpu.solve(*one, EPS, count - 1, 0.0)[5]) >= tol


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    x, y, a, b = features(9, 10, torch.float32)
    cost = cosine(x, y).float()
    for left, right, where in ((cost, None, (1, 3, 4)), (x, y, (1, 3, 4))):
        left = left.clone()
        left[where] = bad
        f, g, sharp, *_ = cpu.solve(left, right, a, b, EPS, 10**6, 0.0)
        assert sharp[0].isfinite() and f[0].isfinite().all() and g[0].isfinite().all()
        assert f[1].isnan().any() or g[1].isnan().any() or sharp[1].isnan()


def everything(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    out = cpu.solve(x, y, a, b, EPS, 40, 1e-4)
    ones = torch.ones_like(a[:, 0])
    return [
        *out,
        *cpu.implicit_gradient(x, y, a, b, out[0], out[1], ones, None, None, None, EPS, True, True),
        *cpu.unrolled_gradient(x, y, a, b, out[4], ones, None, EPS, True),
    ]


def test_bit_for_bit_whatever_the_batch_and_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = features(70, 90, torch.float32, batch=12, d=20)  # large enough to be given to several threads
    # Only what the kernels ask; why PyTorch's own number stays as it is says conftest.py.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    one = everything(*problem)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    five = everything(*problem)
    assert all(map(torch.equal, one, five))
    for k in (0, 11):
        alone = everything(*(t[k : k + 1].contiguous() for t in problem))
        assert all(torch.equal(p[k], q[0]) for p, q in zip(one, alone, strict=True))


def test_called_from_several_threads() -> None:
    problem = features(70, 90, torch.float32, batch=12, d=20)
    want, results = everything(*problem), []
    workers = [threading.Thread(target=lambda: results.append(everything(*problem))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(results) == 4
    assert all(torch.equal(p, q) for result in results for p, q in zip(result, want, strict=True))


FORKED = """
import os, torch
from otloss.backends import cpu
torch.set_num_threads(2)
x, a = torch.randn(16, 90, 20), torch.full((16, 90), 1 / 90)
want = cpu.solve(x, x, a, a, 0.1, 30, 0.0)
child = os.fork()
if child == 0:
    got = cpu.solve(x, x, a, a, 0.1, 30, 0.0)
    os._exit(0 if all(map(torch.equal, got, want)) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
cpu.solve(x, x, a, a, 0.1, 30, 0.0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_works_in_a_forked_child() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60)


LEVEL = """
import sys, torch
from otloss.backends import cpu
if cpu.status() is not None:
    print("skip", cpu.status())
    sys.exit()
assert cpu.level() == sys.argv[2]
*problem, want = torch.load(sys.argv[1])
for got, size, bound in zip(cpu.solve(*problem, 0.1, 20, 0.0)[:4], want[:4], (1e-5,) * 4):
    assert (got - size).abs().max() < bound * size.abs().max(), (got, size)
w = torch.ones_like(want[2])
for got, size in zip(cpu.implicit_gradient(*problem, *want[:2], w, None, None, None, 0.1, True, True)[:2], want[4:6]):
    assert (got - size).abs().max() < 1e-3 * size.abs().max(), (got, size)
for got, size in zip(cpu.unrolled_gradient(*problem, torch.full(w.shape, 20), w, None, 0.1, True), want[6:]):
    assert (got - size).abs().max() < 1e-3 * size.abs().max(), (got, size)
"""


@pytest.mark.parametrize("name", ["v4", "v3", "baseline"])
def test_every_instruction_level(name: str, tmp_path: os.PathLike[str]) -> None:
    problem = features(37, 45, torch.float32)
    double = [t.double() for t in problem]
    out = cpu.solve(*double, 0.1, 20, 0.0)[:4]
    w = torch.ones(2, dtype=torch.float64)
    want = [
        *out,
        *reference.implicit_gradient(*double, *out[:2], w, None, None, None, 0.1, True, True)[:2],
        *reference.unrolled_gradient(*double, torch.full((2,), 20), w, None, 0.1, True, 20),
    ]
    path = os.path.join(tmp_path, "problem.pt")
    torch.save([*problem, [t.float() for t in want]], path)
    done = subprocess.run(
        [sys.executable, "-c", LEVEL, path, name],
        env={**os.environ, "OTLOSS_CPU_LEVEL": name},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("skip"):
        pytest.skip(done.stdout[5:].strip())


def test_an_unknown_level_is_said() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from otloss.backends import cpu; print(cpu.status())"],
        env={**os.environ, "OTLOSS_CPU_LEVEL": "v9"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "OTLOSS_CPU_LEVEL=v9" in done.stdout and "baseline" in done.stdout


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_problems(dtype: torch.dtype) -> None:
    x, y, a, b = (t[:0] for t in features(3, 4, dtype))
    out = everything(x, y, a, b)
    assert out[0].shape == (0, 3) and out[1].shape == (0, 4) and out[4].dtype == torch.int64
    assert out[6].shape == x.shape and out[7].shape == y.shape
