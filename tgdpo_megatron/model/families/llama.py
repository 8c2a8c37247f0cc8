"""Llama 2 to 3.3 and its distillations: Llama-3.1's RoPE scaling, tied or untied embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families.decoder import check_options, rope, sizes
from tgdpo_megatron.model.families.family import Family


def _read(config: dict[str, Any], path: Path) -> ModelDescription:
    check_options(config, {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}, path)
    return ModelDescription(
        **sizes(config, path),
        **rope(config, path),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
    )


LLAMA = Family(name="llama", title="Llama", architecture="LlamaForCausalLM", read=_read)
