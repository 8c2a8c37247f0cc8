"""How many tokens a micro-batch may have at most."""

from __future__ import annotations

from typing import Literal

from tgdpo_megatron.config import Config
from tgdpo_megatron.config.constants import SCORED_AT_ONCE
from tgdpo_megatron.model.description import ModelDescription

Program = Literal["train", "score"]


def most_tokens(config: Config, description: ModelDescription, program: Program = "train") -> int:
    """The largest number of tokens that go through the model at once. The last token of a sequence never does."""
    pairs = config.train.micro_batch_size if config.train.micro_batch_tokens is None else SCORED_AT_ONCE
    if program == "score":
        pairs = min(pairs, SCORED_AT_ONCE)
    elif config.train.micro_batch_tokens is not None:
        return config.train.micro_batch_tokens
    most = -(-pairs * longest_pair(config, description) // config.token_multiple) * config.token_multiple
    return min(most, config.train.micro_batch_tokens or most)


def longest_pair(config: Config, description: ModelDescription) -> int:
    """The largest number of tokens of one pair that go through the model."""
    sequences = len(config.loss.method.sides)
    return sequences * (min(config.data.max_length, description.max_position_embeddings) - 1)
