"""Whether the settings beside a foreign checkpoint describe the model that a config.json describes.

Shapes do not show everything that makes a model: nothing in the weights says RoPE's base, a soft-cap or the activation.
So a setting that Megatron has a name for, and that the checkpoint states, must be the one that follows from
config.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tgdpo_megatron.bounded import read_yaml, shown
from tgdpo_megatron.checkpoint.failures import readable
from tgdpo_megatron.checkpoint.foreign.folder import BRIDGE, LM, Foreign
from tgdpo_megatron.checkpoint.index import ForeignIndex
from tgdpo_megatron.checkpoint.pickled import Made
from tgdpo_megatron.checkpoint.reading import read_described
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families import FAMILIES

EVERY_FAMILY = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "num_moe_experts": None,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
    "is_hybrid_model": False,
    "attention_output_gate": False,
    "heterogeneous_block_specs": False,
    # NeMo 2's names for what every scaled RoPE of Llama's has. Megatron-Core knows no other.
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "old_context_len": 8192,
}
"""What Megatron's settings are for every family here, by Megatron's names."""

OF_MODEL: dict[str, Callable[[ModelDescription], Any]] = {
    "num_layers": lambda model: model.num_layers,
    "hidden_size": lambda model: model.hidden_size,
    "ffn_hidden_size": lambda model: model.ffn_hidden_size,
    "num_attention_heads": lambda model: model.num_attention_heads,
    "num_query_groups": lambda model: model.num_query_groups,
    "kv_channels": lambda model: model.kv_channels,
    "vocab_size": lambda model: model.vocab_size,
    "layernorm_epsilon": lambda model: model.layernorm_epsilon,
    "layernorm_zero_centered_gamma": lambda model: model.zero_centered_norms,
    "share_embeddings_and_output_weights": lambda model: model.tie_word_embeddings,
    "add_qkv_bias": lambda model: model.attention_bias,
    "qk_layernorm": lambda model: model.qk_layernorm,
    "rotary_base": lambda model: model.rotary_base,
    "rope_scaling": lambda model: model.rope_scaling_factor is not None,
    "scale_factor": lambda model: model.rope_scaling_factor,  # of NeMo 2's Llama 3.1 to 3.3
    "softmax_scale": lambda model: model.query_scale or model.kv_channels**-0.5,
    "query_pre_attn_scalar": lambda model: (model.query_scale or model.kv_channels**-0.5) ** -2,
    "attn_logit_softcapping": lambda model: model.attention_softcap,
    "final_logit_softcapping": lambda model: model.logit_softcap,
}
"""What Megatron's settings are for a model, by Megatron's names, and by those of the programs' own classes."""

_OF_LM = {
    "norm_epsilon": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "use_rope_scaling": "rope_scaling",
}
"""Megatron-LM's name of an argument -> Megatron's name of the setting."""


def read_settings(foreign: Foreign) -> dict[str, Any]:
    """The settings of a checkpoint's model, by Megatron's names.

    Raises:
        UserError: The file is missing or damaged, or holds no settings of a model.
    """
    if foreign.program == LM:
        return _of_megatron_lm(foreign)
    path, part = foreign.settings, "model" if foreign.program == BRIDGE else "config"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; the settings of the model belong there, without which nobody can tell what its "
            "weights mean."
        )
    found = read_yaml(path, what="checkpoint's settings")
    settings = found.get(part) if isinstance(found, dict) else None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: has no part '{part}' with the settings of the model.")
    if isinstance(found.get("peft"), dict):
        raise UserError(f"{path}: names an adapter (peft); merge it into the model first, and convert the result.")
    inner = settings.get("transformer")  # where newer versions of Megatron-Bridge keep them
    return {**settings, **inner} if isinstance(inner, dict) else settings


