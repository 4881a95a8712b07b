"""What PyTorch 2.6 lacks and later versions have. Everything else in otloss is written so that all of them take it.

Its compiler takes no ``zip`` of sequences that differ in length, and no ``dict |= dict``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")
_OLD = not hasattr(torch.compiler, "is_exporting")  # new in PyTorch 2.7


def is_exporting() -> bool:
    """Whether a program is being exported; PyTorch 2.6 cannot tell that from a compilation."""
    return torch.compiler.is_compiling() if _OLD else torch.compiler.is_exporting()


def has_values(x: torch.Tensor) -> bool:
    """Whether the values of ``x`` can be looked at without waiting for a device, by code that is not being traced."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def read_when_compiling(function: Callable[[], Result]) -> Callable[[], Result]:
    """A function that reads a context variable, which the compiler of PyTorch 2.6 cannot do.

    There a compiled function keeps what was read when it was compiled. Later versions follow a change.
    """
    return torch.compiler.assume_constant_result(function) if _OLD else function  # type: ignore[no-any-return]
