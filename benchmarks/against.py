"""``python -m benchmarks.against COMMIT``: this tree beside an older commit, into results/against.json and against.md.

The files keep one run for each commit and processor, since the ratios differ: numbers too small for a float's normal
range cost Intel's processors a hundred cycles each, AMD's almost none.


The commit is exported to a temporary folder and its kernels are built there. Both trees then run in turn, each round in
a process of its own, with the same problems and threads. A cell holds the median over the rounds, and the ratio is that
of the two medians. Cases:

* **to tolerance**: forward and backward by x of `otloss.cosine_sinkhorn` at tol 1e-5 and at most 5000 iterations, for
  three shapes and every eps, with the share of problems that converged;
* **50 iterations**: the same at tol 0, eps 0.05;
* **one sweep** (this tree only): nanoseconds per sweep and entry of a dense cost, forward only, on one thread. What a
  call costs beside its sweeps is measured with one iteration and subtracted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import otloss

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"channels": (16, 512, 49), "tokens": (16, 196, 128), "positions": (64, 49, 512)}
EPS = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002)
TOL, LONGEST, FIXED = 1e-5, 5000, 50
ENOUGH = 0.5  # seconds for one case in one round
ENTRIES = 1 << 22


def tensors(batch: int, points: int, d: int) -> list[Tensor]:
    """x, and y = relu(x + 0.5 normal), with random masses."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, batch, points, d, generator=generator)
    a, b = torch.randn(2, batch, points, generator=generator).softmax(-1)
    x = x.relu()
    return [x, (x + 0.5 * noise).relu(), a, b]


def seconds(run: Callable[[], Any]) -> float:
    """Median of one call, after a warm-up."""
    run()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < ENOUGH and len(times) < 15):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        if times[-1] > 4 * ENOUGH:
            break
    return statistics.median(times)


def step(shape: str, eps: float, tol: float, iterations: int) -> dict[str, float]:
    """Forward and backward by x."""
    x, *others = tensors(*SHAPES[shape])
    x.requires_grad_()

    def run() -> Any:
        x.grad = None
        out = otloss.cosine_sinkhorn(x, *others, eps=eps, tol=tol, max_iter=iterations)
        out.transport_cost.sum().backward()
        return out

    found = {"seconds": seconds(run)}
    if tol > 0:
        out = run()
        found |= {"converged": float(out.converged.double().mean()), "sweeps": float(out.n_iter.double().mean())}
    return found


def sweep(shape: str, eps: float) -> dict[str, float]:
    """Nanoseconds of a sweep, per entry of the cost, on one thread and over as many problems as take a while."""
    _, points, d = SHAPES[shape]
    x, y, a, b = tensors(max(16, ENTRIES // points**2), points, d)
    cost = otloss.cosine_cost(x, y)
    with torch.no_grad():

        def run(iterations: int) -> Any:
            return otloss.sinkhorn(cost, a, b, eps=eps, tol=TOL, max_iter=iterations)

        sweeps = int(run(LONGEST).n_iter.sum()) - len(cost)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        spent = seconds(lambda: run(LONGEST)) - seconds(lambda: run(1))
        torch.set_num_threads(threads)
    return {"ns": 1e9 * spent / (sweeps * cost[0].numel())}


def measured(sweeps: bool) -> dict[str, Any]:
    """All cases, once."""
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for shape in SHAPES:
        found[f"{shape}, 50 iterations"] = step(shape, 0.05, 0.0, FIXED)
        for eps in EPS:
            found[f"{shape}, eps {eps:g}"] = step(shape, eps, TOL, LONGEST)
            if sweeps:
                found[f"{shape}, eps {eps:g}"] |= sweep(shape, eps)
    return found


def built(commit: str, folder: Path) -> None:
    """The commit's tree in `folder`, with its kernels."""
    tree = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=folder, input=tree, check=True)
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(build, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def child(tree: Path, sweeps: bool) -> dict[str, Any]:
    """One round in a process that imports otloss from `tree`."""
    command = [sys.executable, __file__, "--child", *(["--sweeps"] if sweeps else [])]
    run = subprocess.run(
        command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, check=True, capture_output=True, text=True
    )
    return json.loads(run.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians over rounds."""
    return {
        case: {key: statistics.median(r[case][key] for r in rounds) for key in rounds[0][case]} for case in rounds[0]
    }


def section(found: dict[str, Any]) -> list[str]:
    """The table of one run."""
    machine = found["environment"]
    lines = [
        f"## Beside commit {found['commit']}, {machine['cpu']}",
        "",
        f"Written by `python -m benchmarks.against {found['commit']}`. {machine['cpu']}, {machine['cores']} cores, "
        f"kernels {machine['level']}, commit {machine['commit']}. Milliseconds of forward and backward, medians over "
        f"{found['rounds']} rounds in turn; in brackets the share of problems that converged and their mean sweeps. "
        "The last columns: nanoseconds of a sweep per entry on one thread, and how many times those at eps 0.05.",
        "",
        "| case | before | this commit | ratio | ns per sweep and entry | of eps 0.05 |",
        "|---|---|---|---|---|---|",
    ]
    for case, new in found["new"].items():
        old = found["old"][case]
        cells = []
        for row in (old, new):
            more = f" ({100 * row['converged']:.0f} %, {row['sweeps']:.0f})" if "converged" in row else ""
            cells.append(f"{1e3 * row['seconds']:.3g}{more}")
        ns, base = new.get("ns"), found["new"].get(f"{case.split(',')[0]}, eps 0.05", {}).get("ns")
        rest = f"{ns:.3g} | {ns / base:.2f}" if ns and base else " | "
        lines.append(f"| {case} | {cells[0]} | {cells[1]} | {old['seconds'] / new['seconds']:.3g}× | {rest} |")
    return [*lines, ""]


def page(runs: dict[str, dict[str, Any]]) -> str:
    """Every run that is kept."""
    lines = [line for run in runs.values() for line in section(run)]
    return "\n".join(["# This tree beside older commits", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sweeps", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(args.sweeps)))
        return
    if args.commit is None:
        parser.error("say which commit to compare with")
    from benchmarks import results
    from benchmarks.machine import environment

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"building {args.commit} in {folder}", flush=True)
        built(args.commit, folder)
        old, new = [], []
        for k in range(args.rounds):
            old.append(child(folder, False))
            new.append(child(ROOT, True))
            print(f"round {k + 1} of {args.rounds} is done", flush=True)
    found = {
        "commit": args.commit,
        "rounds": args.rounds,
        "environment": environment(),
        "old": middle(old),
        "new": middle(new),
    }
    path = results.FOLDER / "against.json"
    results.put(path, "runs", f"{found['commit']}, {found['environment']['cpu']}", found)
    (results.FOLDER / "against.md").write_text(page(results.load(path)["runs"]))
    print("\n".join(section(found)))


if __name__ == "__main__":
    main()
