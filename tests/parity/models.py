"""The small models of every family: HuggingFace's own classes with random weights, whose vocabulary pads unevenly."""

from __future__ import annotations

from typing import Any

import torch

_SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "pad_token_id": None,  # the embedding of Gemma's padding token would have no gradient
    "attn_implementation": "eager",
}
_LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
WINDOW = 8
"""Shorter than most of the sequences that are compared."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 131072, "rope_parameters": _LLAMA_3_1},
    "mistral": {"head_dim": 16, "sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        # Low enough for random models to meet them.
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        },
    },
}
"""HuggingFace's `model_type` -> what its configuration has beside the sizes."""


def make_config(family: str, tied: bool, **changed: Any) -> Any:
    """HuggingFace's configuration of a small model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**_SIZES, "tie_word_embeddings": tied, **FAMILIES[family], **changed})


def make_model(seed: int, family: str, tied: bool, **changed: Any) -> Any:
    """A small model of a family in fp32. Its norms and biases are random, too, so that none can be left out."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(make_config(family, tied, **changed)).float()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        centre = 1.0 if "norm" in name and "gemma" not in family else 0.0
        spread = 0.1 if "norm" in name else 0.08
        weight.data = centre + spread * torch.randn(weight.shape, generator=generator)
    return model
