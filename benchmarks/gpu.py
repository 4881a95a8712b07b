"""``python -m benchmarks.gpu --stage 1 2 ...``: what to run on a CUDA device, in the order of what it teaches.

1. smoke: every kernel once against float64, each under a time limit; stops at the first that hangs or differs
2. parity: the device tests, then ``compute-sanitizer`` on stage 1, memcheck and racecheck
3. speed: the main problems beside the peers; launches and memory of a call
4. rates: time of each kernel on the main problems, and what share of the memory's and the exponentials' rate it reaches
5. tiles: the fastest tile of a streaming pass for each main problem, made the device's default in ``tuned.py``
6. step: OPTiML's training step at 224 px, batch 64, bfloat16 autocast, and the share of the loss; both also on two
   streams and in a CUDA graph, the step also compiled

Each stage writes ``benchmarks/results/gpu/STAGE.json`` before the next begins. A stage that is complete there is not
run again without ``--again``; stages 3 and 6 go on with what is missing. Without a device, stages 1 and 2 are rehearsed
in Triton's interpreter, and nothing is written; the others say "no device".
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import environment
from benchmarks.results import FOLDER, load, save
from benchmarks.workloads import MAIN, Workload
from otloss.backends import triton

ROOT = Path(__file__).parent.parent
RESULTS = FOLDER / "gpu"
Result = dict[str, Any]


def device() -> Result | None:
    """The GPU, or None."""
    if triton.status() is not None or triton.interpreted():
        return None
    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    return {"device": properties.name, "multiprocessors": properties.multi_processor_count, "capability": capability}


def child(*command: str) -> subprocess.Popen[str]:
    """A process of this project; in Triton's interpreter where there is no device."""
    extra = {} if device() else {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **extra}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def smoke(seconds: float) -> Result:
    """Stage 1. Reads the lines of ``gpu_smoke``; one that takes longer than ``seconds`` is a kernel that hangs."""
    process = child(sys.executable, "-m", "benchmarks.gpu_smoke")
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    cases: list[Result] = []
    said: list[str] = []
    running, started = "the first", time.perf_counter()

    def failed(why: str) -> Result:
        process.kill()
        return {"complete": False, "failed": running, "why": why, "output": said[-30:], "cases": cases}

    while True:
        try:
            line = lines.get(timeout=seconds)
        except queue.Empty:
            return failed(f"no answer in {seconds:g} s: it hangs, or compiles for that long")
        if line is None:
            code = process.wait()
            return failed(f"the process ended with {code}") if code else {"complete": True, "cases": cases}
        if not line.startswith("{"):
            said.append(line.rstrip())
            continue
        row = json.loads(line)
        if "start" in row:
            running, started = row["start"], time.perf_counter()
            continue
        cases.append(row | {"seconds": time.perf_counter() - started})
        print(f"  {row['case']}: {row['error_of_tolerance']:.2g} of the tolerance")
        if not row["same"]:
            return failed(f"differs from float64 by {row['error_of_tolerance']:.3g} times the tolerance")


def _checked(name: str, seconds: float, *command: str) -> Result:
    """Exit status and the last lines of a program."""
    process = child(*command)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        output += f"\nstopped after {seconds:g} s"
    tail = output.splitlines()[-15:]
    print(f"  {name}: {tail[-1] if tail else ''}")
    return {"status": process.returncode, "tail": tail}


