"""``python -m benchmarks.gpu_compile``: compile the GPU kernels with the Triton at hand, and read the machine code.

No GPU is needed. The backend's own launches are recorded on shapes that reach every entry of its tables (tensors on the
meta device, so nothing is computed), then compiled. One line of JSON is printed for each. ``gpu_static`` runs this for
several versions of Triton and writes the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64"}


class Shape(NamedTuple):
    """What a problem's variants depend on."""

    batch: int
    n: int
    m: int
    d: int
    """0: a dense cost."""
    dtype: torch.dtype
    kind: str = "cosine"
    relaxed: bool = False


# One shape or more for every entry of otloss/backends/triton/config.py.
SHAPES: list[tuple[Any, ...]] = [
    *((64, n, m, 0, torch.float32) for n, m in ((16, 24), (49, 49), (64, 64), (100, 30))),
    *((64, n, m, 0, torch.float32) for n, m in ((100, 60), (100, 100), (196, 196), (512, 512), (1000, 1000))),
    *((64, n, m, d, torch.float32) for n, m, d in ((16, 24, 32), (49, 49, 512), (512, 512, 49))),
    (4, 3000, 3000, 64, torch.float32),  # streamed, from features and from the cost
    (4, 3008, 3000, 0, torch.float32),
    (1, 60_000, 16, 0, torch.float32),  # columns are split over programs
    *((64, n, n, d, torch.float64) for n, d in ((30, 384), (500, 0))),
    *((64, n, m, 0, torch.float32, "", True) for n, m in ((16, 24), (49, 49), (64, 64), (100, 30), (100, 60))),
    *((64, n, m, 0, torch.float32, "", True) for n, m in ((100, 100), (196, 196), (512, 512), (1000, 1000))),
    *((64, n, n, 0, torch.float64, "", True) for n in (30, 500)),
    (4, 3008, 3000, 0, torch.float32, "", True),
    *((batch, n, n, 64, torch.float32, kind) for batch, n in ((64, 49), (4, 3000)) for kind in ("sqeuclidean", "dot")),
    (64, 30, 30, 384, torch.float64, "sqeuclidean"),
]
# What a test compiles: each kernel once.
SAMPLE: list[tuple[Any, ...]] = [
    (64, 49, 49, 512, torch.float32),
    (64, 500, 500, 0, torch.float32),
    (4, 3000, 3000, 64, torch.float32),
    (1, 60_000, 16, 0, torch.float32),
    *((64, n, n, 0, torch.float32, "", True) for n in (49, 500)),
    (4, 3000, 3000, 64, torch.float32, "sqeuclidean", True),
]


@dataclass(frozen=True)
class Architecture:
    """Multiprocessors of a device of this kind, the kilobytes of shared memory of a program, and what one holds."""

    processors: int
    shared: int
    shared_per_sm: int
    warps_per_sm: int


ARCHITECTURES = {  # A100, H100, B200, RTX 5090
    80: Architecture(108, 163, 164, 64),
    90: Architecture(132, 227, 228, 64),
    100: Architecture(148, 227, 228, 64),
    120: Architecture(170, 99, 100, 48),
}


@dataclass(frozen=True)
class Variant:
    """One kernel with the types, constants and options of one launch."""

    kernel: str
    module: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    tile: Any


@dataclass
class Report:
    """What the machine code of a variant says; ``spilled`` counts bytes, ``programs`` those that fit an SM at once."""

    triton: str
    arch: int
    kernel: str
    tile: str
    warps: int
    registers: int
    spilled: int
    shared: int
    programs: int


