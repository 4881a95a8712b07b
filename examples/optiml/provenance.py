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


def _git(*arguments: str) -> str:
    """What git says; nothing outside of a repository, or where there is no git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def provenance() -> dict[str, Any]:
    """Where and when a result was made."""
    code = [":/otloss", ":/csrc", ":(top,glob)examples/**/*.py"]  # a comparison writes its results beside it
    return {
        "made": {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "commit": _git("rev-parse", "HEAD") or None,
            "uncommitted_changes": bool(_git("status", "--porcelain", "--", *code)),
            "machine": platform.machine(),
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "otloss": otloss.__version__,
            "backends": [name for name, status in otloss.backends().items() if status],
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }
    }
