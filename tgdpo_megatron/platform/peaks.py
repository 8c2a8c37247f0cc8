"""How many operations a second a GPU can do at most, by NVIDIA's data sheets.

Of tensor cores, without sparsity: the sheets print twice as much, "with sparsity", beside or instead.

    A100    nvidia.com/en-us/data-center/a100
    H100    nvidia.com/en-us/data-center/h100, and of the PCIe card NVIDIA's H100 product brief PB-11133
    H200    nvidia.com/en-us/data-center/h200
    B200    nvidia.com/en-us/data-center/dgx-b200, an eighth of the system's
    GB200   nvidia.com/en-us/data-center/gb200-nvl72, a 72nd of the rack's
    L40S    nvidia.com/en-us/data-center/l40s
    L4      nvidia.com/en-us/data-center/l4
"""

from __future__ import annotations

_TERA = 1e12
_PEAKS: tuple[tuple[tuple[str, ...], float, float | None], ...] = (
    (("GB200",), 2500, 5000),
    (("B200",), 2250, 4500),
    (("H200", "NVL"), 835, 1671),
    (("H200",), 989, 1979),
    (("H100", "NVL"), 835, 1671),
    (("H100", "PCIe"), 756, 1513),
    (("H100",), 989, 1979),
    (("A100",), 312, None),
    (("L40S",), 362, 733),
    (("L4",), 121, 242),
)
"""Words that are all in the GPU's name -> bf16 and FP8, TFLOP/s. The first row that fits counts."""


def peak_of(gpu: str, *, fp8: bool = False) -> float | None:
    """Operations per second that a GPU can do at most in bf16, or in FP8; None where this is not known.

    Args:
        gpu: Its name, as torch.cuda.get_device_name gives it.
    """
    words = gpu.split()
    if "MIG" in words:  # a part of a GPU
        return None
    for needed, bf16, in_fp8 in _PEAKS:
        if all(any(word == name or word.startswith(f"{name}-") for word in words) for name in needed):
            peak = in_fp8 if fp8 else bf16
            return peak * _TERA if peak is not None else None
    return None
