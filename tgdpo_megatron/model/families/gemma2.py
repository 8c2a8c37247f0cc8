"""Gemma-2: soft-caps on attention scores and on logits, four norms a layer, scaled embeddings, alternating windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families.decoder import check_options, positive, rope, sizes, windows
from tgdpo_megatron.model.families.family import Family

# What HuggingFace takes where the configuration leaves it out, as Google's own do.
DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
}
_SOFT_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_ONE_WAY = {
    "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "use_bidirectional_attention": False,
}


def _read(config: dict[str, Any], path: Path) -> ModelDescription:
    config = {**DEFAULTS, **_SOFT_CAPS, **config}
    windowed = [layer % 2 == 0 for layer in range(config["num_hidden_layers"])]
    return ModelDescription(
        **sizes(config, path),
        **rope(config, path),
        **windows(config, config["sliding_window"], windowed=windowed, path=path),
        **particulars(config, path),
    )


def particulars(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a ModelDescription that Gemma-2 and Gemma-3 read in the same way.

    Raises:
        UserError: An option that is not supported, or a number that is not above 0.
    """
    # Google's own configurations hold a null for what is off.
    check_options({k: v for k, v in config.items() if v is not None}, _ONE_WAY, path)
    for name in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
        if config[name] is not None:
            positive(config, name, path)
    return {
        "tie_word_embeddings": config["tie_word_embeddings"],
        "query_scale": float(config["query_pre_attn_scalar"]) ** -0.5,
        "attention_softcap": config["attn_logit_softcapping"],
        "logit_softcap": config["final_logit_softcapping"],
        "embedding_scale": float(config["hidden_size"]) ** 0.5,
        "zero_centered_norms": True,
        "post_norms": True,
        "activation": "gelu_tanh",
    }


GEMMA2 = Family(name="gemma2", title="Gemma-2", architecture="Gemma2ForCausalLM", read=_read)
