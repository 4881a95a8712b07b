"""The Triton backend where there is no GPU: why it is off, its kernels in the interpreter, and its machine code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import otloss
from otloss.backends import triton

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("OTLOSS_TRITON_FOLDER", tempfile.gettempdir()))
installed = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        cwd=HERE.parent,
    )


def test_says_why_it_is_off() -> None:
    if otloss.backends()["triton"]:
        pytest.skip("it is on")
    reason = str(otloss.backends()["triton"])
    assert "TRITON_INTERPRET=1" in reason or "not installed" in reason or "NVIDIA" in reason
    with pytest.raises(ValueError, match="backend 'triton' is off"), otloss.use_backend("triton"):
        pass


def test_the_package_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_INSTALLED", False)
    assert "not installed" in str(otloss.backends()["triton"])


@pytest.mark.parametrize("interpreted", [False, True])
def test_a_triton_that_is_too_old_is_said(interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_INSTALLED", True)
    monkeypatch.setattr(triton, "_INTERPRETED", interpreted)
    for version, old in (("3.2.0", True), ("2.3.1", True), ("3.3.0", False), ("3.10.0+git1", False), (None, False)):
        monkeypatch.setattr(triton, "_TOO_OLD", triton._too_old(version))
        assert ("need Triton 3.3" in (triton.status() or "")) == old


def test_an_interpreter_that_does_not_fit_numpy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for numpy, version, fits in (("2.4.1", "3.6.0", False), ("2.3.5", "3.6.0", True), ("2.4.1", "3.8.0", True)):
        monkeypatch.setattr(triton, "_version", lambda name, numpy=numpy: numpy)
        assert (triton._misfit(version) is None) == fits


@installed
def test_a_grid_that_cuda_does_not_have_is_refused() -> None:
    code = (
        "from otloss.backends.triton import config\n"
        "from otloss.backends.triton.launch import launch\n"
        "try: launch(None, (1, 2, 65536), tile=config.VECTORS)\n"
        "except ValueError as error: assert 'no grid of (1, 2, 65536) blocks' in str(error)\n"
        "else: raise SystemExit('launched')"
    )
    done = run("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_import_does_not_load_it() -> None:
    done = run("-c", "import sys, otloss; otloss.backends(); sys.exit('triton' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_import_leaves_cuda_alone() -> None:
    """A process that has asked for CUDA cannot use it after a fork."""
    code = (
        "import torch\n"
        "def asked(): raise AssertionError('CUDA was asked for')\n"
        "torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = asked\n"
        "import otloss\n"
        "assert otloss.sinkhorn(torch.rand(3, 4)).converged"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


@installed
def test_is_used_on_the_cpu_only_when_asked_for() -> None:
    code = (
        "from otloss.backends import choose_backend\n"
        "assert choose_backend('triton', 'cpu') == 'triton'\n"
        "assert choose_backend(None, 'cpu') != 'triton'\n"
    )
    done = run("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(bool(otloss.backends()["triton"]), reason="there is a device, or the interpreter is on")
def test_the_device_suite_runs_to_a_skip() -> None:
    done = run("-m", "pytest", "-q", "-o", "addopts=", "-rs", str(HERE / "gpu"))
    assert done.returncode == 0 and "needs a GPU: " in done.stdout, done.stdout
    done = run("-m", "benchmarks.gpu", "--stage", "3", "4", "5", "6")
    assert done.returncode == 0 and "nothing was measured: " in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("no device") == 4


@installed
@pytest.mark.slow
@pytest.mark.skipif(bool(otloss.backends()["triton"]), reason="there is a device, or the interpreter is on")
def test_the_first_stages_are_rehearsed() -> None:
    done = run("-m", "benchmarks.gpu", "--stage", "1", "2", "--seconds", "300")
    assert done.returncode == 0 and "unrolled, large, features, no stored cost" in done.stdout, (
        done.stdout + done.stderr
    )
    assert "passed" in done.stdout


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ("print(json.dumps({'start': 'k'}), flush=True); time.sleep(60)", "no answer in 2 s"),
        ("print(json.dumps({'start': 'k'}), flush=True); sys.exit(3)", "ended with 3"),
        (
            "print(json.dumps({'start': 'k'}), flush=True)\n"
            "print(json.dumps({'case': 'k', 'error_of_tolerance': 7.0, 'same': False}), flush=True); time.sleep(60)",
            "differs from float64 by 7 times",
        ),
    ],
)
def test_the_smoke_stage_names_the_kernel_that_fails(says: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu

    def child(*command: str) -> subprocess.Popen[str]:
        code = f"import json, sys, time\n{says}"
        return subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE)

    monkeypatch.setattr(gpu, "child", child)
    result = gpu.smoke(2.0)
    assert not result["complete"] and result["failed"] == "k" and why in result["why"]


#: What runs in the interpreter alone, in processes of their own: Triton reads TRITON_INTERPRET when it is imported.
KERNEL_TESTS = sorted(path for path in HERE.glob("triton_*.py") if "\ndef test_" in path.read_text())


@installed
@pytest.mark.slow
@pytest.mark.parametrize("file", KERNEL_TESTS, ids=lambda path: path.stem)
def test_kernels_in_the_interpreter(file: Path) -> None:
    options = ("-o", "addopts=", "-q", "-x", "-W", "ignore::RuntimeWarning", "--durations=5")
    done = run("-m", "pytest", *options, str(file), TRITON_INTERPRET="1")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kernel_test_is_run() -> None:
    assert {path.stem for path in KERNEL_TESTS} >= {"triton_kernels", "triton_launches", "triton_limits"}


def older() -> list[str]:
    """Versions of Triton that lie in folders of their own, see ``benchmarks/gpu_static.py``; the oldest first."""
    found = [path.name.removeprefix("triton-") for path in FOLDER.glob("triton-3.*") if (path / "triton").is_dir()]
    return sorted(found, key=lambda version: [int(part) for part in version.split(".")[:2]])


@installed
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("which", ["installed", "oldest"])
def test_default_configurations_do_not_spill(which: str) -> None:
    """The fullest variant of each kernel and tile on a few shapes; ``python -m benchmarks.gpu_static`` compiles all."""
    from benchmarks import gpu_static

    if which == "oldest" and not older():
        pytest.skip(f"no older Triton: pip install --no-deps --target {FOLDER}/triton-3.3.1 triton==3.3.1")
    reports = gpu_static.compile_with(which if which == "installed" else older()[0], FOLDER, [90], sample=True)
    modules = (HERE.parent / "otloss" / "backends" / "triton").glob("*.py")
    kernels = {name for module in modules for name in re.findall(r"^@jit\(.*\)\ndef (\w+)", module.read_text(), re.M)}
    assert {report["kernel"] for report in reports} == kernels
    assert not [report for report in reports if report["spilled"]]


@installed
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_the_number_of_variants_is_bounded() -> None:
    """Over every size of a regime, as docs/gpu.md says."""
    code = (
        "import collections, torch\n"
        "from benchmarks.gpu_compile import variants\n"
        "def most(sides, other):\n"
        "    shapes = [(3, n, m, 0, torch.float32) for n in other for m in sides]\n"
        "    shapes += [(3, n, n, 0, torch.float32) for n in sides if n >= min(other)]\n"
        "    return collections.Counter(variant.kernel for variant in variants(shapes, 132))\n"
        "small = most((1, 5, 16, 17, 32, 33, 48, 50, 64), (1, 5, 16, 17, 32, 33, 48, 50, 64))\n"
        "assert small['solve_small'] == 27 and small['adjoint_small'] == 21, small\n"
        "assert max(small['half_step'], small['unroll_step']) <= 98, small\n"
        "sides = [2**k + change for k in range(4, 10) for change in (0, 1, 16)]\n"
        "medium = most((1, 5, *sides, 1024), (65, 80))\n"
        "assert medium['iterate_rows'] == 23 and medium['normal_rows'] == 15, medium\n"
        "assert medium['minima'] <= 98, medium"
    )
    done = run("-W", "ignore", "-c", code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr


@installed
def test_float64_scalars_are_passed_in_full() -> None:
    """Triton 3.3 would pass them in 32 bits, in silence; see ``compat.py``."""
    code = (
        "from otloss.backends.triton import mixed, relaxed, rows, small, stream\n"
        "small = small.solve_small, relaxed.relax_small\n"
        "for kernel in (*small, rows.iterate_rows, stream.commit_rows, mixed.commit_columns, relaxed.balance):\n"
        "    types = {p.name: p.annotation_type for p in kernel.params}\n"
        "    assert types['eps'] == types['tol'] == 'fp64', types"
    )
    for version in ("installed", *older()[:1]):
        path = os.pathsep.join(
            (*([str(FOLDER / f"triton-{version}")] if version != "installed" else []), str(HERE.parent))
        )
        done = run("-c", code, TRITON_INTERPRET="0", PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
