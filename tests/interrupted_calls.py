"""Calls of the cpu backend that take a minute or more, for test_cpu_interrupt.py to interrupt: run as a program.

``python tests/interrupted_calls.py THREADS`` says which call it begins, one after another. Each has to end with
KeyboardInterrupt; it then says when, and whether the next call gives what it gave before.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

import otloss

ENDLESS = 10**9
Call = Callable[[], object]


def forward(*shape: int, **options: object) -> Call:
    cost = torch.rand(*shape)
    return lambda: otloss.sinkhorn(cost, eps=0.01, tol=0.0, max_iter=ENDLESS, **options)  # type: ignore[arg-type]


def fast(count: int, n: int, **options: object) -> Call:
    """Many problems that share a cost, since quasi-Newton steps may come to an error of exactly 0."""
    cost, a = torch.rand(n, n).expand(count, n, n), torch.rand(count, n).softmax(-1)
    return lambda: otloss.sinkhorn(cost, a, eps=0.003, tol=1e-30, max_iter=5000, **options)  # type: ignore[arg-type]


def features() -> Call:
    x, y = torch.randn(3, 400, 30), torch.randn(3, 500, 30)
    return lambda: otloss.cosine_sinkhorn(x, y, eps=0.01, tol=0.0, max_iter=ENDLESS)


def tall() -> Call:
    """One part of a matrix is all of it here, so that a sweep polls within."""
    cost = torch.rand(24, 600_000)
    return lambda: otloss.sinkhorn(cost, eps=0.01, tol=0.0, max_iter=ENDLESS)


def through_operators() -> Call:
    """Under a transform PyTorch's dispatcher stands between."""
    cost = torch.rand(4, 200, 200)

    def solve(one: Tensor) -> Tensor:
        return otloss.sinkhorn(one, eps=0.01, tol=0.0, max_iter=ENDLESS).transport_cost

    return lambda: torch.func.vmap(solve)(cost)


def without_mass() -> Call:
    """Iterations in the log-domain throughout."""
    cost, a = torch.rand(2000, 600), torch.rand(2000)
    cost[:, ::2] *= 1000
    return lambda: otloss.sinkhorn(cost, a / a.sum(), eps=1e-4, tol=0.0, max_iter=ENDLESS)


def backward(count: int, n: int, **options: object) -> Call:
    """The problems share a cost that needs no gradient: only the masses have one, which takes little memory."""
    log_a = torch.randn(count, n, requires_grad=True)
    out = otloss.sinkhorn(torch.rand(n, n).expand(count, n, n), log_a=log_a, tol=0.0, **options)  # type: ignore[arg-type]
    return out.transport_cost.sum().backward


def waiting() -> Call:
    """Another thread holds the pool, for which this one waits."""
    busy = threading.Thread(target=forward(4, 300, 300), daemon=True)

    def call() -> None:
        busy.start()
        time.sleep(0.2)
        forward(4, 200, 200)()

    return call


CALLS: dict[str, Callable[[], Call]] = {
    "one problem": lambda: forward(1500, 1500),
    "a few problems": lambda: forward(5, 300, 300),
    "lanes": lambda: forward(256, 49, 49),
    "tiny": lambda: forward(100_000, 3, 2),
    "quasi-Newton": lambda: fast(5000, 300),
    "quasi-Newton in lanes": lambda: fast(50_000, 49),
    "penalties": lambda: forward(5, 300, 300, rho_a=0.1),
    "penalties in lanes": lambda: forward(256, 49, 49, rho_a=0.1, rho_b=0.2),
    "quasi-Newton under penalties": lambda: fast(5000, 300, rho_a=1.0),
    "features": features,
    "tall": tall,
    "log-domain": without_mass,
    "through operators": through_operators,
    "gradient": lambda: backward(30_000, 128, max_iter=1, eps=0.001),
    "gradient in lanes": lambda: backward(400_000, 40, max_iter=1, eps=0.001),
    "gradient by unrolling": lambda: backward(8, 256, max_iter=20_000, eps=0.1, gradient="unroll"),
    "waiting for the pool": waiting,
}


def exact() -> list[Tensor]:
    """A small problem in lanes and a large one, with gradients."""
    out: list[Tensor] = []
    for shape in ((40, 30, 49), (2, 600, 700)):
        cost = torch.rand(*shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        solved = otloss.sinkhorn(cost, eps=0.05)
        solved.transport_cost.sum().backward()
        out += [solved.f.detach(), solved.g.detach(), solved.transport_cost.detach(), cost.grad]  # type: ignore[list-item]
    return out


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(int(sys.argv[1]))
    names = sys.argv[2:] or list(CALLS)
    want = exact()
    for name in names:
        call = CALLS[name]()
        print("begins", name, flush=True)
        try:
            call()
            print("ended by itself", flush=True)
        except KeyboardInterrupt:
            print(time.monotonic(), flush=True)
        if name != "waiting for the pool":  # which its thread holds on to
            same = all(map(torch.equal, exact(), want))
            print("exact" if same else "other results", flush=True)
    os._exit(0)  # threads may still be at work


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background begins without it
    main()