def _of_megatron_lm(foreign: Foreign) -> dict[str, Any]:
    """The arguments that Megatron-LM was started with: in common.pt or, since Megatron-Core 0.19, with the weights."""
    path = foreign.settings
    stored = None if path.is_file() else ForeignIndex(foreign.weights).object("common_state/shard_0_1")
    if not path.is_file() and stored is None:
        raise UserError(f"{path}: no such file; the arguments of Megatron-LM belong there, which describe the model.")
    with readable(f"{path if stored is None else foreign.weights}: the state beside the weights"):
        place = (path,) if stored is None else (foreign.weights / stored.file, stored.start, stored.length)
        content = read_described(*place)
    content = content[0] if isinstance(content, list) and content else content
    arguments = content.get("args") if isinstance(content, dict) else None
    if not (isinstance(arguments, Made) and arguments.is_a("Namespace") and isinstance(arguments.state, dict)):
        raise UserError(
            f"{foreign.weights}: has neither run_config.yaml, as of Megatron-Bridge, nor arguments of Megatron-LM, so "
            "nobody can tell what its weights mean; put the file back that was beside them."
        )
    settings = {_OF_LM.get(name, name): value for name, value in arguments.state.items() if isinstance(name, str)}
    if settings.get("swiglu") is True:
        settings["activation_func"] = {"_target_": "torch.nn.functional.silu"}
    if settings.get("group_query_attention") is False:
        settings["num_query_groups"] = settings.get("num_attention_heads")
    if isinstance(untied := settings.get("untie_embeddings_and_output_weights"), bool):
        settings["share_embeddings_and_output_weights"] = not untied
    return settings


def check_family(settings: dict[str, Any], where: Path) -> None:
    """Refuse a model that no family here can be, whatever config.json is given.

    Args:
        where: The file of the settings.

    Raises:
        UserError: A setting that says so.
    """
    for name, expected in EVERY_FAMILY.items():
        if not _agrees(settings.get(name), expected):
            titles = ", ".join(family.title for family in FAMILIES.values())
            raise UserError(
                f"{where}: {name}={shown(settings[name])} is of a model that is not supported; supported are {titles}."
            )


def check_settings(settings: dict[str, Any], where: Path, model: ModelDescription, like: Path) -> None:
    """Refuse a checkpoint whose settings are not those of a model.

    Args:
        where: The file of the settings.
        like: The folder of the config.json that describes the model.

    Raises:
        UserError: The first setting that differs.
    """
    expected = {name: of(model) for name, of in OF_MODEL.items()}
    if settings.get("rope_scaling") is True:
        expected["rope_scaling_factor"] = model.rope_scaling_factor
    if _is_pair(settings.get("rotary_base")):  # Gemma-3: of windowed and of full layers, with the factor of the latter
        expected["rotary_base"] = [model.window_rotary_base or model.rotary_base, model.rotary_base]
        expected["rope_scaling_factor"] = model.rope_linear_factor or 1.0
    for name, value in expected.items():
        if not _agrees(settings.get(name), value):
            raise UserError(
                f"{where}: {name}={shown(settings[name])}, but for {like / 'config.json'} it would be {shown(value)}; "
                "give the model that the checkpoint was made from with --like."
            )
    _check_window(settings.get("window_size"), where, model, like)
    named = settings.get("activation_func")
    target = named.get("_target_") if isinstance(named, dict) else None
    if isinstance(target, str) and target.endswith("silu") != (model.activation == "silu"):
        raise UserError(
            f"{where}: activation_func is {shown(target)}, but {like / 'config.json'} describes {model.activation}; "
            "give the model that the checkpoint was made from with --like."
        )


def _check_window(found: Any, where: Path, model: ModelDescription, like: Path) -> None:
    """Refuse a sliding window that is not the model's. One that is not set says nothing.

    Megatron counts the tokens before the query: [4095, 0] is HuggingFace's 4096. Megatron-Bridge and NeMo 2 write
    [4096, 0] for it, and 4096 for Gemma-3.

    Raises:
        UserError: It differs.
    """
    before = found[0] if _is_pair(found) else found
    if not isinstance(before, int) or isinstance(before, bool) or before < 0:
        return
    window = model.sliding_window
    if window is None or before not in (window, window - 1):
        raise UserError(
            f"{where}: window_size={shown(found)}, but {like / 'config.json'} describes "
            f"{'no sliding window' if window is None else f'a sliding window of {window} tokens'}; "
            "give the model that the checkpoint was made from with --like."
        )


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def _agrees(found: Any, expected: Any) -> bool:
    """Whether a setting is the expected one. One that is not set, or that is neither a plain value nor a pair where one
    is expected, says nothing."""
    if _is_pair(found) and _is_pair(expected):
        return all(map(_agrees, found, expected))
    if found is None or not isinstance(found, bool | int | float | str):
        return True
    if isinstance(found, str) or isinstance(expected, str):
        return bool(found == expected)
    if not found or not expected:  # None and 0 both switch a feature off
        return bool(found) == bool(expected)
    return math.isclose(found, expected, rel_tol=1e-6)
