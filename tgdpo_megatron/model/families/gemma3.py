"""Gemma-3, its text models: two RoPE bases, five windowed layers for each full one, norms on queries and keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families.decoder import FULL, WINDOWED, rope_kind, sizes, windows
from tgdpo_megatron.model.families.family import Family
from tgdpo_megatron.model.families.gemma2 import DEFAULTS, particulars


def _read(config: dict[str, Any], path: Path) -> ModelDescription:
    config = {**DEFAULTS, "attn_logit_softcapping": None, "final_logit_softcapping": None, **config}
    pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
    windowed = [(layer + 1) % pattern != 0 for layer in range(config["num_hidden_layers"])]
    return ModelDescription(
        **sizes(config, path),
        **_rope(config, path),
        **windows(config, config["sliding_window"], windowed=windowed, path=path),
        **particulars(config, path),
        qk_layernorm=True,
    )


def _rope(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """RoPE of the full and of the windowed layers, from the old keys or from `rope_parameters` by kind of layer."""
    by_kind = config.get("rope_parameters") or {}
    if by_kind and not by_kind.keys() & {FULL, WINDOWED}:
        raise UserError(f"{path}: rope_parameters must have a part for {FULL} and one for {WINDOWED}.")
    full = by_kind.get(FULL) or config.get("rope_scaling") or {}
    windowed = by_kind.get(WINDOWED) or {}
    if rope_kind(windowed) != "default" or rope_kind(full) not in ("default", "linear"):
        raise UserError(
            f"{path}: this RoPE scaling is not supported; supported are plain RoPE, and a linear factor for the layers "
            "without a window."
        )
    base = float(full.get("rope_theta") or config.get("rope_theta") or 1e6)
    of_windows = float(windowed.get("rope_theta") or config.get("rope_local_base_freq") or 1e4)
    return {
        "rotary_base": base,
        "rope_scaling_factor": None,
        "rope_linear_factor": float(full["factor"]) if rope_kind(full) == "linear" else None,
        "window_rotary_base": of_windows,
    }


GEMMA3 = Family(name="gemma3_text", title="Gemma-3", architecture="Gemma3ForCausalLM", read=_read)
