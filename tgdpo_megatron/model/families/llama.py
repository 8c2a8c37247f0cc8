"""Llama 2 and 3: grouped queries, SwiGLU, RMSNorm, RoPE with Llama-3.1's scaling, tied or untied embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families.family import Family
from tgdpo_megatron.model.tensor_maps import TensorMap, by_group, same, stacked


def _read(config: dict[str, Any], path: Path) -> ModelDescription:
    for name, supported in {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}.items():
        if config.get(name, supported) != supported:
            raise UserError(f"{path}: {name}={config[name]!r} is not supported; only {supported!r} is.")
    heads = config["num_attention_heads"]
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    for name in (*sizes, "max_position_embeddings"):
        if not config[name] > 0:
            raise UserError(f"{path}: {name}={config[name]} is not a size; it must be above 0.")
    base, factor = _rope(config, path)
    return ModelDescription(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        layernorm_epsilon=config["rms_norm_eps"],
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        rotary_base=base,
        rope_scaling_factor=factor,
    )


def _rope(config: dict[str, Any], path: Path) -> tuple[float, float | None]:
    """RoPE base and Llama-3.1 factor, from the old keys (rope_theta, rope_scaling) or the new one (rope_parameters)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return base, None
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind != "llama3" or any(rope.get(name) != value for name, value in fixed.items()):
        raise UserError(f"{path}: RoPE scaling {rope} is not supported; only Llama-3.1's (llama3, 1, 4, 8192) is.")
    return base, float(rope["factor"])


def _tensors(model: ModelDescription) -> list[TensorMap]:
    hidden, vocab = model.hidden_size, model.vocab_size
    maps = [same("embedding.word_embeddings.weight", "model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(model.num_layers):
        maps += _layer(model, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    maps.append(same("decoder.final_layernorm.weight", "model.norm.weight", (hidden,)))
    if not model.tie_word_embeddings:
        maps.append(same("output_layer.weight", "lm_head.weight", (vocab, hidden)))
    return maps


def _layer(model: ModelDescription, megatron: str, hf: str) -> list[TensorMap]:
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    queries, keys = model.query_channels, model.key_channels
    return [
        same(f"{megatron}self_attention.linear_qkv.layer_norm_weight", f"{hf}input_layernorm.weight", (hidden,)),
        # Megatron keeps, for each key-value head, its query heads, then its key, then its value.
        by_group(
            f"{megatron}self_attention.linear_qkv.weight",
            tuple(f"{hf}self_attn.{kind}_proj.weight" for kind in "qkv"),
            ((queries, hidden), (keys, hidden), (keys, hidden)),
            groups=model.num_query_groups,
        ),
        same(f"{megatron}self_attention.linear_proj.weight", f"{hf}self_attn.o_proj.weight", (hidden, queries)),
        same(f"{megatron}mlp.linear_fc1.layer_norm_weight", f"{hf}post_attention_layernorm.weight", (hidden,)),
        stacked(
            f"{megatron}mlp.linear_fc1.weight",
            (f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight"),
            ((ffn, hidden), (ffn, hidden)),
        ),
        same(f"{megatron}mlp.linear_fc2.weight", f"{hf}mlp.down_proj.weight", (hidden, ffn)),
    ]


def _megatron(model: ModelDescription) -> dict[str, Any]:
    from torch.nn.functional import silu

    return {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": silu,
        "add_bias_linear": False,
    }


def _layer_matrices(model: ModelDescription) -> int:
    return model.hidden_size * (2 * model.query_channels + 2 * model.key_channels + 3 * model.ffn_hidden_size)


def _layer_vectors(model: ModelDescription) -> int:
    return 2 * model.hidden_size


LLAMA = Family(
    name="llama",
    title="Llama",
    architecture="LlamaForCausalLM",
    read=_read,
    tensors=_tensors,
    megatron=_megatron,
    layer_matrices=_layer_matrices,
    layer_vectors=_layer_vectors,
)
