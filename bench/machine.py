"""The machine that numbers are from, for every file of results."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """Where the numbers are from. The commit: git's, or what the environment variable TGDPO_COMMIT says without it."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        **_gpu(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "megatron-core", "transformers")},
        "commit": _commit() or os.environ.get("TGDPO_COMMIT", "unknown: not a git checkout"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    if shutil.which("git") is None:
        return ""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return described.stdout.strip()


def _gpu() -> dict[str, Any]:
    """Name, memory and driver of the GPU, and the CUDA and Transformer Engine above it; nothing without one."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    if not lines:
        return {}
    import torch

    found: dict[str, Any] = dict(
        zip(("gpu", "gpu memory", "driver"), map(str.strip, lines[0].split(",")), strict=False)
    )
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    with contextlib.suppress(PackageNotFoundError):
        found["transformer-engine"] = version("transformer-engine")
    return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []
