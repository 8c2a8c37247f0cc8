"""Megatron layers for machines without Transformer Engine: our norm and core attention, through ModuleSpec."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that works under sequence parallelism.

    There each tensor-parallel rank sees only its tokens, so the weight's gradient must be summed over
    ranks; the mark tells Megatron to do so.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel


class Segments(PackedSeqParams):  # type: ignore[misc]
    """Segment lengths on the host, where attention can read them without a device synchronisation."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        super().__init__(qkv_format="sbhd")
        self.lengths = lengths


class SdpaCoreAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention within each segment, by torch's scaled_dot_product_attention; grouped queries."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or config.softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Segments | None = None,
    ) -> Tensor:
        """[T, 1, heads, channels] each (fewer heads in key and value) -> [T, 1, heads · channels]."""
        assert packed_seq_params is not None and attention_mask is None and attention_bias is None
        tokens, batch = query.shape[:2]
        # Cut and joined along the tokens, which lie one after another in memory: heads first would be copied twice.
        segments = zip(*(x.split(packed_seq_params.lengths) for x in (query, key, value)), strict=True)
        attended = [
            F.scaled_dot_product_attention(
                q.permute(1, 2, 0, 3),  # [t, 1, heads, channels] -> [1, heads, t, channels], and back
                k.permute(1, 2, 0, 3),
                v.permute(1, 2, 0, 3),
                is_causal=True,
                scale=self.scale,
                enable_gqa=True,
            ).permute(2, 0, 1, 3)
            for q, k, v in segments
        ]
        return torch.cat(attended).reshape(tokens, batch, -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        return {}


class SwiGlu:
    """silu(gate) · up of [T, 1, 2 F] -> [T, 1, F]. Megatron's unfused form reads `up` once more, to add a zero.

    Not a Module: it has no weights, and checkpoints shall not ask it for any.
    """

    def __init__(self, config: Any) -> None: ...  # Megatron hands every activation its configuration

    def __call__(self, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate) * up


def local_block_spec(config: Any, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Megatron's local layer spec with this module's norm and core attention in it."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    layer.submodules.mlp.submodules.activation_func = SwiGlu
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
