"""What the GPU benchmark counts by itself, on cases known by hand and by torch's own counter."""

from __future__ import annotations

import pytest
import torch

from bench.gpu.profile import ON_DEVICE, idle_share, waits_of
from bench.heads import rounded_sums
from tgdpo_megatron.model import products

ASKED = products.keeps_sums


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


def test_rounding_for_comparison_lasts_as_long_as_its_block() -> None:
    with rounded_sums():
        assert not products.keeps_sums(torch.bfloat16)
    assert products.keeps_sums is ASKED
