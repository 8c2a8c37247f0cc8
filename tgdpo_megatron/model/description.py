"""The shape of a model, and the checks that a parallel layout and FP8 fit the shape."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal

from tgdpo_megatron.config import Config, ParallelConfig
from tgdpo_megatron.config.constants import FP8_MULTIPLE
from tgdpo_megatron.errors import UserError


@dataclass(frozen=True)
class ModelDescription:
    """Everything that is needed to build a model in Megatron. Sizes are in elements."""

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
    """Factor of Llama-3.1's frequency scaling; None for plain RoPE."""
    family: str = "llama"
    """HuggingFace's `model_type`; see model/families/."""
    attention_bias: bool = False
    """Whether queries, keys and values have biases."""
    qk_layernorm: bool = False
    """Whether each query and key head has a norm of its own, before RoPE."""
    sliding_window: int | None = None
    """Tokens that a query of a windowed layer sees, itself included; None without windowed layers."""
    windowed_layers: tuple[bool, ...] = ()
    """Whether each layer is windowed; empty without windowed layers."""
    window_rotary_base: float | None = None
    """RoPE base of windowed layers, where it differs from rotary_base. Their RoPE is not scaled."""
    rope_linear_factor: float | None = None
    """Positions are divided by this in RoPE."""
    query_scale: float | None = None
    """What attention scores are multiplied by; None for 1 / √kv_channels."""
    attention_softcap: float | None = None
    """c in c · tanh(score / c), which bounds attention scores."""
    logit_softcap: float | None = None
    """c in c · tanh(logit / c), which bounds the output logits."""
    embedding_scale: float | None = None
    """What embeddings are multiplied by, after rounding to the embeddings' dtype."""
    zero_centered_norms: bool = False
    """Whether norms multiply by 1 + weight."""
    post_norms: bool = False
    """Whether attention and feed-forward are followed by a norm as well."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """What the gate of the feed-forward block goes through."""

    @property
    def query_channels(self) -> int:
        """Channels of all query heads."""
        return self.num_attention_heads * self.kv_channels

    @property
    def key_channels(self) -> int:
        """Channels of all key heads, and of all value heads."""
        return self.num_query_groups * self.kv_channels

    def is_windowed(self, layer: int) -> bool:
        """Whether a layer, counted from 0, sees a window of the tokens before it only."""
        return bool(self.windowed_layers) and self.windowed_layers[layer]

    def identity(self) -> dict[str, Any]:
        """What a fingerprint covers beside the weights: every field but max_position_embeddings.

        A field that has its default is left out, so that fingerprints made before the field existed stay valid.
        """
        defaults = {field.name: field.default for field in fields(self) if field.default is not MISSING}
        values = asdict(self)
        del values["max_position_embeddings"]
        return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}

    def differs_from(self, other: ModelDescription) -> list[str]:
        """Names of the fields that keep two models from running stacked in one pipeline: every field that differs,
        but max_position_embeddings."""
        if self.family != other.family:
            return ["family"]  # the rest follows from it
        ours, theirs = asdict(self), asdict(other)
        return [name for name in ours if ours[name] != theirs[name] and name != "max_position_embeddings"]


def check_model_layout(description: ModelDescription, parallel: ParallelConfig) -> None:
    """Refuse a parallel layout whose sizes do not divide the model's sizes.

    Raises:
        UserError: A size does not divide; the sentence names both numbers.
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
    """Refuse a model whose linear layers, split over the tensor-parallel ranks, have sizes that FP8 cannot multiply.

    Raises:
        UserError: A size is not a multiple of what FP8 needs; the sentence names both numbers.
    """
    if config.train.fp8 is None:
        return
    tensor = config.parallel.tensor_model_parallel_size
    queries, keys = description.query_channels, description.key_channels
    each = f"on each of {tensor} tensor-parallel ranks"
    for what, number, multiple in (
        ("hidden channels", description.hidden_size, config.fp8_multiple),
        (f"feed-forward channels {each}", description.ffn_hidden_size // tensor, FP8_MULTIPLE),
        (f"query channels {each}", queries // tensor, FP8_MULTIPLE),
        (f"query, key and value channels {each}", (queries + 2 * keys) // tensor, FP8_MULTIPLE),
    ):
        if number % multiple:
            raise UserError(
                f"train.fp8={config.train.fp8} needs sizes that are multiples of {multiple}, but the model has "
                f"{number} {what}; leave train.fp8 out, or change the layout."
            )
