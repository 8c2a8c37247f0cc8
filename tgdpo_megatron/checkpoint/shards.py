"""Which boxes of which tensors this rank writes into a checkpoint of a run.

The distributed optimizer splits the weights of its data-parallel ranks as one flat vector. What a rank owns of a matrix
is then a run of consecutive elements: the end of a row, some whole rows, the beginning of another. Each of these is a
box, and Megatron's format stores boxes of any size. So every rank writes what it owns, without sending it to another
rank first, and what is written can be read at any other layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from tgdpo_megatron.checkpoint.fingerprint import sharded_tensors

_OWNED = ("param", "exp_avg", "exp_avg_sq")
"""What Megatron's distributed optimizer keeps of a weight: its fp32 copy and Adam's two moments."""


@dataclass(frozen=True)
class Shard:
    """A box of a tensor.

    Attributes:
        key: The tensor's name in the checkpoint.
        shape: Of the whole tensor.
        offset: Index of the box's first element in the whole tensor.
        data: The box, on any device. It may be a view.
    """

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: Tensor

    def copied(self) -> Shard:
        """The same box in memory of its own on the host."""
        copy = torch.empty(self.data.shape, dtype=self.data.dtype)
        return Shard(self.key, self.shape, self.offset, copy.copy_(self.data.detach()))


def model_shards(model_state: Mapping[str, Any]) -> list[Shard]:
    """The weights that this rank writes."""
    return [_whole(part) for part in sharded_tensors(model_state) if is_main_replica(part.replica_id)]


def optimizer_shards(optimizer: Any, model_state: dict[str, Any], metadata: dict[str, Any]) -> tuple[list[Shard], Any]:
    """The optimizer state that this rank writes.

    Args:
        optimizer: Megatron's, of any kind.
        model_state: The model's sharded state, as the optimizer takes it.
        metadata: How Megatron lays a checkpoint out.

    Returns:
        The boxes, and what is no tensor of a weight and equal on all ranks.
    """
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    if len(chained) == 1 and isinstance(chained[0], DistributedOptimizer):
        common = chained[0].state_dict() | {"param_state_sharding_type": metadata["distrib_optim_sharding_type"]}
        return list(_owned_shards(chained[0], model_state)), common
    state = {"optimizer": optimizer.sharded_state_dict(model_state, metadata=metadata)}
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    return model_shards(sharded), common["optimizer"]


def boxes(shape: Sequence[int], first: int, last: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Consecutive elements of a tensor, first to last - 1 in row-major order, as boxes in that order: offset, sizes."""
    if len(shape) <= 1:
        if last > first:
            yield (first,) * len(shape), (last - first,) * len(shape)
        return
    row = math.prod(shape[1:])
    while first < last:
        place, within = divmod(first, row)
        rows = (last - first) // row
        if within or not rows:  # part of a row
            end = min(last, (place + 1) * row)
            for offset, sizes in boxes(shape[1:], within, within + end - first):
                yield (place, *offset), (1, *sizes)
        else:
            end = first + rows * row
            yield (place, *(0 for _ in shape[1:])), (rows, *shape[1:])
        first = end


def _owned_shards(optimizer: DistributedOptimizer, model_state: dict[str, Any]) -> Iterator[Shard]:
    places = {id(value.data): value for value in _entries(model_state)}
    for buffer in optimizer.gbuf_ranges:
        for bucket in (bucket for buckets in buffer.values() for bucket in buckets):
            for weight, ranges in bucket["param_map"].items():
                states = optimizer._get_main_param_and_optimizer_states(weight)
                for part in sharded_tensors({"weight": places[id(weight)]}):
                    if is_main_replica((*part.replica_id[:2], 0)):  # the data-parallel ranks own different elements
                        for name in _OWNED:
                            # Transformer Engine's and apex's Adam make the moments in the first update.
                            state = states.get(name, torch.zeros_like(states["param"]))
                            yield from _within(part, weight, ranges["param"].start, name, state)


def _within(part: ShardedTensor, weight: Tensor, owned: int, name: str, state: Tensor) -> Iterator[Shard]:
    """What a rank owns of a part of a weight: of the gate or the up projection, or of the whole.

    Args:
        owned: Place of the first owned element in the flat weight.
        state: The owned elements' state. [owned elements]
    """
    assert part.data.is_contiguous(), part.key
    begin = part.data.storage_offset() - weight.storage_offset()
    first, last = max(owned, begin), min(owned + state.numel(), begin + part.data.numel())
    for offset, sizes in boxes(part.local_shape, first - begin, last - begin):
        count = math.prod(sizes)
        data = state[first - owned : first - owned + count].float().view(sizes)
        moved = tuple(start + inner for start, inner in zip(part.global_offset, offset, strict=True))
        yield Shard(f"optimizer.state.{name}.{part.key}", part.global_shape, moved, data)
        first += count


def _entries(state: Any) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    if isinstance(state, Mapping):
        for value in state.values():
            yield from _entries(value)
    else:
        yield state


def _whole(part: ShardedTensor) -> Shard:
    assert part.prepend_axis_num == 0, part.key
    return Shard(part.key, tuple(part.global_shape), tuple(part.global_offset), part.data)
