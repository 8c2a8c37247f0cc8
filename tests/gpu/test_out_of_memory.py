"""A model that does not fit the GPU ends in a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.gpu_where import REHEARSAL, ROOT

LIMITED = """
import runpy, sys, torch
torch.cuda.set_per_process_memory_fraction(float(sys.argv.pop(1)))
sys.argv[0] = "recipes.train"
runpy.run_module("recipes.train", run_name="__main__")
"""


def test_training_that_does_not_fit_says_so_and_what_to_do(
    tmp_path: Path, make_hf_model: Callable[..., Path], pairs_file: Path
) -> None:
    """A real refusal of the allocator: 17 million weights take 300 MB with their optimizer, the process has 100."""
    import torch

    from tgdpo_megatron.checkpoint.convert import hf_to_megatron

    if REHEARSAL:
        pytest.skip("a CPU's allocator has no limit to set")
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    hf_to_megatron(make_hf_model(tmp_path / "hf", **wide), tmp_path / "start")
    fraction = 100e6 / torch.cuda.get_device_properties(0).total_memory
    arguments = [
        f"{fraction:.9f}",
        "--recipe",
        "dpo_tiny",
        f"model.checkpoint={tmp_path / 'start'}",
        f"data.train={pairs_file}",
        f"train.output={tmp_path / 'run'}",
        "train.precision=bf16",
        "train.global_batch_size=6",
        "train.micro_batch_size=6",
        "train.train_iters=2",
        "optimizer.lr_warmup_iters=0",
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    (sentence,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert "rank 0 ran out of memory: by the planner's arithmetic" in sentence
    assert "which should be enough" in sentence, "the GPU is large enough; only this process's limit is not"
    assert 1 <= sentence.count(" frees ") <= 3 or "lower data.max_length" in sentence
