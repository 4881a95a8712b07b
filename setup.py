"""Builds the optional CPU kernels (csrc/ -> otloss._C); everything else is declared in pyproject.toml.

Without a compiler that serves, or with OTLOSS_NO_EXT=1, the install goes on without them, and the PyTorch reference
backend serves. GCC and Clang serve, on Windows clang-cl beside Visual Studio: the kernels use vector types that
Microsoft's compiler lacks. PyTorch is neither compiled against nor linked, so a build serves every version of it.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent


class BuildKernels(build_ext):
    """Takes clang-cl where setuptools would take Microsoft's compiler, and says so where there is none."""

    def build_extension(self, ext) -> None:
        if self.compiler.compiler_type == "msvc":
            clang = shutil.which("clang-cl")
            if clang is None:
                raise CompileError("the CPU kernels need clang-cl, which is not on the path; otloss works without them")
            if not self.compiler.initialized:
                self.compiler.initialize(self.plat_name)  # finds Microsoft's headers and linker
            self.compiler.cc = clang
            ext.extra_compile_args = [
                f"/clang:{flag}" if flag.startswith("-") else flag for flag in ext.extra_compile_args
            ]
            ext.extra_link_args = []
        super().build_extension(ext)


def extensions() -> list:
    if os.environ.get("OTLOSS_NO_EXT") == "1":
        return []
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        print("otloss is installed without its CPU kernels: pybind11 is not available to build them")
        return []
    return [
        Pybind11Extension(
            "otloss._C",
            sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp")),
            depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.hpp")),
            cxx_std=17,
            optional=True,  # a failed build is a warning, not a failed install
            # Contraction to FMA is off under -std=c++17 unless asked for; infinities and NaN keep their meaning.
            extra_compile_args=["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"],
            extra_link_args=["-pthread"],
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
