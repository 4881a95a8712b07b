"""``python tests/installed.py``: whether the otloss that this Python finds is whole and computes right.

One problem's transport cost and its gradients by features and by a marginal are compared with plain iterations in the
log-domain, through which autograd goes. The last line is JSON: versions, the backend that served, the largest relative
error, the warnings on the way, and how many milliseconds ``import otloss`` takes after ``import torch``, by the clock
and of the processor. The exit status is 1 where the error is large, or another backend served than ``--backend``.

Each wheel is tried with it (``[tool.cibuildwheel]`` in pyproject.toml), and ``tests/installs.py`` runs it in every
environment that it makes.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings

GOOD = 1e-6
EPS = 0.1


def expected(x, y, logits):
    """The transport cost of each problem, by iterations that autograd differentiates."""
    import torch

    log_a = logits.log_softmax(-1)
    cost = 1 - torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).mT
    log_b = torch.full_like(cost[:, 0], -torch.tensor(cost.shape[-1]).log().item())
    g = torch.zeros_like(log_b)
    for _ in range(500):
        f = -EPS * ((g[:, None] - cost) / EPS + log_b[:, None]).logsumexp(2)
        g = -EPS * ((f[:, :, None] - cost) / EPS + log_a[:, :, None]).logsumexp(1)
    plan = ((f[:, :, None] + g[:, None] - cost) / EPS + log_a[:, :, None] + log_b[:, None]).exp()
    return (plan * cost).sum((1, 2))


def largest_error() -> float:
    """Of the values and both gradients, relative to the largest entry of each."""
    import torch

    import otloss

    torch.manual_seed(0)
    x, y = (torch.randn(3, n, 8, dtype=torch.float64) for n in (40, 30))
    logits = torch.randn(3, 40, dtype=torch.float64)
    def ours(x, y, logits):
        return otloss.cosine_sinkhorn(x, y, log_a=logits.log_softmax(-1), eps=EPS, tol=1e-10).transport_cost

    found = []
    for solve in (ours, expected):
        inputs = x.clone().requires_grad_(), y, logits.clone().requires_grad_()
        value = solve(*inputs)
        value.sum().backward()
        found.append((value.detach(), inputs[0].grad, inputs[2].grad))
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in zip(*found, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", default="cpu", help="the one that must serve")
    parser.add_argument("--without", metavar="MODULE", action="append", default=[], help="which cannot be imported")
    options = parser.parse_args()
    sys.modules.update(dict.fromkeys(options.without))
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter(), time.process_time()
        import otloss

        took = time.perf_counter() - start[0], time.process_time() - start[1]
        error = largest_error()
    from otloss.backends import choose_backend, cpu

    backend = choose_backend(None, "cpu")
    said = {
        "otloss": otloss.__version__,
        "file": otloss.__file__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "backend": backend,
        "level": cpu.level(),
        "triton": otloss.backends()["triton"].reason,
        "error": error,
        "warnings": [str(warning.message) for warning in caught],
        "import_ms": round(1e3 * took[0], 1),
        "import_cpu_ms": round(1e3 * took[1], 1),
    }
    print(json.dumps(said))
    return 0 if error < GOOD and backend == options.backend else 1


if __name__ == "__main__":
    sys.exit(main())
