"""Which HuggingFace tensors make each Megatron tensor, and back.

Megatron keys are global: one per logical tensor, whatever the layout. Each entry joins one or more
HuggingFace tensors; joining and parting only move elements, so a round trip is bit-exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tgdpo_megatron.model.description import ModelDescription


@dataclass(frozen=True)
class TensorMap:
    """One Megatron tensor and the HuggingFace tensors it is joined from.

    Attributes:
        key: Megatron's checkpoint key.
        shape: Shape of the Megatron tensor, without vocabulary padding.
        names: HuggingFace names, in the order `join` takes and `part` returns.
        shapes: Their shapes.
    """

    key: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    join: Callable[[Sequence[Tensor]], Tensor]
    part: Callable[[Tensor], Sequence[Tensor]]


def llama_tensors(model: ModelDescription) -> list[TensorMap]:
    """Every tensor of a Llama model, in the order of the layers."""
    hidden, vocab = model.hidden_size, model.vocab_size
    maps = [_same("embedding.word_embeddings.weight", "model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(model.num_layers):
        maps += _llama_layer(model, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    maps.append(_same("decoder.final_layernorm.weight", "model.norm.weight", (hidden,)))
    if not model.tie_word_embeddings:
        maps.append(_same("output_layer.weight", "lm_head.weight", (vocab, hidden)))
    return maps


def _llama_layer(model: ModelDescription, megatron: str, hf: str) -> list[TensorMap]:
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    queries = model.num_attention_heads * model.kv_channels
    return [
        _same(f"{megatron}self_attention.linear_qkv.layer_norm_weight", f"{hf}input_layernorm.weight", (hidden,)),
        _query_key_value(model, f"{megatron}self_attention.linear_qkv.weight", f"{hf}self_attn."),
        _same(f"{megatron}self_attention.linear_proj.weight", f"{hf}self_attn.o_proj.weight", (hidden, queries)),
        _same(f"{megatron}mlp.linear_fc1.layer_norm_weight", f"{hf}post_attention_layernorm.weight", (hidden,)),
        _gate_up(model, f"{megatron}mlp.linear_fc1.weight", f"{hf}mlp."),
        _same(f"{megatron}mlp.linear_fc2.weight", f"{hf}mlp.down_proj.weight", (hidden, ffn)),
    ]


def _same(key: str, name: str, shape: tuple[int, ...]) -> TensorMap:
    return TensorMap(key, shape, (name,), (shape,), join=lambda parts: parts[0], part=lambda whole: [whole])


def _query_key_value(model: ModelDescription, key: str, prefix: str) -> TensorMap:
    """Megatron keeps, for each key-value head, its query heads, then its key, then its value."""
    groups, channels, hidden = model.num_query_groups, model.kv_channels, model.hidden_size
    heads_each = (model.num_attention_heads // groups, 1, 1)

    def join(parts: Sequence[Tensor]) -> Tensor:
        by_group = [
            part.reshape(groups, heads * channels, hidden) for part, heads in zip(parts, heads_each, strict=True)
        ]
        return torch.cat(by_group, dim=1).reshape(-1, hidden)

    def part(whole: Tensor) -> Sequence[Tensor]:
        by_group = whole.reshape(groups, -1, hidden).split([heads * channels for heads in heads_each], dim=1)
        return [piece.reshape(-1, hidden) for piece in by_group]

    shapes = tuple((groups * heads * channels, hidden) for heads in heads_each)
    names = tuple(f"{prefix}{kind}_proj.weight" for kind in "qkv")
    return TensorMap(key, (sum(rows for rows, _ in shapes), hidden), names, shapes, join, part)


def _gate_up(model: ModelDescription, key: str, prefix: str) -> TensorMap:
    """Gate, then up; Megatron cuts each half on its own over tensor-parallel ranks."""
    shape = (model.ffn_hidden_size, model.hidden_size)
    return TensorMap(
        key,
        (2 * shape[0], shape[1]),
        (f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight"),
        (shape, shape),
        join=lambda parts: torch.cat(list(parts)),
        part=lambda whole: whole.chunk(2),
    )
