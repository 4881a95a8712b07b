"""What PyTorch 2.6 lacks and later versions have, and types where PyTorch states none.

Everything else in otloss is written so that all versions take it.

Its compiler takes no ``zip`` of sequences that differ in length, no ``dict |= dict`` and no slice of a named tuple. It
follows every path through a chain of small operations, which may take hours; :func:`one_operator` is for these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.autograd import forward_ad

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
        made = torch.library.custom_op(f"otloss::{name}", function, mutates_args=())
        made.register_fake(fake)
        operator: Callable[..., Result] = made

        def call(*args: Any) -> Result:
            return operator(*args) if torch.compiler.is_compiling() else function(*args)

        return call

    return decorate


# What is read here is private to PyTorch. Where a version has it no more, no shortcut is taken.
_transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def is_transformed() -> bool:
    """Whether a compiler or a transform such as vmap follows this call."""
    return torch.compiler.is_compiling() or _transforms_active()


def has_values(x: torch.Tensor) -> bool:
    """Whether the values of ``x`` can be looked at without waiting for a device, by code that nothing follows."""
    return x.device.type == "cpu" and not is_transformed()


def records_nothing() -> bool:
    """Whether derivatives of no kind are recorded here, where nothing is transformed."""
    return not torch.is_grad_enabled() and getattr(forward_ad, "_current_level", 0) < 0


_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), float, str}
_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
_profiled: Callable[[], bool] = getattr(torch._C._autograd, "_profiler_enabled", lambda: True)


def is_watched(*arguments: Any) -> bool:
    """Whether a mode, a profiler or a subclass of tensors wants to see which operators are called.

    Where none does, and nothing is transformed, the body of an operator may be called without PyTorch's dispatcher,
    which takes longer than a small kernel.
    """
    return not _PLAIN.issuperset(map(type, arguments)) or bool(_modes() or _function_modes() or _profiled())


#: Functions whose types PyTorch does not state.
broadcast_shapes: Callable[..., torch.Size] = torch.broadcast_shapes
cuda_is_initialized: Callable[[], bool] = torch.cuda.is_initialized
cuda_event: Callable[[], torch.cuda.Event] = torch.cuda.Event

if TYPE_CHECKING:

    class OperatorLibrary(torch.library.Library):
        """A namespace of operators."""

        def __init__(self, ns: str, kind: str) -> None: ...

        def define(self, schema: str, alias_analysis: str = "", *, tags: Sequence[torch.Tag] = ()) -> str: ...

        def impl(self, op_name: str, fn: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None: ...

    class LevelFunction(torch.autograd.Function):
        """An autograd function that records at the innermost level of functorch's transforms alone.

        The kernel of an operator for autograd is called once at each level. Its ``apply`` looks at no signature, which
        takes long.
        """

        @classmethod
        def apply(cls, *arguments: Any) -> tuple[torch.Tensor, ...]: ...

else:
    OperatorLibrary = torch.library.Library
    LevelFunction = torch.autograd.function._SingleLevelFunction

#: A context in which operators are called by their own kernels, without autograd's.
below_autograd: Any = torch._C._AutoDispatchBelowAutograd


def call_at_next_level(operator: Callable[..., Result], *arguments: Any) -> Result:
    """What an operator returns, from the forward of a `LevelFunction` inside transforms, whose level it records.

    The levels outside this one record it for themselves, so there derivatives are on.
    """
    with below_autograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return operator(*arguments)


def kernel_for_autograd(
    operator: Callable[..., tuple[torch.Tensor, ...]], function: type[LevelFunction]
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The kernel for autograd of an operator whose derivative is that of ``function``, a `LevelFunction`.

    ``torch.library.register_autograd`` makes one that functorch's transforms refuse.
    """

    def kernel(*arguments: Any) -> tuple[torch.Tensor, ...]:
        if records_nothing():
            with below_autograd():
                return operator(*arguments)
        from torch._functorch.utils import enable_single_level_autograd_function

        with enable_single_level_autograd_function():
            return function.apply(*arguments)

    return kernel
