"""What the GPU benchmark counts by itself, on cases known by hand and by torch's own counter."""

from __future__ import annotations

import pytest
import torch

from bench.gpu.profile import ON_DEVICE, idle_share, waits_of
from bench.pairs import ultrafeedback_like
from bench.speed.flops import counted_flops


def test_model_operations_are_three_times_a_forward_as_torch_counts_it() -> None:
    """One pair whose prompts are a token each, so that every token but the last of each sequence is labelled."""
    from dataclasses import replace

    import numpy as np
    from transformers import LlamaConfig, LlamaForCausalLM

    from bench.gpu.model import model_flops
    from tgdpo_megatron.model.description import ModelDescription

    model = ModelDescription(3, 64, 160, 4, 2, 16, 512, 256, 1e-5, False, 10000.0, None)
    data = replace(
        ultrafeedback_like(1),
        tokens=np.arange(51, dtype=np.int32),
        starts=np.array([0, 20, 51]),
        prompt_lengths=np.array([1]),
    )
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation="sdpa",
        )
    )
    with torch.no_grad():
        forward = sum(counted_flops(lambda n=n: hf(input_ids=torch.arange(n)[None], use_cache=False)) for n in (19, 30))
    # torch's attention for CPUs computes the whole square of so few tokens; half of it is needed, in two products.
    needless = sum(model.num_layers * 2 * 2 * 4 * 16 * n**2 / 2 for n in (19, 30))
    assert model_flops(data, [0], model) == 3 * (forward - needless)


def kernel(start: float, end: float) -> dict[str, object]:
    return {"cat": min(ON_DEVICE), "name": "kernel", "ts": start, "dur": end - start}


def test_idle_time_is_what_no_kernel_covers_on_any_stream() -> None:
    overlapping = [kernel(0, 4), kernel(1, 2), kernel(3, 6), kernel(8, 10)]
    assert idle_share(overlapping) == pytest.approx(2 / 10)
    assert idle_share([kernel(5, 7), kernel(7, 9)]) == 0


def test_waits_are_synchronising_calls_and_copies_to_the_host() -> None:
    events = [
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize"},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel"},
        {"cat": "cuda_runtime", "name": "cudaStreamWaitEvent"},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pageable)"},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pageable -> Device)"},
        {"cat": "kernel", "name": "Synchronize"},
    ]
    assert waits_of(events) == {"host waits": 1, "copies to the host": 1}