def _variant(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Variant:
    """The specialisation that Triton makes of a launch: 1 is a constant, multiples of 16 are known as such."""
    options = dict(options)
    tile = options.pop("tile")
    values = dict(zip([p.name for p in kernel.params], args, strict=False)) | options
    signature, constants, divisible = [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        specialised = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, Tensor):
            signature.append((name, POINTERS[value.dtype]))
            divisible += [] if parameter.do_not_specialize_on_alignment else [name]
        elif isinstance(value, float):
            signature.append((name, parameter.annotation_type or "fp32"))
        else:
            signature.append((name, "i32"))
            divisible += [name] if specialised and value % 16 == 0 else []
    return Variant(kernel.fn.__name__, kernel.fn.__module__, tuple(signature), tuple(constants), tuple(divisible), tile)


@contextlib.contextmanager
def recording(found: dict[Variant, None], processors: int) -> Iterator[None]:
    """Inside, launches are noted and not made, and an iteration runs once."""
    from otloss.backends.triton import gradient, launch, solver

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        found[_variant(kernel, args, options)] = None

    with contextlib.ExitStack() as stack:
        for module in (launch, solver, gradient):
            stack.enter_context(mock.patch.object(module, "launch", note))
        for module in (solver, gradient):
            stack.enter_context(mock.patch.object(module, "iterate", lambda step, *rest, **options: step()))
        stack.enter_context(mock.patch.object(launch, "processors", lambda device: processors))
        yield


def variants(shapes: list[tuple[Any, ...]], processors: int) -> list[Variant]:
    """Every launch of solve and both gradients on these shapes (the fields of `Shape`), once."""
    from otloss.backends.protocol import Problem, Upstream
    from otloss.backends.triton import gradient, penalties
    from otloss.backends.triton.launch import DeviceProblem
    from otloss.backends.triton.solver import solve

    found: dict[Variant, None] = {}
    for batch, n, m, d, dtype, kind, relaxed in (Shape(*shape) for shape in shapes):

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        with recording(found, processors):
            left, right = (empty(batch, n, d), empty(batch, m, d)) if d else (empty(batch, n, m), None)
            rhos = [empty(batch) if relaxed else None for _ in range(2)]
            given = Problem(left, right, empty(batch, n), empty(batch, m), 0.05, *rhos, kind)
            for accelerate in (False, True):
                f, g, w, *_, shift = solve(DeviceProblem(given), 50, 1e-5, accelerate=accelerate)
            for adjoint in (True, False):
                problem = DeviceProblem(given, shift=shift)
                differentiate = (penalties if relaxed else gradient).implicit_gradient
                differentiate(problem, f, g, Upstream(w, w), adjoint, True)
            if not relaxed:
                n_iter = empty(batch, dtype=torch.int64)
                gradient.unrolled_gradient(DeviceProblem(given), n_iter, Upstream(w, w), True, 2)
    return list(found)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(name: str, *flags: str) -> str:
            return subprocess.run(
                [TOOLS / name, *flags, file.name], capture_output=True, text=True, check=True, timeout=120
            ).stdout

        return tool("cuobjdump", "--dump-resource-usage"), tool("nvdisasm", "-c")


def compile_variant(variant: Variant, arch: int) -> Report:
    """Compile one variant (Triton keeps the result in its cache) and read its machine code."""
    kernel = getattr(__import__(variant.module, fromlist=[variant.kernel]), variant.kernel)
    names = [p.name for p in kernel.params]
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible}
    source = ASTSource(kernel, dict(variant.signature), dict(variant.constants), divisible)
    warps = variant.tile.warps
    options = {"num_warps": warps, "num_stages": variant.tile.stages, "maxnreg": variant.tile.registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, code = _disassemble(compiled.asm["cubin"])
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))  # type: ignore[index]
    spilled = stack if re.search(r"\b(STL|LDL)\b", code) else 0
    shared, machine = compiled.metadata.shared, ARCHITECTURES[arch]
    if shared > machine.shared * 1024:
        raise RuntimeError(
            f"{variant.kernel} takes {shared} bytes of shared memory, sm_{arch} has {machine.shared} KiB"
        )
    by_registers = 65536 // (-(-registers // 8) * 8 * 32) // warps
    by_shared = machine.shared_per_sm * 1024 // (shared + 1024)
    programs = min(by_registers, by_shared, machine.warps_per_sm // warps, 32)
    constants = dict(variant.constants)
    tile = ", ".join(f"{name} {value}" for name, value in constants.items() if name in {"I", "J", "N", "M", "K", "D"})
    given = {name for name in names if constants.get(name, 0) is not None}  # pointers that are not None
    tile += ", features" if "right" in given else ""
    tile += f", {constants['KIND']}" if constants.get("KIND") in {"sqeuclidean", "dot"} else ""
    tile += ", sqeuclidean" if "add_i" in given else ""
    tile += ", penalties" if "soft" in given else ""
    tile += ", mixed steps" if given & {"mix", "one"} else ""
    tile += ", float64" if "*fp64" in dict(variant.signature).values() else ""
    return Report(
        triton.__version__, arch, variant.kernel, tile, warps, registers, spilled, shared, programs
    )  # fmt: skip


def fullest(found: list[Variant]) -> list[Variant]:
    """Of each kernel and tile the variant with the most inputs, which needs the most registers."""
    kept: dict[tuple[str, Any], Variant] = {}
    for variant in found:
        key = (variant.kernel, variant.tile)
        if key not in kept or len(variant.constants) < len(kept[key].constants):
            kept[key] = variant
    return list(kept.values())


def measure(arch: int, shapes: list[tuple[Any, ...]], sample: bool = False) -> Iterator[Report]:
    """Reports of every variant on an architecture; of a sample, of the fullest ones."""
    from otloss.backends.triton import config

    with mock.patch.object(config, "capability", lambda: divmod(arch, 10)):  # whose defaults are wanted
        found = variants(shapes, ARCHITECTURES[arch].processors)
    for variant in fullest(found) if sample else found:
        yield compile_variant(variant, arch)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_compile", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--sample", action="store_true", help="a few shapes only")
    args = parser.parse_args()
    for arch in args.arch:
        for report in measure(arch, SAMPLE if args.sample else SHAPES, args.sample):
            print(json.dumps(asdict(report)), flush=True)


if __name__ == "__main__":
    main()
