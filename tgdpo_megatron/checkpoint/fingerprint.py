"""A fingerprint of weights that is the same at every parallel layout.

Each element contributes its bits times an odd number that depends on the element's position in the whole tensor. The
contributions are added modulo 2^64, so ranks can add theirs in any order. One flipped bit changes the sum. The sums of
all tensors are hashed with SHA-256. The fingerprint protects against mistakes, not against forgery.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from torch import Tensor

from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription

_BLOCK = 1 << 20  # elements processed at once, to limit temporary memory
_MASK = (1 << 64) - 1


def tensor_sum(
    tensor: Tensor, *, shape: Sequence[int], offset: Sequence[int], rounded_to: torch.dtype = torch.float32
) -> int:
    """What one shard contributes to the sum of its tensor.

    Args:
        tensor: The shard, bf16 or fp32. Equal values give equal sums in both.
        shape: Shape of the whole tensor.
        offset: Index of the shard's first element in the whole tensor, for each axis.
        rounded_to: Dtype to which the values are rounded first.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)  # read once, since a read waits for the GPU
    rows = tensor.detach().reshape(tensor.size(0), -1)  # every weight has one or two axes
    width, first_column = (shape[1], offset[1]) if len(shape) > 1 else (1, 0)
    columns = torch.arange(rows.size(1), device=tensor.device) + first_column
    step = max(1, _BLOCK // max(1, rows.size(1)))
    for first in range(0, rows.size(0), step):
        block = rows[first : first + step]
        bits = block.to(rounded_to).float().contiguous().view(torch.int32).long()
        place = (torch.arange(block.size(0), device=tensor.device) + first + offset[0])[:, None] * width + columns
        total += (bits * _odd_number(place)).sum()
    return int(total) & _MASK


def _odd_number(place: Tensor) -> Tensor:
    """A scrambled odd int64 for each position, by the finaliser of splitmix64, with overflow wrapping around."""
    mixed = place * -7046029254386353131 + 1442695040888963407
    mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
    return (mixed ^ (mixed >> 31)) | 1


def combine(sums: Mapping[str, int], description: ModelDescription) -> str:
    """Fingerprint of a model from the sums of its tensors and from its description (sizes, RoPE, norms, heads)."""
    lines = [f"{key} {value & _MASK:016x}" for key, value in sorted(sums.items())]
    return hashlib.sha256("\n".join([json.dumps(description.identity(), sort_keys=True), *lines]).encode()).hexdigest()


def model_fingerprint(
    sharded_state_dict: Mapping[str, Any], description: ModelDescription, rounded_to: torch.dtype = torch.float32
) -> str:
    """Fingerprint of a model spread over all ranks of the default process group.

    Args:
        sharded_state_dict: This rank's part of the model, all chunks together.
        description: The model's shape. Rows beyond its vocabulary are padding and do not count.
        rounded_to: As in tensor_sum.

    Raises:
        UserError: A weight is not finite; the sentence names the tensor.
    """
    local: dict[str, int] = {}
    broken = ""
    for sharded in sharded_tensors(sharded_state_dict):
        if not is_main_replica(sharded.replica_id):
            continue
        data = sharded.data
        if "word_embeddings" in sharded.key or "output_layer" in sharded.key:
            data = data[: max(0, description.vocab_size - sharded.global_offset[0])]
        if not torch.isfinite(data).all():
            broken = sharded.key
        if data.numel():
            value = tensor_sum(data, shape=sharded.global_shape, offset=sharded.global_offset, rounded_to=rounded_to)
            local[sharded.key] = local.get(sharded.key, 0) + value
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (local, broken))
    sums: dict[str, int] = {}
    for part, not_finite in gathered:
        if not_finite:
            raise UserError(f"the weight {not_finite} holds numbers that are not finite")
        for key, value in part.items():
            sums[key] = sums.get(key, 0) + value
    return combine(sums, description)


def sharded_tensors(sharded_state_dict: Mapping[str, Any]) -> list[ShardedTensor]:
    """All tensor shards in a sharded state dict, with gate and up projections as separate shards."""
    parts = dict(sharded_state_dict)
    apply_factories(parts)
    found: list[ShardedTensor] = []
    pending: list[Any] = list(parts.values())
    while pending:
        value = pending.pop()
        if isinstance(value, ShardedTensor):
            found.append(value)
        elif isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value
    return found
