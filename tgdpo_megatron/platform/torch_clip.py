"""Computes the gradient norm and clips gradients without waiting for the device once per parameter.

Without Transformer Engine or apex, megatron-core reads the norm of each parameter's gradient separately, and
clips by making a scaled copy of each gradient. torch can do both for all gradients at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def install() -> None:
    """Replace Megatron's own functions. Does nothing where Megatron uses those of Transformer Engine or apex."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = _l2_norm, _scale


def _l2_norm(chunk_size: int, overflow: Tensor, tensors: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    """Norm of all gradients together, on their device. [1] fp32."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors[0]))).view(1), None


def _scale(chunk_size: int, overflow: Tensor, tensors: list[list[Tensor]], scale: Any) -> None:
    """Scale gradients in place: Megatron passes the same list as source and as target."""
    torch._foreach_mul_(tensors[1], scale)
