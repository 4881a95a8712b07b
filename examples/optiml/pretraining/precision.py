"""Which number format the processor at hand is fast in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .settings import Precision


def fast_precision() -> Precision:
    """bfloat16 on processors that multiply in it: there a step takes less time, on others many times as much."""
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # which older PyTorch does not have
    fast = not torch.cuda.is_available() and (known.get("avx512_bf16") or known.get("amx_bf16"))
    return "bf16-mixed" if fast else "32-true"