def parity(seconds: float) -> Result:
    """Stage 2."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider")
    if device() is None:
        few = "test_solve and 9-1-dense"
        return {"tests": _checked("tests", seconds, *pytest, "-k", few, "tests/triton_kernels.py"), "complete": True}
    found: Result = {"tests": _checked("tests", 6 * seconds, *pytest, "tests/gpu")}
    if tool := shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin"):
        uncached = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")  # a cached block is larger than its tensor
        for check in ("memcheck", "racecheck"):
            command = (tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_smoke")
            found[check] = _checked(check, 2 * seconds, *uncached, *command)
    else:
        found["memcheck"] = found["racecheck"] = {"status": 0, "tail": ["skipped: compute-sanitizer is not here"]}
    return found | {"complete": all(part["status"] == 0 for part in found.values())}


def rows() -> list[Workload]:
    """What stage 3 times: forward and both, float32 and bfloat16, 50 iterations and to a tolerance."""
    found: list[Workload] = []
    for main in MAIN.values():
        found += [main, replace(main, name=f"{main.name}-forward", backward=False)]
        found.append(replace(main, name=f"{main.name}-dense", inputs="dense"))
    for main in MAIN.values():
        found.append(replace(main, name=f"{main.name}-bfloat16", dtype="bfloat16"))
        found.append(replace(main, name=f"{main.name}-tol", tol=1e-3, iterations=1000))
    return found


def speed(path: Path, rounds: int, repeats: int) -> Result:
    """Stage 3, written after each problem."""
    from benchmarks import gpu_timing

    result: Result = load(path) or {"environment": environment() | (device() or {}), "workloads": {}}
    for workload in rows():
        if workload.name in result["workloads"]:
            continue
        entry: Result = {"workload": vars(workload)}
        entry["times"] = gpu_timing.measure(workload, rounds, repeats)  # first, as it times the first call
        if workload.dtype == "float32":
            entry["errors"] = gpu_timing.errors(workload)
        result["workloads"][workload.name] = entry
        save(path, result)
        print(f"  {workload.name} {entry.get('errors', '')}")
        for row in entry["times"]:
            what = row.get("skipped") or f"{row['median_ms']:.3f} ms, first call {row['cold_s']:.1f} s"
            print(f"    {row['name']}: {what}")
    return result | {"complete": True}


def main() -> None:
    from benchmarks import gpu_more, gpu_step

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", type=int, nargs="*", default=[1, 2, 3, 4, 5, 6], choices=range(1, 7))
    parser.add_argument("--wheels", type=Path, help="a folder of wheels of peers in pure Python, used as they are")
    parser.add_argument("--again", action="store_true", help="run stages again that are complete")
    parser.add_argument("--seconds", type=float, default=90, help="limit for one kernel with its compilation")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=10, help="calls between two events")
    args = parser.parse_args()
    sys.path += [str(wheel) for wheel in sorted(args.wheels.glob("*-none-any.whl"))] if args.wheels else []
    here = device()
    if here is None:
        reason = triton.status() or "the interpreter is on"
        print(f"a rehearsal, nothing was measured: {reason}")
    stages: dict[int, tuple[str, Callable[[Path], Result]]] = {
        1: ("smoke", lambda path: smoke(args.seconds)),
        2: ("parity", lambda path: parity(args.seconds)),
        3: ("speed", lambda path: speed(path, args.rounds, args.repeats)),
        4: ("rates", lambda path: gpu_more.rates()),
        5: ("tiles", lambda path: gpu_more.tiles()),
        6: ("step", gpu_step.measure),
    }
    for number in sorted(set(args.stage)):
        name, run = stages[number]
        path = RESULTS / f"{number}-{name}.json"
        if here is None and number > 2:
            print(f"stage {number}, {name}: no device")
            continue
        if here is not None and args.again:
            path.unlink(missing_ok=True)
        if here is not None and load(path).get("complete"):
            print(f"stage {number}, {name}: complete in {path}")
            continue
        print(f"stage {number}, {name}", flush=True)
        start = time.perf_counter()
        result = run(path)
        result.setdefault("environment", environment() | (here or {}))
        result["seconds"] = time.perf_counter() - start
        if here is not None:
            save(path, result)
        if not result["complete"]:
            raise SystemExit(json.dumps({key: value for key, value in result.items() if key != "cases"}, indent=1))


if __name__ == "__main__":
    main()
