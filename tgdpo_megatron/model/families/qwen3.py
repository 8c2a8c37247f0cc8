"""Qwen3, its dense models: a norm on each query and key head, no biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families.decoder import check_options, rope, sizes
from tgdpo_megatron.model.families.family import Family
from tgdpo_megatron.model.families.qwen2 import qwen_windows

_HEAD_DIM = 128  # where the configuration gives none; it is not hidden_size / heads


def _read(config: dict[str, Any], path: Path) -> ModelDescription:
    check_options(config, {"attention_bias": False, "hidden_act": "silu"}, path)
    return ModelDescription(
        **sizes({"num_key_value_heads": 32, "head_dim": _HEAD_DIM, **config}, path),
        **rope(config, path),
        **qwen_windows(config, path),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        qk_layernorm=True,
    )


QWEN3 = Family(name="qwen3", title="Qwen3", architecture="Qwen3ForCausalLM", read=_read)
