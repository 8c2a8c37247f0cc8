"""Matrix products whose fp32 sums are kept.

A GPU's tensor cores add the products of 16-bit numbers up in fp32, and torch then rounds each sum to 16 bits. bf16 has
8 significant bits: a logit between 16 and 32 is rounded to a multiple of 1/8. For CUDA torch can give the sums
themselves, from 2.8 on. A container of NVIDIA's may hold an earlier state of 2.8, so this is tried. On a CPU torch
cannot, and sums are rounded there.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right. [m, k] and [k, n] of one dtype -> [m, n], in fp32 where sums are kept, else in that dtype."""
    if left.is_cuda and left.dtype != torch.float32 and keeps_sums(left.dtype):
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)


def add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """target += left @ right, in the dtype of `target`. [m, n], [m, k] and [k, n].

    Where `left` has another dtype than `target`, the product is a tensor of its own, rounded unless sums are kept.
    """
    if left.dtype == target.dtype:
        target.addmm_(left, right)
    else:
        target.add_(product(left, right))


@cache
def keeps_sums(dtype: torch.dtype) -> bool:
    """Whether torch gives the fp32 sums of a product of 16-bit matrices on this process's GPU. Asked by a tiny one."""
    tiny = torch.ones(16, 16, dtype=dtype, device="cuda")
    try:
        torch.mm(tiny, tiny, out_dtype=torch.float32)
    except (NotImplementedError, TypeError):  # no kernel for CUDA; no such argument
        return False
    return True
