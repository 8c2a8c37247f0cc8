"""What the families share: a decoder with grouped queries, a gated feed-forward block, RMSNorm and RoPE."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from tgdpo_megatron.bounded import shown
from tgdpo_megatron.config.constants import MOST
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.tensor_maps import TensorMap, by_group, same, stacked

WINDOWED, FULL = "sliding_attention", "full_attention"
"""HuggingFace's names of the two kinds of layers."""

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
VOCABULARY = (EMBEDDING, OUTPUT)
"""Megatron's keys of the tensors with a row for each token. Rows of padding may follow."""

_ROPE = "supported are plain RoPE and Llama-3.1's scaling, which is called llama3"


_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def layer_of(key: str) -> tuple[int | None, str]:
    """The layer that a key of Megatron's names, from 0, and the key of all layers' tensors where they are stacked.

    None, and the key itself, where it names no layer.
    """
    found = _LAYER.match(key)
    return (int(found[1]), _LAYER.sub("decoder.layers.", key)) if found else (None, key)


def sizes(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a ModelDescription that every family reads in the same way.

    Raises:
        UserError: A size that is no size.
    """
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings"):
        check_size(config, name, path)
    for name in ("num_key_value_heads", "head_dim"):
        if config.get(name) is not None:
            check_size(config, name, path)
    if type(tied := config.get("tie_word_embeddings", False)) is not bool:
        raise UserError(f"{path}: tie_word_embeddings={shown(tied)} must be true or false.")
    heads = config["num_attention_heads"]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "layernorm_epsilon": positive(config, "rms_norm_eps", path),
    }


def check_size(config: dict[str, Any], name: str, path: Path, *, most: int = MOST) -> None:
    """Refuse a size that is no whole number from 1 to `most`.

    Raises:
        UserError: It is not.
    """
    if type(value := config[name]) is not int or not 0 < value <= most:
        raise UserError(f"{path}: {name}={shown(value)} is not a size; it must be a whole number from 1 to {most}.")


def positive(config: dict[str, Any], name: str, path: Path) -> float:
    """A number above 0.

    Raises:
        UserError: It is none.
    """
    value = config[name]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise UserError(f"{path}: {name}={shown(value)} must be a number above 0.")
    return value


def check_options(config: dict[str, Any], supported: dict[str, Any], path: Path) -> None:
    """Refuse options of an architecture that are read in one way only.

    Args:
        supported: Name of an option -> the only value that is supported, which is also the value where it is left out.

    Raises:
        UserError: An option has another value.
    """
    for name, value in supported.items():
        if config.get(name, value) != value:
            raise UserError(f"{path}: {name}={shown(config[name])} is not supported; only {value!r} is.")


def rope(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """RoPE's base and Llama-3.1's factor, from the old keys (rope_theta, rope_scaling) or the new (rope_parameters).

    Raises:
        UserError: Another scaling.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(found.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope_kind(found)
    if kind == "default":
        return {"rotary_base": base, "rope_scaling_factor": None}
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind != "llama3" or any(found.get(name) != value for name, value in fixed.items()):
        raise UserError(
            f"{path}: RoPE scaling '{kind}' with these settings is not supported; {_ROPE}. Where a model was published "
            "without it, delete the entry."
        )
    return {"rotary_base": base, "rope_scaling_factor": float(found["factor"])}


def rope_kind(parameters: dict[str, Any]) -> str:
    """HuggingFace's name of a way to scale RoPE."""
    kind: str = parameters.get("rope_type") or parameters.get("type") or "default"
    return kind


def windows(config: dict[str, Any], window: int | None, *, windowed: list[bool], path: Path) -> dict[str, Any]:
    """The fields of a ModelDescription for sliding windows.

    Args:
        window: Tokens that a query of a windowed layer sees.
        windowed: Whether each layer is windowed, where the configuration has no `layer_types`.

    Raises:
        UserError: `layer_types` has another length or other names, or the window is not above 0.
    """
    if kinds := config.get("layer_types"):
        if len(kinds) != config["num_hidden_layers"] or set(kinds) - {WINDOWED, FULL}:
            raise UserError(
                f"{path}: layer_types must name {config['num_hidden_layers']} layers as {WINDOWED} or {FULL}."
            )
        windowed = [kind == WINDOWED for kind in kinds]
    if window is None or not any(windowed):
        return {}
    check_size({"sliding_window": window}, "sliding_window", path)
    return {"sliding_window": window, "windowed_layers": tuple(windowed)}


def tensors(model: ModelDescription) -> list[TensorMap]:
    """All tensors of a model, in the order of the layers."""
    hidden, vocab = model.hidden_size, model.vocab_size
    maps = [same(EMBEDDING, "model.embed_tokens.weight", (vocab, hidden), split=0)]
    for layer in range(model.num_layers):
        maps += layer_tensors(model, layer)
    maps.append(same("decoder.final_layernorm.weight", "model.norm.weight", (hidden,)))
    if not model.tie_word_embeddings:
        maps.append(same(OUTPUT, "lm_head.weight", (vocab, hidden), split=0))
    return maps


def layer_tensors(model: ModelDescription, layer: int) -> list[TensorMap]:
    """The tensors of one layer. With norms after the blocks, HuggingFace's norms have other names."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    queries, keys, head = model.query_channels, model.key_channels, (model.kv_channels,)
    attention, mlp = f"decoder.layers.{layer}.self_attention.", f"decoder.layers.{layer}.mlp."
    hf = f"model.layers.{layer}."
    after = model.post_norms
    maps = [
        same(f"{attention}linear_qkv.layer_norm_weight", f"{hf}input_layernorm.weight", (hidden,)),
        # Megatron keeps, for each key-value head, its query heads, then its key, then its value.
        by_group(
            f"{attention}linear_qkv.weight",
            tuple(f"{hf}self_attn.{kind}_proj.weight" for kind in "qkv"),
            ((queries, hidden), (keys, hidden), (keys, hidden)),
            groups=model.num_query_groups,
        ),
    ]
    if model.attention_bias:
        biases = tuple(f"{hf}self_attn.{kind}_proj.bias" for kind in "qkv")
        shapes = ((queries,), (keys,), (keys,))
        maps.append(by_group(f"{attention}linear_qkv.bias", biases, shapes, groups=model.num_query_groups))
    if model.qk_layernorm:
        maps.append(same(f"{attention}q_layernorm.weight", f"{hf}self_attn.q_norm.weight", head))
        maps.append(same(f"{attention}k_layernorm.weight", f"{hf}self_attn.k_norm.weight", head))
    maps.append(same(f"{attention}linear_proj.weight", f"{hf}self_attn.o_proj.weight", (hidden, queries), split=1))
    if after:
        norm = f"{hf}post_attention_layernorm.weight"
        maps.append(same(f"{attention}linear_proj.post_layernorm.weight", norm, (hidden,)))
    before_mlp = "pre_feedforward_layernorm" if after else "post_attention_layernorm"
    maps += [
        same(f"{mlp}linear_fc1.layer_norm_weight", f"{hf}{before_mlp}.weight", (hidden,)),
        stacked(
            f"{mlp}linear_fc1.weight",
            (f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight"),
            ((ffn, hidden), (ffn, hidden)),
        ),
        same(f"{mlp}linear_fc2.weight", f"{hf}mlp.down_proj.weight", (hidden, ffn), split=1),
    ]
    if after:
        norm = f"{hf}post_feedforward_layernorm.weight"
        maps.append(same(f"{mlp}linear_fc2.post_layernorm.weight", norm, (hidden,)))
    return maps
