"""A fingerprint of weights that is the same at every parallel layout.

Each element contributes its bits times an odd number of its row times an odd number of its column, both by their places
in the whole tensor. The contributions are added modulo 2^64, so shards can add theirs in any order. One flipped bit
changes the sum. The sums of all tensors are hashed with SHA-256. The fingerprint protects against mistakes, not against
forgery.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

_BLOCK = {"cpu": 1 << 17, "cuda": 1 << 20}
"""Elements processed at once, to limit temporary memory; on a CPU, so few that they stay in its cache."""
_MASK = (1 << 64) - 1
_ROWS, _COLUMNS = 1, 2
"""Different numbers for rows and for columns, so that a transposed matrix has another sum."""


def tensor_sum(tensor: Tensor, *, offset: Sequence[int], rounded_to: torch.dtype = torch.float32) -> int:
    """What one shard contributes to the sum of its tensor.

    Args:
        tensor: The shard, of one or two axes; bf16, fp16 or fp32. Equal values give equal sums in all.
        offset: Index of the shard's first element in the whole tensor, for each axis.
        rounded_to: Dtype to which the values are rounded first: fp32, which keeps them all, or bf16.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)  # read once, since a read waits for the GPU
    rows = tensor.detach().reshape(tensor.size(0), -1)
    of_rows = _odd_numbers(offset[0], rows.size(0), _ROWS, tensor.device)[:, None]
    of_columns = _odd_numbers(offset[1] if len(offset) > 1 else 0, rows.size(1), _COLUMNS, tensor.device)
    # The bits of a bf16 number are the upper half of the same number's bits in fp32; the lower half is zero.
    half = torch.bfloat16 in (tensor.dtype, rounded_to)
    step = max(1, _BLOCK[tensor.device.type] // max(1, rows.size(1)))
    for first in range(0, rows.size(0), step):
        block = rows[first : first + step].to(torch.bfloat16 if half else torch.float32).contiguous()
        bits = block.view(torch.int16 if half else torch.int32)
        total += ((bits * of_columns).sum(dim=1, keepdim=True) * of_rows[first : first + step]).sum()
    return (int(total) << 16 if half else int(total)) & _MASK


def _odd_numbers(first: int, count: int, kind: int, device: torch.device) -> Tensor:
    """A scrambled odd int64 for each place, by the finaliser of splitmix64, with overflow wrapping around. [count]"""
    place = torch.arange(first, first + count, device=device) * 4 + kind
    mixed = place * -7046029254386353131 + 1442695040888963407
    mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
    return (mixed ^ (mixed >> 31)) | 1


def all_finite(tensor: Tensor) -> bool:
    """Whether every number is finite.

    A sum takes one pass, and is finite only if all numbers are. It may also overflow; then each number is looked at.
    """
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


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
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    local: dict[str, int] = {}
    broken = ""
    for sharded in sharded_tensors(sharded_state_dict):
        if not is_main_replica(sharded.replica_id):
            continue
        data = sharded.data
        if "word_embeddings" in sharded.key or "output_layer" in sharded.key:
            data = data[: max(0, description.vocab_size - sharded.global_offset[0])]
        if not all_finite(data):
            broken = sharded.key
        if data.numel():
            value = tensor_sum(data, offset=sharded.global_offset, rounded_to=rounded_to)
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
    # Loaded late, because the processes of a conversion need no Megatron.
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

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
