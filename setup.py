"""Builds the optional CPU kernels (csrc/ -> otloss._C); everything else is declared in pyproject.toml.

Without a compiler, or with OTLOSS_NO_EXT=1, the install goes on without them and the PyTorch reference backend serves.
"""

import os
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


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


setup(ext_modules=extensions())
