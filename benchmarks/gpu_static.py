"""``python -m benchmarks.gpu_static``: compile every default configuration of the GPU kernels, without a GPU.

The backend's own launches are recorded on shapes that reach every entry of its tables (tensors on the meta device,
so nothing is computed), then compiled for sm_80, sm_90 and sm_100. From the machine code come registers, bytes
spilled, shared memory, how many warps fit a multiprocessor, and the exponentials and tensor-core instructions of
the innermost loop that has most of them (of the whole kernel where it has no loop). The table is in
``benchmarks/results/gpu_static.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

RESULTS = Path(__file__).parent / "results"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Multiprocessors (A100, H100, B200), and kilobytes of shared memory that one program and one multiprocessor may have.
ARCHITECTURES = {80: (108, 163, 164), 90: (132, 227, 228), 100: (148, 227, 228)}
# Batch, n, m, d (0: a dense cost), dtype: one shape or more for every entry of otloss/backends/triton/config.py.
SHAPES: list[tuple[int, int, int, int, torch.dtype]] = [
    *((64, size, size, d, torch.float32) for size, d in ((16, 24), (32, 0), (49, 384), (64, 0), (128, 0), (128, 384))),
    *((64, n, m, 49, torch.float32) for n, m in ((16, 128), (128, 64), (64, 128))),
    *((64, n, m, 49, torch.float32) for n, m in ((512, 100), (196, 196), (512, 512), (1024, 1024))),
    *((64, size, size, 0, torch.float32) for size in (256, 1024)),
    (1, 4096, 4096, 0, torch.float32),
    (64, 2048, 2048, 64, torch.float32),
    *((64, size, size, d, torch.float64) for size, d in ((49, 384), (64, 0), (512, 49), (512, 0))),
    (1, 4096, 4096, 64, torch.float64),
]


@dataclass(frozen=True)
class Variant:
    """One kernel with the types, constants and options of one launch."""

    kernel: str
    module: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    warps: int
    stages: int


@dataclass
class Report:
    """What the machine code of a variant says."""

    kernel: str
    arch: int
    tile: str
    warps: int
    registers: int
    spilled: int
    shared: int
    warps_per_sm: int
    ex2: int
    mma: int
    ex2_per_entry: float | None
    shapes: list[str] = field(default_factory=list)


def _variant(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Variant:
    """The specialisation that Triton makes of a launch: 1 is a constant, multiples of 16 are known as such."""
    options = dict(options)
    warps, stages = options.pop("num_warps"), options.pop("num_stages", 3)
    values = dict(zip([p.name for p in kernel.params], args, strict=False)) | options
    signature, constants, divisible = [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        specialised = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, Tensor):
            signature.append((name, triton.runtime.jit.mangle_type(value)))
            divisible.append(name)
        elif isinstance(value, float):
            signature.append((name, parameter.annotation_type or "fp32"))
        else:
            signature.append((name, "i32"))
            divisible += [name] if specialised and value % 16 == 0 else []
    return Variant(
        kernel.fn.__name__, kernel.fn.__module__, tuple(signature), tuple(constants), tuple(divisible), warps, stages
    )


@contextlib.contextmanager
def recording(found: dict[Variant, list[str]], label: str, processors: int) -> Iterator[None]:
    """Inside, launches are noted and not made, and an iteration runs once."""
    from otloss.backends.triton import gradient, launch, solver

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        labels = found.setdefault(_variant(kernel, args, options), [])
        if label not in labels:
            labels.append(label)

    with contextlib.ExitStack() as stack:
        for module in (launch, solver, gradient):
            stack.enter_context(mock.patch.object(module, "launch", note))
        for module in (solver, gradient):
            stack.enter_context(mock.patch.object(module, "iterate", lambda step, most, running: step()))
        stack.enter_context(mock.patch.object(launch, "processors", lambda device: processors))
        yield


def variants(shapes: list[tuple[int, int, int, int, torch.dtype]], processors: int) -> dict[Variant, list[str]]:
    """Every launch of solve and both gradients on these shapes."""
    from otloss.backends.protocol import Problem, Upstream
    from otloss.backends.triton import gradient
    from otloss.backends.triton.launch import DeviceProblem
    from otloss.backends.triton.solver import solve

    found: dict[Variant, list[str]] = {}
    for batch, n, m, d, dtype in shapes:

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        label = f"{batch}x{n}x{m}" + (f", d {d}" if d else ", dense") + (", float64" if dtype == torch.float64 else "")
        with recording(found, label, processors):
            left, right = (empty(batch, n, d), empty(batch, m, d)) if d else (empty(batch, n, m), None)
            problem = DeviceProblem(Problem(left, right, empty(batch, n), empty(batch, m), 0.05))
            f, g, w, *_ = solve(problem, 50, 1e-5)
            for adjoint in (True, False):
                gradient.implicit_gradient(problem, f, g, Upstream(w, w), adjoint, True)
            gradient.unrolled_gradient(problem, empty(batch, dtype=torch.int64), Upstream(w, w), True, 2)
    return found


def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(name: str, *flags: str) -> str:
            return subprocess.run(
                [TOOLS / name, *flags, file.name], capture_output=True, text=True, check=True, timeout=120
            ).stdout

        return tool("cuobjdump", "--dump-resource-usage"), tool("nvdisasm", "-c")


def _innermost(code: str) -> list[str]:
    """The innermost loops of a disassembly, each as its instructions; the whole of it if there is none."""
    lines = code.splitlines()
    labels = {match[1]: at for at, line in enumerate(lines) if (match := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = []
    for at, line in enumerate(lines):
        match = re.search(r"\bBRA\b.*(\.L_x_\d+)", line)
        start = labels.get(match[1], at) if match else at
        if any("BRA" not in x and ";" in x for x in lines[start:at]):  # else it is the self-loop that ends every kernel
            loops.append((start, at))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return ["\n".join(lines[start : end + 1]) for start, end in inner] or [code]


def _counts(code: str) -> tuple[int, int]:
    return len(re.findall(r"MUFU\.EX2", code)), len(re.findall(r"\b(?:[HD]MMA|HGMMA|UTC\w*MMA)\b", code))


def compile_variant(variant: Variant, arch: int) -> Report:
    """Compile one variant (Triton keeps the result in its cache) and read its machine code."""
    kernel = getattr(__import__(variant.module, fromlist=[variant.kernel]), variant.kernel)
    names = [p.name for p in kernel.params]
    source = ASTSource(
        kernel,
        dict(variant.signature),
        dict(variant.constants),
        {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible},
    )
    from otloss.backends.triton.launch import register_bound

    options = {"num_warps": variant.warps, "num_stages": variant.stages, "maxnreg": register_bound(variant.warps)}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, code = _disassemble(compiled.asm["cubin"])
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))  # type: ignore[index]
    spilled = stack if re.search(r"\b(STL|LDL)\b", code) else 0
    shared = compiled.metadata.shared
    _, most, per_sm = ARCHITECTURES[arch]
    if shared > most * 1024:
        raise RuntimeError(f"{variant.kernel} takes {shared} bytes of shared memory, sm_{arch} has {most} KiB")
    by_registers = 65536 // (-(-registers // 8) * 8 * 32) // variant.warps
    by_shared = per_sm * 1024 // (shared + 1024)
    programs = min(by_registers, by_shared, 64 // variant.warps, 32)
    loops = [_counts(loop) for loop in _innermost(code)]
    ex2, mma = max(loops) if any(map(sum, loops)) else _counts(code)
    constants = dict(variant.constants)
    sides = [constants[name] for name in ("N", "M", "I", "J") if isinstance(constants.get(name), int)][:2]
    entries = sides[0] * sides[1] if len(sides) == 2 else 0
    tile = ", ".join(f"{name} {value}" for name, value in constants.items() if name in {"I", "J", "N", "M", "K", "D"})
    types = dict(variant.signature).values()
    return Report(
        variant.kernel, arch, tile + (", float64" if "*fp64" in types else ""), variant.warps, registers, spilled,
        shared, programs * variant.warps, ex2, mma, round(ex2 * 32 * variant.warps / entries, 2) if entries else None,
    )  # fmt: skip


def _run(job: tuple[Variant, int, list[str]]) -> Report:
    variant, arch, shapes = job
    report = compile_variant(variant, arch)
    report.shapes = shapes
    return report


def measure(
    archs: list[int], shapes: list[tuple[int, int, int, int, torch.dtype]], jobs: int = 1, verbose: bool = False
) -> list[Report]:
    """Reports of every variant on every architecture."""
    todo = [(v, arch, labels) for arch in archs for v, labels in variants(shapes, ARCHITECTURES[arch][0]).items()]
    reports = []
    with ProcessPoolExecutor(jobs) as pool:
        for report in pool.map(_run, todo):
            reports.append(report)
            if verbose:
                print(row(report), flush=True)
    return reports


HEADER = (
    "| kernel | sm | tile | warps | registers | spilled | shared | warps/SM | ex2 | mma | ex2 per entry |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(r: Report) -> str:
    """One line of the table."""
    per_entry = "" if r.ex2_per_entry is None else f"{r.ex2_per_entry:g}"
    return (
        f"| {r.kernel} | {r.arch} | {r.tile} | {r.warps} | {r.registers} | {r.spilled} | {r.shared} | {r.warps_per_sm} "
        f"| {r.ex2} | {r.mma} | {per_entry} |"
    )


def write(reports: list[Report]) -> None:
    """The result files, which name the architectures that they hold."""
    archs = ", ".join(f"sm_{arch}" for arch in sorted({r.arch for r in reports}))
    summary = f"{archs}: {len(reports)} compilations, {sum(r.spilled > 0 for r in reports)} spill.\n"
    (RESULTS / "gpu_static.md").write_text("\n".join([__doc__ or "", summary, HEADER, *map(row, reports), ""]))
    (RESULTS / "gpu_static.json").write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_static", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time")
    parser.add_argument("--quick", action="store_true", help="a few shapes only; writes nothing")
    args = parser.parse_args()
    print(HEADER)
    reports: list[Report] = []
    for arch in args.arch:  # written after each: a run that is cut off leaves what it has measured
        reports += measure([arch], SHAPES[::4] if args.quick else SHAPES, args.jobs, verbose=True)
        if not args.quick:
            write(reports)
    spilling = [r for r in reports if r.spilled]
    print(f"{len(reports)} compilations, {len(spilling)} spill")
    if spilling:
        raise SystemExit("these configurations spill: " + ", ".join(f"{r.kernel} ({r.tile})" for r in spilling))


if __name__ == "__main__":
    main()
