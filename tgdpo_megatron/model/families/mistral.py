"""Mistral (7B, Nemo, Small): a head size of its own, and in early models a sliding window on every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families.decoder import check_options, rope, sizes, windows
from tgdpo_megatron.model.families.family import Family


def _read(config: dict[str, Any], path: Path) -> ModelDescription:
    check_options(config, {"hidden_act": "silu"}, path)
    # HuggingFace reads `sliding_window` for all layers, and no layer_types.
    config = {"num_key_value_heads": 8, "sliding_window": 4096, **config, "layer_types": None}
    window = config["sliding_window"]
    return ModelDescription(
        **sizes(config, path),
        **rope(config, path),
        **windows(config, window, windowed=[True] * config["num_hidden_layers"], path=path),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
    )


MISTRAL = Family(name="mistral", title="Mistral", architecture="MistralForCausalLM", read=_read)
