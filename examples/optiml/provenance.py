"""Where, when and with what a result was made: part of every result file."""

from __future__ import annotations

import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import otloss

HERE = Path(__file__).parent


def processor() -> str:
    """The processor's name, as far as it is known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "cpu")


def provenance() -> dict[str, Any]:
    """Where and when a result was made."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    code = [":/otloss", ":/csrc", ":(top,glob)examples/**/*.py"]  # a comparison writes its results beside it
    status = ["git", "status", "--porcelain", "--", *code]
    dirty = subprocess.run(status, cwd=HERE, capture_output=True, text=True, check=False)
    return {
        "made": {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "commit": commit.stdout.strip() or None,
            "uncommitted_changes": bool(dirty.stdout.strip()),
            "machine": platform.machine(),
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "otloss": otloss.__version__,
            "backends": [name for name, status in otloss.backends().items() if status],
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }
    }
