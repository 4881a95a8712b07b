"""Sets of different sizes: lists of tensors and nested tensors, padded to one tensor and a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from otloss.arguments import Arguments, Ragged
from otloss.checks import check_mask, check_tensor

__all__ = ["padded"]


def is_ragged(value: object) -> bool:
    """Whether these are sets of different sizes."""
    return isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.is_nested)


def padded(x: Ragged, y: Ragged, said: Arguments) -> tuple[Tensor, Tensor, Arguments]:
    """The sets and what a call says of them, where they are ragged padded with zeros that masks leave out.

    Raises:
        TypeError, ValueError: tensors of a list do not fit each other, or masses and masks do not fit their set.
    """
    if is_ragged(x):
        x, of_points = _pad("x", x, {"a": said.a, "log_a": said.log_a, "mask_x": said.mask_x})
        said = said._replace(**of_points)
    if is_ragged(y):
        y, of_points = _pad("y", y, {"b": said.b, "log_b": said.log_b, "mask_y": said.mask_y})
        said = said._replace(**of_points)
    return x, y, said  # type: ignore[return-value]  # what is no tensor now is refused by check_features


def _pad(name: str, sets: Ragged, of_points: dict[str, Ragged | None]) -> tuple[Tensor, dict[str, Any]]:
    """The sets as one tensor, and what has an entry for each of their points; a mask always."""
    parts = _parts(name, sets, 2, "(n, d)")
    for k, part in enumerate(parts):
        if 0 in part.shape or part.shape[1] != parts[0].shape[1]:
            raise ValueError(
                f"{name}[{k}] must have shape (n, {parts[0].shape[1]}) with at least one point and one feature, "
                f"as {name}[0] has {tuple(parts[0].shape)}, got {tuple(part.shape)}"
            )
    found = {}
    for other, value in of_points.items():
        if value is None and not other.startswith("mask"):
            continue
        if value is None:
            entries = [part.new_ones(len(part), dtype=torch.bool) for part in parts]
        else:
            entries = _parts(other, value, 1, "(n,)")
            if len(entries) != len(parts):
                raise ValueError(f"{other} must hold {len(parts)} tensors as {name} does, got {len(entries)}")
        for k, (entry, part) in enumerate(zip(entries, parts, strict=True)):
            if len(entry) != len(part):
                raise ValueError(f"{other}[{k}] must have {len(part)} entries as {name}[{k}] does, got {len(entry)}")
        found[other] = pad_sequence(entries, batch_first=True)
    return pad_sequence(parts, batch_first=True), found


def _parts(name: str, value: object, dims: int, shape: str) -> list[Tensor]:
    """The tensors of a list or nested tensor, which have one number of dimensions, one dtype and one device."""
    if isinstance(value, Tensor) and value.is_nested and value.layout is torch.jagged:
        parts = list(value.unbind())
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    else:
        got = str(value.layout) + " layout" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a list of tensors {shape} or a nested tensor of jagged layout, got {got}")
    if not parts:
        raise ValueError(f"{name} must hold at least one tensor {shape}, got none")
    for k, part in enumerate(parts):
        if name.startswith("mask"):
            check_mask(f"{name}[{k}]", part, shape)
        else:
            check_tensor(f"{name}[{k}]", part, dims, shape)
        if part.dim() != dims:
            raise ValueError(f"{name}[{k}] must have shape {shape}, got {tuple(part.shape)}")
        if part.dtype != parts[0].dtype:
            raise TypeError(f"{name}[{k}] must have dtype {parts[0].dtype} as {name}[0] has, got {part.dtype}")
        if part.device != parts[0].device:
            raise ValueError(f"{name}[{k}] must be on {parts[0].device} as {name}[0] is, got {part.device}")
    return parts
