"""A model's shape, read from a HuggingFace config.json without loading anything else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tgdpo_megatron.config import Config, ParallelConfig
from tgdpo_megatron.config.constants import FP8_MULTIPLE
from tgdpo_megatron.errors import UserError


@dataclass(frozen=True)
class ModelDescription:
    """What is needed to build a Llama model in Megatron. Sizes in elements."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    tie_word_embeddings: bool
    rotary_base: float
    rope_scaling_factor: float | None
    """Llama-3.1 frequency scaling; None for plain RoPE."""

    def differs_from(self, other: ModelDescription) -> list[str]:
        """Names of what keeps two models from running as one pipeline, stacked: any difference but the number of
        positions."""
        ours, theirs = asdict(self), asdict(other)
        return [name for name in ours if ours[name] != theirs[name] and name != "max_position_embeddings"]


def read_description(folder: Path) -> ModelDescription:
    """Read config.json of a HuggingFace model folder.

    Raises:
        UserError: No config there, or an architecture or option this project does not build.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder.")
    if not path.is_file():
        raise UserError(f"{folder}: no config.json there; it is not a HuggingFace model folder.")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON ({error.msg}).") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected an object, found {type(config).__name__}.")
    if config.get("quantization_config"):
        raise UserError(f"{path}: the weights are quantised; use a bf16 or fp32 copy of the model.")
    architecture = (config.get("architectures") or ["LlamaForCausalLM"])[0]
    if config.get("model_type") != "llama" or architecture != "LlamaForCausalLM":
        if config.get("model_type") != "llama":
            architecture = (config.get("architectures") or [config.get("model_type")])[0]
        raise UserError(f"{path}: architecture '{architecture}' is not supported; supported: LlamaForCausalLM.")
    for name, supported in {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}.items():
        if config.get(name, supported) != supported:
            raise UserError(f"{path}: {name}={config[name]!r} is not supported; only {supported!r} is.")
    try:
        return _llama(config, path)
    except KeyError as error:
        raise UserError(f"{path}: {error} is missing.") from None
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: a field has a value of the wrong kind; it is not a Llama configuration.") from None


def _llama(config: dict[str, Any], path: Path) -> ModelDescription:
    heads = config["num_attention_heads"]
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    for name in (*sizes, "max_position_embeddings"):
        if not config[name] > 0:
            raise UserError(f"{path}: {name}={config[name]} is not a size.")
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
    """RoPE base and Llama-3.1 factor, from the old keys (rope_theta, rope_scaling) or the new (rope_parameters)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return base, None
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind != "llama3" or any(rope.get(name) != value for name, value in fixed.items()):
        raise UserError(f"{path}: RoPE scaling {rope} is not supported; only Llama-3.1's (llama3, 1, 4, 8192) is.")
    return base, float(rope["factor"])


def check_model_layout(description: ModelDescription, parallel: ParallelConfig) -> None:
    """Refuse a layout that does not divide the model.

    Raises:
        UserError: Naming both numbers.
    """
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for what, number in {
        "attention heads": description.num_attention_heads,
        "key-value heads": description.num_query_groups,
        "feed-forward channels": description.ffn_hidden_size,
    }.items():
        if number % tensor:
            raise UserError(
                f"parallel.tensor_model_parallel_size={tensor} does not divide the model's {number} {what}; "
                "choose a divisor."
            )
    stages = pipeline * (parallel.virtual_pipeline_model_parallel_size or 1)
    if description.num_layers % stages:
        raise UserError(
            f"{stages} pipeline stages (pipeline {pipeline} × virtual "
            f"{parallel.virtual_pipeline_model_parallel_size or 1}) do not divide the model's "
            f"{description.num_layers} layers; choose a divisor."
        )


def check_fp8_sizes(description: ModelDescription, config: Config) -> None:
    """Refuse a model whose linear layers, cut over the tensor-parallel ranks, FP8 matrix products do not take.

    Raises:
        UserError: Naming the size and what must divide it.
    """
    if config.train.fp8 is None:
        return
    tensor = config.parallel.tensor_model_parallel_size
    queries = description.num_attention_heads * description.kv_channels
    keys = description.num_query_groups * description.kv_channels
    each = f"on each of {tensor} tensor-parallel ranks"
    for what, number, multiple in (
        ("hidden channels", description.hidden_size, config.fp8_multiple),
        (f"feed-forward channels {each}", description.ffn_hidden_size // tensor, FP8_MULTIPLE),
        (f"query channels {each}", queries // tensor, FP8_MULTIPLE),
        (f"query, key and value channels {each}", (queries + 2 * keys) // tensor, FP8_MULTIPLE),
    ):
        if number % multiple:
            raise UserError(
                f"train.fp8={config.train.fp8} needs sizes that are multiples of {multiple}, the model has {number} "
                f"{what}; leave train.fp8 out, or change the layout."
            )
