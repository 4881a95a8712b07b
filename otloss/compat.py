"""What PyTorch 2.6 lacks and later versions have. Everything else in otloss is written so that all of them take it.

Its compiler takes no ``zip`` of sequences that differ in length, no ``dict |= dict`` and no slice of a named tuple. It
follows every path through a chain of small operations, which may take hours; :func:`one_operator` is for these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
_OLD = not hasattr(torch.compiler, "is_exporting")  # new in PyTorch 2.7


def is_exporting() -> bool:
    """Whether a program is being exported; PyTorch 2.6 cannot tell that from a compilation."""
    return torch.compiler.is_compiling() if _OLD else torch.compiler.is_exporting()


def reads_context() -> bool:
    """Whether a context variable can be read here, which is not so while PyTorch 2.6 compiles."""
    return not (_OLD and torch.compiler.is_compiling())


def one_operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Make a function of tensors, without gradient, one operator for the compiler of PyTorch 2.6.

    ``fake`` makes empty outputs of the right shapes from the same arguments. Later versions compile what is inside.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        if not _OLD:
            return function
        operator = torch.library.custom_op(f"otloss::{name}", function, mutates_args=())
        operator.register_fake(fake)

        def call(*args: Any) -> Result:
            return operator(*args) if torch.compiler.is_compiling() else function(*args)  # type: ignore[no-any-return]

        return call

    return decorate
