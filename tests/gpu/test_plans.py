"""Attention by a plan on a GPU: which kernels are right there, and that shared prompts change no log-prob and no
gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.gpu_where import LOCAL, REHEARSAL, TRANSFORMER_ENGINE, on_gpu

SIZES = {"Llama-3-8B": [32, 8, 128], "one key-value head": [8, 1, 64], "a head for each": [4, 4, 64]}
TOLERANCE = {"fp32": 1e-5, "bf16": 0.1}
"""Products of another height: other kernels, which round differently. bf16 logits of size 4 have steps of 2^-6."""
REFUSALS = (
    "it aligns the mask of fewer queries than keys at the top left",  # an older version
    "No module named 'transformer_engine",  # not installed, or without its part for torch
    "No module named 'torch.nn.attention.varlen'",  # an older torch
    "varlen_attn() got an unexpected keyword argument",  # an older torch, too
    "No dot product attention backend is available",  # cuDNN before 9.6, and no flash-attn
    "Could not run 'aten::_flash_attention_forward'",  # torch built without it
)
"""How the fault of a kernel may begin. Wrong numbers that have no known reason are not among them."""


def test_every_kernel_is_right_or_is_refused_for_a_known_reason(layers: str) -> None:
    found = on_gpu("kernel_faults", layers=layers, module="tests.support.gpu_jobs", sizes=list(SIZES.values()))
    assert set(found) == {"Transformer Engine", "torch"}
    unknown = {
        (name, size): fault
        for name, faults in found.items()
        for size, fault in zip(SIZES, faults, strict=True)
        if fault is not None and not fault.startswith(REFUSALS)
    }
    assert not unknown, unknown


def test_a_shared_prompt_changes_neither_a_log_prob_nor_a_gradient(
    arithmetic: tuple[str, str], checkpoint: Path
) -> None:
    """In bf16 by a kernel, if there is one for this GPU; in fp32 one block after another."""
    layers, precision = arithmetic
    found = on_gpu(
        "plan_log_probs", layers=layers, module="tests.support.gpu_jobs", folder=str(checkpoint), precision=precision
    )
    assert len(found["shared"]) == len(found["apart"]) > 100
    assert found["shared"] == pytest.approx(found["apart"], abs=TOLERANCE[precision])
    shared, apart = map(np.array, found["gradients"])
    assert np.linalg.norm(apart) > 0
    assert np.linalg.norm(shared - apart) <= TOLERANCE[precision] * np.linalg.norm(apart)
    if not REHEARSAL:
        kernels = {LOCAL: "TorchKernel", TRANSFORMER_ENGINE: "TransformerEngineKernel"}
        assert found["kernel"] in (("",) if precision == "fp32" else (kernels[layers], "TorchKernel"))
