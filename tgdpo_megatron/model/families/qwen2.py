"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families.decoder import check_options, rope, sizes, windows
from tgdpo_megatron.model.families.family import Family


def _read(config: dict[str, Any], path: Path) -> ModelDescription:
    check_options(config, {"hidden_act": "silu"}, path)
    return ModelDescription(
        **sizes({"num_key_value_heads": 32, **config}, path),
        **rope(config, path),
        **qwen_windows(config, path),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        attention_bias=True,
    )


def qwen_windows(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Windows are off unless `use_sliding_window` is set; then the layers from `max_window_layers` on have one."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    windowed = [layer >= first for layer in range(config["num_hidden_layers"])]
    return windows(config, window, windowed=windowed, path=path)


QWEN2 = Family(name="qwen2", title="Qwen2", architecture="Qwen2ForCausalLM", read=_read)
