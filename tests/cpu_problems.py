"""Problems, tolerances and the float64 oracle of the tests of the C++ kernels (test_cpu*.py).

Tolerances. A float carries ``u`` = 2^-24 (2^-53) of relative error. A cost of size c enters an exponent as c/eps, so an
entry of the plan is known to about ``u c / eps``; sums of n terms add little to that, a gradient of the plan another
1/eps. ``slack`` is that bound with room for the constants.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import Tensor

from otloss.backends import cpu, reference
from otloss.backends.protocol import Gradients, Problem, Solution, Upstream

cpu.PROCESSORS = 64  # a test may have more threads than there are processors
needs_cpu = pytest.mark.skipif(cpu.status() is not None, reason=f"cpu backend: {cpu.status()}")

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


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def upstream(a: Tensor, b: Tensor) -> Upstream:
    w, v, p, q = torch.randn_like(a[:, 0]), torch.randn_like(a[:, 0]), torch.randn_like(a) * a, torch.randn_like(b) * b
    return Upstream(w, v, p, q + b * (p.sum(-1) - q.sum(-1)).unsqueeze(-1))


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


def outputs(solution: Solution, a: Tensor, b: Tensor) -> list[Tensor]:
    """f, g, transport cost and value, with potentials of the cost as it was given and <a, f> = <b, g>."""
    f, g = solution.f.double(), solution.g.double()
    if solution.shift is not None:
        f, g = f + solution.shift.rows, g + solution.shift.columns
    constant = ((b * g).sum(-1, keepdim=True) - (a * f).sum(-1, keepdim=True)) / 2
    return [f + constant, g - constant, solution.transport_cost, solution.value]


def gradient(problem: Problem, solution: Solution, *args: object) -> tuple[Gradients, Tensor]:
    """The implicit gradient at a solution."""
    return cpu.implicit_gradient(problem, solution.f, solution.g, *args, shift=solution.shift)  # type: ignore[arg-type]


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return reference.dense_cost(x.double(), y.double())


def everything(
    left: Tensor, right: Tensor | None, a: Tensor, b: Tensor, eps: float = EPS, kind: str = "cosine"
) -> list[Tensor]:
    """Every output and gradient of the kernels that there is, one row a problem."""
    kept = None if right is None else left.new_empty(len(a), a.shape[1], b.shape[1])
    problem, by_cost = Problem(left, right, a, b, eps, kind=kind), Upstream(torch.ones_like(a[:, 0]))
    out = cpu.solve(problem, 40, 1e-4, kept)
    fast = cpu.solve(problem, 60, 1e-4, None, True)
    implicit = (problem, out, by_cost, True, True)
    from_kept, kept_residual = gradient(*implicit, kept)
    made_again, residual = gradient(*implicit)
    gradients = [*made_again, residual, *cpu.unrolled_gradient(problem, out.n_iter, by_cost, True, 40)]
    assert all(
        map(torch.equal, (*from_kept, kept_residual), gradients)
    )  # the cost that was kept is the one that would be made again
    return [*out[:6], *fast[:6], *(grad for grad in gradients if len(grad) == len(a))]


# Sizes that leave every kind of remainder, with dimensions of features.
ODD_SIZES = [
    (1, 1, 1),
    (1, 9, 3),
    (5, 3, 17),
    (7, 9, 5),
    (13, 17, 20),
    (31, 33, 65),
    (49, 49, 130),
    (65, 63, 33),
    (130, 257, 20),
]


def unsteady(n: int, m: int, d: int, dtype: torch.dtype, kinds: tuple[str, ...] = ("cosine", "dense")) -> list[str]:
    """What changes, bit for bit, with the number of threads or with the problems around one."""
    count = max(13, 7000 // (n * m) + 1)  # enough work to be given to several threads
    x, y, a, b = features(n, m, dtype, count, d)
    sharpness = torch.arange(count, dtype=dtype)[:, None] % 4  # so that they stop at different iterations
    a = (3 * sharpness * a.log()).softmax(-1)
    b = b.masked_fill((torch.arange(m) % 3 == 1) & (sharpness == 2), 0.0)
    b = b / b.sum(-1, keepdim=True)
    threads, changed = torch.get_num_threads(), []
    try:
        for kind in kinds:
            left, right = (cosine(x, y).to(dtype), None) if kind == "dense" else (x, y)
            of_features = "cosine" if kind == "dense" else kind

            def part(
                start: int, stop: int, left: Tensor = left, right: Tensor | None = right, kind: str = of_features
            ) -> list[Tensor]:
                inputs = (None if t is None else t[start:stop].clone() for t in (left, right, a, b))
                return everything(*inputs, eps=0.02, kind=kind)  # type: ignore[arg-type]

            torch.set_num_threads(1)
            want = part(0, count)
            for number in (2, 5):
                torch.set_num_threads(number)
                if not all(map(torch.equal, part(0, count), want)):
                    changed.append(f"{n} x {m}, {kind}, {dtype}: with {number} threads")
            for start, stop in ((0, 1), (1, 2), (count - 1, count), (1, 6), (count // 2, count)):
                if not all(torch.equal(p, q[start:stop]) for p, q in zip(part(start, stop), want, strict=True)):
                    changed.append(f"{n} x {m}, {kind}, {dtype}: problems {start} to {stop} of {count} alone")
    finally:
        torch.set_num_threads(threads)
    return changed
