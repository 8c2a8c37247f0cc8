"""Megatron's layers without Transformer Engine, with this project's norm, core attention and activation."""

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

    Each tensor-parallel rank then sees only its share of the tokens, so the gradient of the norm's weight must be
    summed over the ranks. The weight's attribute `sequence_parallel` tells Megatron to do so.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel


class Segments(PackedSeqParams):  # type: ignore[misc]
    """Segment lengths, kept on the host so that attention can read them without waiting for the device."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        super().__init__(qkv_format="sbhd")
        self.lengths = lengths


class SdpaCoreAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention within each segment, with grouped queries, by torch's scaled_dot_product_attention."""

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
        # Segments are split and joined along the first axis, the tokens, where a split needs no copy. With the heads
        # as the first axis, everything would be copied twice.
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
    """silu(gate) · up. [T, 1, 2 F] -> [T, 1, F].

    Megatron's unfused SwiGLU reads `up` a second time to add an offset of 0. This class is no torch Module, so that
    checkpoints look for no weights in it.
    """

    def __init__(self, config: Any) -> None: ...  # Megatron passes its configuration to every activation

    def __call__(self, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate) * up


def local_block_spec(config: Any, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Megatron's local layer spec with the norm, core attention and activation of this file."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    layer.submodules.mlp.submodules.activation_func = SwiGlu
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
