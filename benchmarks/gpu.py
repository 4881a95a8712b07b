"""``python -m benchmarks.gpu``: forward + backward on a CUDA device, ours beside the peers; skips without a device.

Each peer gets the whole batch as it takes it (flash-sinkhorn loops over problems by itself). The first call
(compilation included) is timed by the clock, the following ones by CUDA events; the peers are timed in turn, so
that a change of clocks falls on all. Results: ``benchmarks/results/gpu.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import otloss
from benchmarks.peers import OURS, PEERS, Loss, Peer
from benchmarks.workloads import WORKLOADS, Workload
from otloss.backends import triton

RESULTS = Path(__file__).parent / "results"
SIZES = [*WORKLOADS.values(), Workload("large", batch=1, n=4096, m=4096, d=64)]


def _flash() -> Loss:
    """flash-sinkhorn's value (an envelope gradient): |x - y|^2 / 2 of unit rows is 1 - cos(x, y)."""

    def loss(w: Workload, x: Tensor, y: Tensor, za: Tensor, zb: Tensor) -> Tensor:
        from flash_sinkhorn import SamplesLoss

        options = {"use_epsilon_scaling": False, "allow_tf32": False, "half_cost": True, "debias": False}
        solver = SamplesLoss("sinkhorn", backend="alternating", eps=w.eps, n_iters=w.iterations, **options)
        x, y = (torch.nn.functional.normalize(t, dim=-1) for t in (x, y))
        return torch.as_tensor(solver(za.softmax(-1), x, zb.softmax(-1), y))

    return loss


FLASH = Peer("flash-sinkhorn SamplesLoss", _flash(), exact=False, needs="flash_sinkhorn")


def _run(peer: Peer, w: Workload, leaves: tuple[Tensor, ...]) -> None:
    torch.autograd.grad(peer.loss(w, *leaves).sum(), leaves, allow_unused=not peer.exact)


def _event_ms(run: Callable[[], None], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def measure(w: Workload, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Cold and warm times and peak memory of everyone on one workload, and what failed."""
    leaves = tuple(t.detach().cuda().requires_grad_() for t in w.inputs())
    rows: dict[str, dict[str, Any]] = {}
    for peer in (OURS, FLASH, *PEERS):
        row = rows[peer.name] = {"name": peer.name, "exact": peer.exact, "warm_ms": []}
        if not peer.installed:
            row["skipped"] = f"{peer.needs} is not installed"
            continue
        try:
            torch.cuda.synchronize()
            start = time.perf_counter()
            _run(peer, w, leaves)
            torch.cuda.synchronize()
            row["cold_s"] = time.perf_counter() - start
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            _run(peer, w, leaves)
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        except Exception as error:  # a peer's failure is a result
            row["skipped"] = f"{type(error).__name__}: {str(error)[:200]}"
            torch.cuda.empty_cache()
    for _ in range(rounds):
        for peer in (OURS, FLASH, *PEERS):
            row = rows[peer.name]
            if "skipped" not in row:
                row["warm_ms"].append(_event_ms(lambda peer=peer: _run(peer, w, leaves), repeats))  # type: ignore[misc]
    for row in rows.values():
        row["median_ms"] = statistics.median(row["warm_ms"]) if row["warm_ms"] else None
    return list(rows.values())


def check(w: Workload) -> dict[str, float]:
    """Largest relative differences from the reference in float64 on a few problems, converged."""
    few = Workload(w.name, min(w.batch, 4), w.n, w.m, w.d, w.eps, max(400, w.iterations))
    found: list[tuple[Tensor, ...]] = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        leaves = tuple(t.detach().cuda().requires_grad_() for t in few.inputs(dtype))
        with otloss.use_backend(backend):
            cost = OURS.loss(few, *leaves)
            found.append((cost.detach(), *torch.autograd.grad(cost.sum(), leaves)))
    errors = [float((p.double() - q).abs().max() / q.abs().max()) for p, q in zip(*found, strict=True)]
    return {"cost": errors[0], "gradient": max(errors[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=10, help="calls between two events")
    args = parser.parse_args()
    reason = triton.status() or ("the interpreter is on" if triton.interpreted() else None)
    if reason is not None:
        print(f"skipped, nothing was measured: {reason}")
        return
    properties = torch.cuda.get_device_properties(0)
    packages = ("torch", "triton", "flash-sinkhorn", "geomloss", "pot")
    environment = {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "versions": {
            name: version(name) for name in packages if find_spec({"pot": "ot"}.get(name, name.replace("-", "_")))
        },
    }
    results: dict[str, Any] = {"environment": environment, "workloads": {}}
    for w in SIZES:
        results["workloads"][w.name] = {
            "workload": vars(w),
            "errors": check(w),
            "times": measure(w, args.rounds, args.repeats),
        }
        print(w.name, results["workloads"][w.name]["errors"])
        for row in results["workloads"][w.name]["times"]:
            print(
                f"  {row['name']}: "
                + (row.get("skipped") or f"{row['median_ms']:.3f} ms, first call {row['cold_s']:.1f} s")
            )
    (RESULTS / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
