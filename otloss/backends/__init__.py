"""Backends: the registry, and the choice of one; ``protocol.py`` says what each must offer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from otloss.backends import cpu, reference, triton
from otloss.backends.protocol import Backend
from otloss.compat import reads_context

__all__ = ["BackendStatus", "backends", "check_backend", "choose_backend", "get_backend", "use_backend"]

# In order of preference for the devices named. Here the type checker holds each module against the protocol.
_REGISTRY: dict[str, tuple[Backend, tuple[str, ...] | None]] = {
    "cpu": (cpu, ("cpu",)),
    "triton": (triton, ("cuda",)),
    "reference": (reference, None),  # None: every device
}
_forced: ContextVar[str | None] = ContextVar("otloss_forced_backend", default=None)
_last_forced: str | None = None  # the same, but of whichever thread changed it last: for a compiler that cannot read it


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used here; true when it can, and says why when it cannot."""

    name: str
    reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is None

    def __str__(self) -> str:
        return "usable" if self else f"off: {self.reason}"


def backends() -> dict[str, BackendStatus]:
    """Every backend by name with its status.

    Example:
        >>> import otloss
        >>> bool(otloss.backends()["reference"])
        True
    """
    return {name: BackendStatus(name, module.status()) for name, (module, _) in _REGISTRY.items()}


def get_backend(name: str) -> Backend:
    """The module of a backend."""
    return _REGISTRY[name][0]


def check_backend(name: str, device: str | None = None) -> str:
    """The name of a backend that exists, works here, and serves the device if one is given."""
    if not isinstance(name, str) or name not in _REGISTRY:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _REGISTRY))}, got {name!r}")
    module, devices = _REGISTRY[name]
    reason = module.status()
    if reason is not None:
        raise ValueError(f"backend {name!r} is off: {reason}")
    if devices is not None and name == "triton" and triton.interpreted():
        devices = (*devices, "cpu")  # usable when asked for by name, never chosen by itself
    if device is not None and devices is not None and device not in devices:
        raise ValueError(f"backend {name!r} works on {', '.join(devices)} tensors, got a tensor on {device}")
    return name


def choose_backend(name: str | None, device: str, relaxed: bool = False) -> str:
    """The backend for a call: the one asked for, else the one forced, else the first that serves device and problem."""
    if name is None:
        name = _forced.get() if reads_context() else _last_forced
    if name is not None:
        check_backend(name, device)
        if relaxed and not _REGISTRY[name][0].RELAXES:
            able = [repr(other) for other, (module, _) in _REGISTRY.items() if module.RELAXES]
            raise ValueError(f"backend {name!r} has no penalties rho_a and rho_b; take {' or '.join(able)}")
        return name
    for candidate, (module, devices) in _REGISTRY.items():
        serves = (devices is None or device in devices) and (module.RELAXES or not relaxed)
        if serves and module.status() is None:
            return candidate
    raise AssertionError("the reference backend serves every device")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for the calls inside, in this thread.

    Raises:
        ValueError: there is no such backend, or it cannot be used here.

    Example:
        >>> import torch, otloss
        >>> with otloss.use_backend("reference"):
        ...     out = otloss.sinkhorn(torch.rand(3, 4))
    """
    global _last_forced
    token = _forced.set(check_backend(name))
    _last_forced = name
    try:
        yield
    finally:
        _forced.reset(token)
        _last_forced = _forced.get()
