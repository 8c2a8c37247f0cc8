"""What this GPU gives at best, now: the rate of a large matrix product, and of copying. Other rows divide by it.

    python -m bench.gpu.rate

Random data, because products of zeros draw less power and run faster; sustained for about a second, because a card
that has just begun runs above the clock it can keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

import torch

from bench.gpu import device
from bench.rows import Row
from tgdpo_megatron.platform.peaks import peak_of

PEAK = peak_of("NVIDIA H200") or math.nan
"""Operations per second that an H200's data sheet gives for dense bf16."""
BANDWIDTH = 4.8e12
"""Bytes per second that it gives for its memory."""
SIDE, COPIED, ROUNDS = (256, 1 << 20, 2) if device.REHEARSAL else (8192, 1 << 31, 40)
IN_A_ROUND, WARM_UP = 20, 0.5


def matrix_rate() -> float:
    """Operations per second of a bf16 product of two SIDE × SIDE matrices: the median of rounds, a warm-up left out."""
    left, right, out = (torch.randn(SIDE, SIDE, device=device.HERE).bfloat16() for _ in range(3))

    def products() -> None:
        for _ in range(IN_A_ROUND):
            torch.mm(left, right, out=out)

    seconds = [device.timed(products)[0] for _ in range(ROUNDS)]
    return IN_A_ROUND * 2 * SIDE**3 / median(seconds[int(WARM_UP * ROUNDS) :])


def copy_rate() -> float:
    """Bytes per second read and written by copying COPIED of them."""
    source = torch.randint(0, 255, (COPIED,), dtype=torch.uint8, device=device.HERE)
    target = torch.empty_like(source)
    seconds = [device.timed(target.copy_, source)[0] for _ in range(ROUNDS)]
    return 2 * COPIED / median(seconds[int(WARM_UP * ROUNDS) :])


def measure() -> Iterator[Row]:
    rate = matrix_rate()
    yield Row(
        "matrix product, bf16 / data sheet",
        rate / PEAK,
        limit="989 TFLOP/s",
        note=f"{rate / 1e12:.0f} TFLOP/s, {SIDE}³, random data",
        details={"operations per second": rate},
    )
    bytes_per_second = copy_rate()
    yield Row(
        "copy / data sheet",
        bytes_per_second / BANDWIDTH,
        limit="4.8 TB/s",
        note=f"{bytes_per_second / 1e12:.2f} TB/s read and written",
        details={"bytes per second": bytes_per_second},
    )


if __name__ == "__main__":
    device.program(__doc__, measure)
