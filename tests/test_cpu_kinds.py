"""The C++ kernels under squared distances and products of features, against the reference in float64.

Tolerances. With u = 2^-24 (2^-53) and sums of d terms, a squared distance is known to (d + 2) u of itself and a product
to d u sum_k |x_k y_k|. What follows from a cost is known as in ``cpu_problems``.
"""

from __future__ import annotations

import pytest
import torch
from cpu_problems import DTYPES, close, needs_cpu, slack, unsteady, upstream, wide
from torch import Tensor

from otloss.backends import cpu, reference
from otloss.backends.protocol import Problem, Upstream

pytestmark = needs_cpu

KINDS = ("sqeuclidean", "dot")
EPS = 0.1
# Lanes and single problems, every kind of remainder, and parts that threads share (530 x 1000).
SIZES = [(1, 1, 1), (2, 3, 2), (7, 9, 5), (16, 17, 16), (31, 33, 65), (49, 50, 3), (65, 63, 20), (130, 257, 17)]
SPLIT = (530, 1000, 7)


def points(kind: str, n: int, m: int, d: int, dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    """Features whose costs are about 1, and masses."""
    scale = (2 * d) ** -0.5 if kind == "sqeuclidean" else d**-0.25
    x, y = (scale * torch.randn(batch, k, d, dtype=torch.float64) for k in (n, m))
    a, b = (torch.randn(batch, k, dtype=torch.float64).softmax(-1) for k in (n, m))
    return [t.to(dtype) for t in (x, y, a, b)]


def size_of(kind: str, x: Tensor, y: Tensor) -> float:
    return float(reference.dense_cost(x.double(), y.double(), kind).abs().max())


def by_terms(got: Tensor, want: Tensor, tolerance: float) -> None:
    """A gradient, relative to its largest entry."""
    assert got.isfinite().all()
    size = float(want.abs().max())
    difference = float((got.double() - want).abs().max())
    assert difference <= tolerance * size, (difference / size, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m", "d"), [*SIZES, SPLIT])
def test_solves_as_the_reference(n: int, m: int, d: int, kind: str, dtype: torch.dtype) -> None:
    given = points(kind, n, m, d, dtype, 1 if (n, m, d) == SPLIT else 2)
    problem, exact = Problem(*given, EPS, kind=kind), Problem(*wide(*given), EPS, kind=kind)
    known = slack(dtype, EPS, max(1.0, size_of(kind, *given[:2])))
    kept = given[0].new_empty(len(given[0]), n, m)
    got, want = cpu.solve(problem, 6, 0.0, kept), reference.solve(exact, 6, 0.0)
    for one, other in zip(got[:4], want[:4], strict=True):
        close(one, other, known)
    assert got.n_iter.tolist() == want.n_iter.tolist() and got.shift is None
    x, y = (t.double() for t in given[:2])
    cost = reference.dense_cost(x, y, kind)
    unit = torch.finfo(dtype).eps / 2
    terms = cost if kind == "sqeuclidean" else x.abs() @ y.abs().transpose(-1, -2)
    # In float64 the reference rounds too, by the squares of the points.
    more = 0.0 if dtype == torch.float32 else 16 * unit * float(x.square().sum(-1).max() + y.square().sum(-1).max())
    assert ((kept.double() - cost).abs() <= (d + 2) * unit * terms + more).all()
    fast = cpu.solve(problem, 500, 10 * float(unit) / EPS, None, True)
    slow = cpu.solve(exact, 3000, 1e-14)  # by the iterations that were compared above
    for one, other in zip(fast[2:4], slow[2:4], strict=True):
        close(one, other, 4 * known)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m", "d"), [*SIZES, SPLIT])
def test_gradients_are_those_of_the_reference(n: int, m: int, d: int, kind: str, dtype: torch.dtype) -> None:
    x, y, a, b = points(kind, n, m, d, dtype, 1 if (n, m, d) == SPLIT else 2)
    problem, exact = Problem(x, y, a, b, EPS, kind=kind), Problem(*wide(x, y, a, b), EPS, kind=kind)
    f, g = (t.to(dtype) for t in cpu.solve(exact, 3000, 1e-13, None, True)[:2])
    whole = upstream(a, b)
    known = slack(dtype, EPS, max(1.0, size_of(kind, x, y)), 100.0)
    # The kernel for short rows, that for single problems, and one without a system.
    for up, adjoint in ((Upstream(*whole[:2]), True), (whole, True), (Upstream(*whole[:2]), False)):
        want, _ = reference.implicit_gradient(exact, *wide(f, g), Upstream(*wide(*up)), adjoint, True)
        got, residual = cpu.implicit_gradient(problem, f, g, up, adjoint, True)
        assert (residual < (1e-5 if dtype == torch.float32 else 1e-10)).all()
        for one, other in zip(got[:2], want[:2], strict=True):
            by_terms(one, other, known / min(1.0, EPS * 4)) if n > 1 else close(one, other, known)
    counts = torch.tensor([3, 5])[: len(x)]
    by = Upstream(*whole[:2])
    want_unrolled = reference.unrolled_gradient(exact, counts, Upstream(*wide(*by[:2])), True, 5)
    for one, other in zip(cpu.unrolled_gradient(problem, counts, by, True, 5), want_unrolled, strict=True):
        close(one, other, known)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "m", "d"),
    [
        *((11, 13, d) for d in (1, 3, 4, 8, 9, 15, 17, 18, 33, 47)),
        *((70, 49 + k, 40) for k in (1, 3, 5)),
        (530, 300, 20),
    ],
)
def test_gradients_by_features_of_any_dimension(n: int, m: int, d: int, kind: str, dtype: torch.dtype) -> None:
    x, y, a, b = points(kind, n, m, d, dtype, 1)
    f, g = torch.rand_like(a) * 0.1, torch.rand_like(b) * 0.1
    up = Upstream(None, torch.full_like(a[:, 0], n))
    want, _ = reference.implicit_gradient(
        Problem(*wide(x, y, a, b), EPS, kind=kind), *wide(f, g), Upstream(*wide(*up)), False, True
    )
    got, _ = cpu.implicit_gradient(Problem(x, y, a, b, EPS, kind=kind), f, g, up, False, True)
    known = slack(dtype, EPS, max(1.0, size_of(kind, x, y)))
    for one, other in zip(got[:2], want[:2], strict=True):
        by_terms(one, other, known)


