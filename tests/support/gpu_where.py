"""On which side a program of a test runs: the GPU with Transformer Engine's layers or with local ones, or the CPU.

REHEARSE_GPU=1 runs these tests where there is no GPU, all on the CPU with local layers and without FP8: it shows that
they run, not that a GPU passes them.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from tests.support.program import run_ranks

HAVE_GPU = torch.cuda.is_available()
REHEARSAL = not HAVE_GPU and "REHEARSE_GPU" in os.environ
LOCAL, TRANSFORMER_ENGINE = "local layers", "Transformer Engine"
HAVE_TRANSFORMER_ENGINE = HAVE_GPU and importlib.util.find_spec("transformer_engine") is not None
ROOT = Path(__file__).resolve().parents[2]
AS_IF_NOT_INSTALLED = {
    "PYTHONPATH": f"{ROOT / 'bench' / 'gpu' / 'without_transformer_engine'}:{os.environ.get('PYTHONPATH', '')}"
}


def on_gpu(function: str, *, layers: str, module: str = "tests.support.jobs", **arguments: Any) -> Any:
    """What a function gives on one rank of this machine's GPU, in a process of its own."""
    environment = {} if layers == TRANSFORMER_ENGINE else AS_IF_NOT_INSTALLED
    return run_ranks(module, function, 1, environment=environment, **arguments)


def on_cpu(function: str, *, module: str = "tests.support.jobs", **arguments: Any) -> Any:
    """The same on the CPU, where no program sees a GPU or Transformer Engine."""
    return run_ranks(module, function, 1, environment=AS_IF_NOT_INSTALLED | {"CUDA_VISIBLE_DEVICES": ""}, **arguments)
