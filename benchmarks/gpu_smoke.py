"""``python -m benchmarks.gpu_smoke``: every kernel once, at a small size, against the reference in float64.

One line of JSON is printed before a case, "start" and its name, and one after it. ``benchmarks.gpu`` reads them with a
time limit for each, so that a kernel that hangs is known by its name. On a CPU this needs ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from otloss.backends import reference, triton
from otloss.backends.protocol import Problem, Shift, Upstream
from otloss.cost import COSTS

EPS, ITERATIONS = 0.1, 5


@dataclass(frozen=True)
class Case:
    """A part of the work in one regime; ``stored`` says whether the cost of features is."""

    regime: str
    part: str  # "solve", "implicit" or "unrolled"
    features: bool
    stored: bool = True
    kind: str = "cosine"
    relaxed: bool = False
    itself: bool = False
    """Whether it is the problem of a set with itself, which takes mixed steps."""
    n: int = 9
    m: int = 12
    d: int = 16

    @property
    def name(self) -> str:
        cost = "features" if self.features else "dense"
        cost += f", {self.kind}" if self.kind != "cosine" else ""
        cost += ", penalties" if self.relaxed else ""
        cost += ", a set with itself" if self.itself else ""
        return f"{self.part}, {self.regime}, {cost}" + ("" if self.stored else ", no stored cost")


CASES = [
    Case(regime, part, features)
    for regime in ("small", "medium", "large")
    for part in ("solve", "implicit", "unrolled")
    for features in (False, True)
    if part != "unrolled" or regime == "large"  # one way for all sizes
] + [Case("large", part, True, stored=False) for part in ("solve", "implicit", "unrolled")]
CASES += [
    Case(regime, part, False, relaxed=True) for regime in ("small", "medium", "large") for part in ("solve", "implicit")
]
CASES += [
    Case(regime, part, True, stored, kind)
    for kind in ("sqeuclidean", "dot")
    for regime, stored in (("small", True), ("large", False))
    for part in ("solve", "implicit")
]
CASES += [
    Case(regime, "solve", features, relaxed=relaxed, itself=True)
    for regime in ("small", "medium", "large")
    for features, relaxed in ((False, False), (True, False), (False, True))
]
LIMITS = {"small": (64, 1024), "medium": (0, 1024), "large": (0, 0)}


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def error(case: Case, device: str) -> float:
    """Largest difference from float64, relative to the largest entry (or to 0.1), in units of the tolerance.

    An entry is known to about u 2/eps, u = 2^-24; the gradients lose up to 1/eps times that.
    """
    from otloss.backends.triton import config

    torch.manual_seed(0)
    x, y = (torch.randn(3, k, case.d, dtype=torch.float64) / 4 for k in (case.n, case.m))  # costs up to about 2
    a, b = (torch.randn(3, k, dtype=torch.float64).softmax(-1) for k in (case.n, case.m))
    if case.itself:
        y, b = x, a
    left, right = (x, y) if case.features else (reference.dense_cost(x, y), None)
    if case.itself and right is None:
        left = (left + left.mT) / 2  # a product is symmetric but for rounding
    given = [None if t is None else t.float().to(device) for t in (left, right, a, b)]
    up = [torch.randn(3, dtype=torch.float64).to(device) for _ in range(2)]
    strengths = [0.5, 1.0, 2.0], ([0.5, 1.0, 2.0] if case.itself else [4.0, 0.5, 1.0])
    rhos = [torch.tensor(rho).to(device) if case.relaxed else None for rho in strengths]
    mine = Problem(*given, EPS, *rhos, case.kind)  # type: ignore[arg-type]
    leaves = [t.requires_grad_() for t in _wide(*given[:2]) if t is not None]
    cost = COSTS[case.kind](*leaves) if case.features else leaves[0]  # the reference takes the cost itself
    theirs = Problem(cost.detach(), None, *_wide(*given[2:]), EPS, *_wide(*rhos))  # type: ignore[arg-type]
    solved = reference.solve(theirs, 300, 1e-12)
    if case.features:
        f, g = reference.unshifted(solved, theirs.a, theirs.b)
        solved = solved._replace(f=f, g=g, shift=None)

    def run(backend: object, problem: Problem, dtype: torch.dtype) -> tuple[Tensor, ...]:
        upstream = Upstream(*(t.to(dtype) for t in up))
        if case.part == "solve":
            if case.itself:  # the solution, whatever the steps to it
                most, tol = (30, 1e-6) if dtype == torch.float32 else (5000, 1e-12)
                solution = backend.solve(problem, most, tol, accelerate=True)  # type: ignore[attr-defined]
            else:
                solution = backend.solve(problem, ITERATIONS, 0.0)  # type: ignore[attr-defined]
            f, g = reference.unshifted(solution, problem.a, problem.b)
            return f, g, solution.transport_cost, solution.value
        if case.part == "implicit":
            # Rounded to float32 for both, so that both differentiate the same state.
            f, g = (t.float().to(dtype) for t in solved[:2])
            shift = None if solved.shift is None else Shift(*(t.float().to(dtype) for t in solved.shift))
            return backend.implicit_gradient(problem, f, g, upstream, True, True, shift=shift)[0]  # type: ignore[attr-defined, no-any-return]
        n_iter = torch.tensor([1, 2, 4], device=device)
        return backend.unrolled_gradient(problem, n_iter, upstream, True, 4)  # type: ignore[attr-defined, no-any-return]

    limits = dict(zip(("small", "medium"), LIMITS[case.regime], strict=True))
    with (
        mock.patch.object(config, "LIMITS", limits),
        mock.patch.object(config, "STORED_BYTES", config.STORED_BYTES if case.stored else 0),
    ):
        got = run(triton, mine, torch.float32)
    want = run(reference, theirs, torch.float64)
    if case.features and case.part != "solve":
        want = (*torch.autograd.grad(cost, leaves, want[0]), *want[2:])
    worst = 0.0
    for k, (one, other) in enumerate(zip(got, want, strict=True)):
        if not other.numel():
            continue
        one, other = one.double(), other.double()
        if case.part == "implicit" and k >= 2 and not case.relaxed:  # up to a constant
            one, other = one - one.mean(-1, keepdim=True), other - other.mean(-1, keepdim=True)
        off = float((one - other).abs().max()) / max(float(other.abs().max()), 0.1)
        worst = max(worst, off if off == off else float("inf"))
    return worst / ((16 if case.part == "solve" else 300) * 2**-24 * 2 / EPS)


def run_all() -> Iterator[dict[str, object]]:
    device = "cpu" if triton.interpreted() else "cuda"
    for case in CASES:
        yield {"start": case.name}
        found = error(case, device)
        yield {"case": case.name, "error_of_tolerance": found, "same": found <= 1}


if __name__ == "__main__":
    for line in run_all():
        print(json.dumps(line), flush=True)
