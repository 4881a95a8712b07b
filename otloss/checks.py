"""Checks of arguments. Every message names the argument, what was passed and what was expected."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real
from pathlib import Path

import torch
from torch import Tensor

_NO_CONTEXT = nullcontext()
_INSIDE = ("<eval_with_key>", *(f"{Path(str(file)).parent}{os.sep}" for file in (__file__, torch.__file__)))


def has_autocast(kind: str) -> bool:
    """Whether autocast exists for this type of device. Where it does not, even asking for its state is an error."""
    return kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)


def no_autocast(like: Tensor) -> AbstractContextManager[object]:
    """A context in which products on the device of ``like`` keep their dtype. Autocast would lower their precision."""
    kind = like.device.type
    on = has_autocast(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else _NO_CONTEXT


def _is_inside(file: str) -> bool:
    if file.startswith(_INSIDE):
        return True
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not cache:
        return f"{os.sep}torchinductor_" in file
    return os.path.abspath(file).startswith(os.path.join(os.path.abspath(cache), ""))


def warn(message: str, category: type[Warning]) -> None:
    """Give a warning that points at the caller's line: the nearest one outside PyTorch, compiled code and otloss.

    A warning filter names a module, and the warning carries the caller's. A filter that silences PyTorch's warnings
    therefore does not hide ours.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
        frame = frame.f_back
    place = (frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__", "<string>"))
    warnings.warn_explicit(message, category, *place, frame.f_globals.setdefault("__warningregistry__", {}))


def wide(x: Tensor) -> Tensor:
    """``x`` in float64, for sums whose terms cancel. On MPS, which has no float64, ``x`` as it is."""
    return x if x.device.type == "mps" else x.double()


def check_tensor(name: str, value: object, min_dim: int, shape: str) -> None:
    """Check that ``value`` is a dense floating-point tensor with at least ``min_dim`` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if value.is_nested or value.layout is not torch.strided:
        kind = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense tensor, got one that is {kind}")
    if value.dim() < min_dim:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def check_mask(name: str, value: object, shape: str) -> None:
    """Check that ``value`` is a tensor of truth values with at least one dimension."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of dtype bool and shape {shape}, got {got}")
    if value.dim() < 1:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def check_features(x: object, y: object) -> None:
    """Check that the shapes of ``x (B, n, d)`` and ``y (B, m, d)`` fit each other."""
    check_tensor("x", x, 2, "(B, n, d)")
    check_tensor("y", y, 2, "(B, m, d)")
    assert isinstance(x, Tensor) and isinstance(y, Tensor)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"x and y must have features of one dimension d, got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.shape[:-2] != y.shape[:-2]:
        raise ValueError(
            f"x and y must have the same leading dimensions, got {tuple(x.shape)} and {tuple(y.shape)}; to compare one "
            "set with many, expand it, as by y.expand(*x.shape[:-2], *y.shape[-2:])"
        )
    if 0 in x.shape[-2:] or y.shape[-2] == 0:
        raise ValueError(
            f"x and y must have at least one row and one feature, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    check_device(x=x, y=y)


def check_device(**tensors: Tensor | None) -> None:
    """Check that all tensors are on one device."""
    if len({t.device for t in tensors.values() if t is not None}) > 1:
        got = ", ".join(f"{name} on {t.device}" for name, t in tensors.items() if t is not None)
        raise ValueError(f"all arguments must be on one device, got {got}")


def working_dtype(**tensors: Tensor | None) -> torch.dtype:
    """The dtype to compute in: float64 if all tensors are float64, else float32. float64 mixes with no other dtype."""
    double = [t.dtype == torch.float64 for t in tensors.values() if t is not None]
    if any(double) and not all(double):
        got = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items() if t is not None)
        raise TypeError(f"float64 does not mix with other dtypes; convert the arguments to one dtype, got {got}")
    return torch.float64 if all(double) else torch.float32


def check_number(name: str, value: object, *, positive: bool) -> None:
    """Check that ``value`` is a finite number, NumPy's included. It is positive, or at least 0 if not `positive`."""
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # math.isfinite does not take the symbolic numbers of a compiler. The type checker knows no order for Real.
    if not (0 < value < math.inf or (value == 0 and not positive)):  # type: ignore[operator]
        raise ValueError(f"{name} must be {'positive' if positive else 'at least 0'} and finite, got {value}")


def check_strength(name: str, value: object) -> None:
    """Check that ``value`` is a positive finite number, or a tensor of such numbers, whose values are not looked at."""
    if isinstance(value, Tensor):
        check_tensor(name, value, 0, "(B,) or ()")
    else:
        check_number(name, value, positive=True)


def check_count(name: str, value: object) -> None:
    """Check that ``value`` is a positive integer, NumPy's included."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