@pytest.mark.parametrize("offset", [1e4, -1e6])
@pytest.mark.parametrize(("n", "m"), [(20, 30), (70, 90)])
def test_an_offset_of_the_points_costs_no_digits(n: int, m: int, offset: float) -> None:
    """The float64 problem has the rounded points. Some points without mass lie elsewhere, and do not matter."""
    x, y, a, b = points("sqeuclidean", n, m, 3, torch.float32)
    x, y = 64 * x + offset, 64 * y + offset  # float32 holds multiples of 1/16 around 1e6
    x[:, 3], a[:, 3] = 0.0, 0.0
    a = a / a.sum(-1, keepdim=True)
    eps = EPS * 64**2
    problem = Problem(x, y, a, b, eps, kind="sqeuclidean")
    exact = Problem(*wide(x, y, a, b), eps, kind="sqeuclidean")
    kept = torch.empty(2, n, m)
    got, want = cpu.solve(problem, 200, 1e-6, kept), reference.solve(exact, 500, 1e-9)
    cost = reference.dense_cost(exact.left, exact.right, "sqeuclidean")
    assert ((kept - cost).abs() <= 5 * 2**-24 * cost + 2**-50 * offset**2).all()
    known = slack(torch.float32, EPS, float(cost[:, 4:].max()) / 64**2)
    for one, other in zip(got[2:4], want[2:4], strict=True):
        close(one, other, known)
    up = Upstream(torch.full((2,), float(n)))
    exact_gradient, _ = reference.implicit_gradient(exact, want.f, want.g, Upstream(*wide(*up)), True, True)
    found, _ = cpu.implicit_gradient(problem, want.f.float(), want.g.float(), up, True, True)
    assert (found.left[:, 3] == 0).all()
    # f of the point without mass is about offset^2; the others are of the size of the distances.
    for one, other in zip(found[:2], exact_gradient[:2], strict=True):
        by_terms(one, other, 20 * known)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [9, 70])
def test_equal_points_cost_nothing_and_pull_nowhere(n: int, dtype: torch.dtype) -> None:
    same = torch.full((2, n, 5), 0.1, dtype=dtype) + 7
    mass = torch.full((2, n), 1 / n, dtype=dtype)
    problem, kept = Problem(same, same, mass, mass, EPS, kind="sqeuclidean"), same.new_empty(2, n, n)
    out = cpu.solve(problem, 20, 1e-6, kept, True)
    assert not kept.any() and not out.transport_cost.any()
    up = Upstream(torch.ones_like(mass[:, 0]))
    gradients, _ = cpu.implicit_gradient(problem, out.f, out.g, up, True, True)
    unrolled = cpu.unrolled_gradient(problem, torch.tensor([2, 2]), up, True, 2)
    for grad in (*gradients[:2], *unrolled[:2]):
        assert grad.abs().max() <= 8 * torch.finfo(dtype).eps / n
    x = torch.randn(2, n, 5, dtype=dtype)
    cpu.solve(Problem(x, x, mass, mass, EPS, kind="sqeuclidean"), 1, 0.0, kept)
    assert not kept.diagonal(dim1=-2, dim2=-1).any() and (kept >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m", "d"), [(7, 9, 5), (49, 49, 20), (65, 130, 17)])
def test_bit_for_bit_whatever_the_batch_and_the_threads(n: int, m: int, d: int, kind: str) -> None:
    assert unsteady(n, m, d, torch.float32, (kind,)) == []
