"""What a micro-batch gives a rank to hold: numbers of tokens, labels and keys, at most or of a batch that is there.

Legend: C context-parallel ranks, T tokens of a micro-batch over all of them, L the longest sequence that goes through
the model, which is data.max_length without its last token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tgdpo_megatron.config import Config
from tgdpo_megatron.config.constants import SCORED_AT_ONCE
from tgdpo_megatron.model.description import ModelDescription

if TYPE_CHECKING:
    from tgdpo_megatron.data.batch import Batch

Program = Literal["train", "score"]


@dataclass(frozen=True)
class Load:
    """One micro-batch on one rank.

    Attributes:
        tokens: T, with padding.
        labelled: Labelled tokens of the micro-batch.
        predicted: Those of them that this rank predicts; all of them without context parallelism.
        key_rows: Keys of all blocks of the rank's attention plan (data/attention_plan.py), which attention copies. 0
            where it copies none, because queries and keys are the same rows.
        most_queries: Queries of the longest block.
        most_keys: Keys of the block that has the most of them.
    """

    tokens: int
    labelled: int
    predicted: int
    key_rows: int
    most_queries: int
    most_keys: int

    @classmethod
    def plain(cls, tokens: int, labelled: int, *, longest: int) -> Load:
        """Sequences of at most `longest` tokens on one rank, which share nothing."""
        return cls(tokens, labelled, labelled, 0, longest, longest)

    @classmethod
    def of(cls, batch: Batch, *, context: int = 1) -> Load:
        """The load of a batch that is there, on one of `context` context-parallel ranks."""
        plan = batch.plan
        keys = 0 if plan.key_rows is None else len(plan.key_rows)
        labelled, predicted = len(batch.pairs.pair), len(batch.predictors)
        return cls(context * len(batch.tokens), labelled, predicted, keys, plan.most_queries, plan.most_keys)


def most_tokens(config: Config, description: ModelDescription, program: Program = "train") -> int:
    """The largest T. The last token of a sequence never goes through the model."""
    pairs = config.train.micro_batch_size if config.train.micro_batch_tokens is None else SCORED_AT_ONCE
    if program == "score":
        pairs = min(pairs, SCORED_AT_ONCE)
    elif config.train.micro_batch_tokens is not None:
        return config.train.micro_batch_tokens
    most = -(-pairs * longest_pair(config, description) // config.token_multiple) * config.token_multiple
    return min(most, config.train.micro_batch_tokens or most)


def longest_pair(config: Config, description: ModelDescription) -> int:
    """The largest number of tokens of one pair that go through the model.

    Shared prompts do not lower it: prompts may be short, and those that differ after truncation are not shared.
    """
    return len(config.loss.method.sides) * longest_sequence(config, description)


def longest_sequence(config: Config, description: ModelDescription) -> int:
    """L."""
    return min(config.data.max_length, description.max_position_embeddings) - 1


def largest_loads(config: Config, description: ModelDescription, program: Program = "train") -> list[Load]:
    """Loads of which one needs the most memory of all that the settings allow.

    A rank's memory grows with the numbers of a load, and these with the lengths of prompts and responses. So the most
    is needed at an end: no prompt is shared; or prompts are shared and short, so that all tokens may be labelled; or
    they are shared and as long as they can be, so that most keys are copied. The numbers are those of the rank that has
    the most of each.
    """
    ranks, longest = config.parallel.context_parallel_size, longest_sequence(config, description)
    tokens = most_tokens(config, description, program)
    longest = min(longest, tokens)
    queries = -(-longest // ranks)
    # Each segment is cut into 2 C chunks. The first rank has the first chunk of a segment, and the last, which sees the
    # whole of it; the last rank has the two in the middle, which adjoin and are one block.
    seen = math.ceil(tokens * (1 + 1 / (2 * ranks))) if ranks > 1 else tokens
    copied = Load(tokens, tokens, -(-tokens // ranks), seen, queries, longest)
    apart = Load.plain(tokens, tokens, longest=longest) if ranks == 1 else copied
    if not (config.train.shared_prompts and len(config.loss.method.sides) > 1):
        return [apart]
    # The prompt fills the chosen sequence, and each of a rank's chunks of the rejected response sees all of it.
    if config.train.micro_batch_tokens is None:
        tokens = -(-tokens // (2 * config.token_multiple)) * config.token_multiple
    seen = math.ceil(tokens * (3 + 1 / (2 * ranks))) if ranks > 1 else 2 * tokens
    labels = 4 * max(1, tokens // longest)
    return [apart, copied, Load(tokens, labels, labels, seen, queries, longest)]
