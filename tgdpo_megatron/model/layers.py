"""The layers that Megatron's specs are given: norms, activation, attention; and the specs themselves."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from tgdpo_megatron.model.attention import PlanAttention
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.kernels import Kernel
from tgdpo_megatron.platform.versions import mlp_submodules


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that works under sequence parallelism.

    Each tensor-parallel rank then sees only its share of the tokens, so the gradient of the norm's weight must be
    summed over the ranks. The weight's attribute `sequence_parallel` tells Megatron to do so.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel


class ZeroCenteredRMSNorm(RMSNorm):
    """RMSNorm that multiplies by 1 + weight, in fp32, since 16 bits are too coarse for a small weight beside 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(x.dtype)


class GatedUnit(torch.nn.Module):
    """The activation of a gated feed-forward block: function(gate) · up. [t, 1, 2 F] -> [t, 1, F].

    Megatron's unfused one reads `up` a second time to add an offset of 0.
    """

    def __init__(self, config: Any) -> None:  # Megatron passes its configuration to every activation
        super().__init__()
        self.function = config.activation_func

    def forward(self, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        gated: Tensor = self.function(gate) * up
        return gated

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        return {}


def gelu_tanh(gate: Tensor) -> Tensor:
    """GELU by its approximation with tanh."""
    return F.gelu(gate, approximate="tanh")


class TwoBaseAttention(SelfAttention):  # type: ignore[misc]
    """Self-attention of a model whose windowed layers have a RoPE base of their own.

    Every layer is given both tables, stacked, and takes its own.
    """

    def forward(self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Tensor, **options: Any) -> Any:
        """
        Args:
            rotary_pos_emb: RoPE of full and of windowed layers. [2, length, 1, 1, C].
        """
        config = self.config
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number)
        own = rotary_pos_emb[int(windowed)]
        return super().forward(hidden_states, *args, rotary_pos_emb=own, **options)


def with_post_norm(linear: type, norm: type) -> type:
    """A class of Megatron's row-parallel linear layers whose output goes through a norm.

    Under sequence parallelism the output is split along the tokens, so each rank has whole tokens to normalise.
    """

    class LinearThenNorm(linear):  # type: ignore[misc]
        def __init__(self, *sizes: int, config: Any, **options: Any) -> None:
            super().__init__(*sizes, config=config, **options)
            self.post_layernorm = norm(config=config, hidden_size=sizes[1], eps=config.layernorm_epsilon)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            output, bias = super().forward(x)
            assert bias is None
            return self.post_layernorm(output), None

    return LinearThenNorm


def layer_spec(description: ModelDescription, *, transformer_engine: bool, kernel: type[Kernel] | None = None) -> Any:
    """Megatron's spec of one layer of a model.

    Args:
        kernel: The kernel for attention by a plan, where there is one.
    """
    if transformer_engine:
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=description.qk_layernorm)
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=description.qk_layernorm)
    attention, mlp = layer.submodules.self_attention.submodules, mlp_submodules(layer)
    norm = _norm(description, transformer_engine=transformer_engine)
    if not transformer_engine:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
        if description.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = norm
        mlp.activation_func = GatedUnit
    if kernel is not None or needs_no_kernel(description, transformer_engine=transformer_engine):
        options = {"softcap": description.attention_softcap, "kernel": kernel}
        attention.core_attention = ModuleSpec(PlanAttention, params=options)
    if description.window_rotary_base is not None:
        layer.submodules.self_attention.module = TwoBaseAttention
    if description.post_norms:
        attention.linear_proj = with_post_norm(attention.linear_proj, norm)
        mlp.linear_fc2 = with_post_norm(mlp.linear_fc2, norm)
    return layer


def needs_no_kernel(description: ModelDescription, *, transformer_engine: bool) -> bool:
    """Whether attention.py can do without a kernel.

    It always does on local layers; on Transformer Engine's with a soft-cap, which its kernels for packed sequences do
    not have, and with windows, for which it depends on the GPU, the head size and the packages that are installed
    whether there is a kernel.
    """
    particular = description.attention_softcap is not None or description.sliding_window is not None
    return particular or not transformer_engine


def block_spec(
    description: ModelDescription, config: Any, vp_stage: int | None, *, transformer_engine: bool
) -> TransformerBlockSubmodules:
    """Megatron's spec of the layers of one pipeline chunk, and of the norm after the last."""
    layer = layer_spec(description, transformer_engine=transformer_engine, kernel=config.kernel)
    layers = get_num_layers_to_build(config, vp_stage)
    norm = _norm(description, transformer_engine=transformer_engine)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)


def _norm(description: ModelDescription, *, transformer_engine: bool) -> Any:
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return ZeroCenteredRMSNorm if description.zero_centered_norms else RMSNorm
