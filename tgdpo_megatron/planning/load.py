"""How much of a micro-batch one rank holds: its numbers of tokens, labels and keys, of a given batch or at most.

Legend: C context-parallel ranks, T tokens of a micro-batch over all of them, t tokens of each, L the longest sequence
that goes through the model, which is data.max_length without its last token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tgdpo_megatron.config import Config
from tgdpo_megatron.config.constants import SCORED_AT_ONCE, round_up
from tgdpo_megatron.model.description import ModelDescription

if TYPE_CHECKING:
    import numpy as np

    from tgdpo_megatron.data.batch import Batch
    from tgdpo_megatron.data.prepare import PreparedPairs

Program = Literal["train", "score"]


@dataclass(frozen=True)
class Load:
    """One micro-batch on one rank.

    Attributes:
        tokens: t, with padding.
        labelled: Labelled tokens of the whole micro-batch.
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
    def of(cls, batch: Batch) -> Load:
        """The load of a batch that is there."""
        plan = batch.plan
        keys = 0 if plan.key_rows is None else len(plan.key_rows)
        labelled, predicted = len(batch.pairs.pair), len(batch.predictors)
        return cls(len(batch.tokens), labelled, predicted, keys, plan.most_queries, plan.most_keys)


def most_tokens(config: Config, description: ModelDescription, program: Program = "train") -> int:
    """The largest T. The last token of a sequence never goes through the model."""
    budget = config.train.micro_batch_tokens
    if program == "train" and budget is not None:
        return budget  # a pack may be filled to its last token
    pairs = config.train.micro_batch_size if budget is None else SCORED_AT_ONCE
    if program == "score":
        pairs = min(pairs, SCORED_AT_ONCE)
    most = round_up(pairs * longest_pair(config, description), config.token_multiple)
    return most if budget is None else min(most, budget)


def longest_pair(config: Config, description: ModelDescription) -> int:
    """The largest number of tokens of one pair that go through the model.

    Shared prompts do not lower it: prompts may be short, and those that differ after truncation are not shared.
    """
    return len(config.loss.method.sides) * longest_sequence(config, description)


def longest_sequence(config: Config, description: ModelDescription) -> int:
    """L."""
    return min(config.data.max_length, description.max_position_embeddings) - 1


def largest_loads(config: Config, description: ModelDescription, program: Program = "train") -> list[Load]:
    """Loads of which one needs the most memory of all micro-batches of pairs of the greatest length.

    A rank's memory grows with the numbers of a load, and these with the length of the prompts. So the most is needed at
    an end: no prompt is shared; or prompts are shared and short, so that all tokens may be labelled; or they are shared
    and as long as they can be, so that most keys are copied. The numbers are those of the rank that has the most of
    each.
    """
    tokens = most_tokens(config, description, program)
    longest = min(longest_sequence(config, description), tokens)
    ranks = config.parallel.context_parallel_size
    found = [_nothing_shared(tokens, longest, ranks)]
    if config.train.shared_prompts and len(config.loss.method.sides) > 1:
        found.append(_short_prompts(tokens, longest, ranks))
        if config.train.micro_batch_tokens is None:  # the rejected responses need next to no tokens
            tokens = round_up(tokens, 2 * config.token_multiple) // 2
        found.append(_long_prompts(tokens, longest, ranks))
    return found


def load_of_pairs(pairs: PreparedPairs, config: Config) -> Load:
    """At least what any micro-batch of some pairs holds in training; a shared prompt counts once.

    Each number is the largest that a micro-batch can have; of packs, if the last pair could be cut to fit.
    """
    import numpy as np

    from tgdpo_megatron.data.shared_prompts import tokens_read_by_side  # brings what reads text

    sides, ranks = config.loss.method.sides, config.parallel.context_parallel_size
    every = np.arange(len(pairs))
    read, shared = tokens_read_by_side(pairs, every, sides, shared_prompts=config.train.shared_prompts)
    longest = pairs.sequence_lengths(sides, every)
    of_pairs = read.sum(axis=1)
    labels = (longest + 1).sum(axis=1) - len(sides) * pairs.prompt_lengths[every].astype(np.int64)
    budget, together = config.train.micro_batch_tokens, config.train.micro_batch_size

    def most(numbers: np.ndarray) -> int:
        if budget is None:
            return int(np.sort(numbers)[-together:].sum())
        order = np.argsort(-numbers / of_pairs)
        filled = np.concatenate([[0], np.cumsum(of_pairs[order])])
        return math.ceil(np.interp(budget, filled, np.concatenate([[0], np.cumsum(numbers[order])])))

    tokens = round_up(most(of_pairs), config.token_multiple) if budget is None else budget
    number = most(np.ones_like(of_pairs))
    prompts = shared.sum(axis=1)
    keys = 0
    if ranks > 1 or prompts.any():
        keys = _keys(tokens, len(sides) * number, ranks) + _keys_of_prompts(most(prompts), ranks)
    return _load(tokens, most(labels), keys, int(longest.max()), ranks, shared=number if prompts.any() else 0)


def _nothing_shared(tokens: int, longest: int, ranks: int) -> Load:
    if ranks == 1:
        return Load.plain(tokens, tokens, longest=longest)
    return _load(tokens, tokens, _keys(tokens, -(-tokens // longest), ranks), longest, ranks)


def _short_prompts(tokens: int, longest: int, ranks: int) -> Load:
    """Shared prompts of one token, which predicts the first token of both responses."""
    pairs = -(-tokens // (2 * longest))
    keys = _keys(tokens, 2 * pairs, ranks) + _keys_of_prompts(pairs, ranks)
    return _load(tokens, tokens + pairs, keys, longest, ranks, shared=pairs)


def _long_prompts(tokens: int, longest: int, ranks: int) -> Load:
    """Shared prompts that fill the chosen sequences. Each of a rank's chunks of the rejected responses has a token."""
    pairs = max(1, tokens // longest)
    chunks = 1 if ranks == 1 else 2 * ranks
    labels = 2 * pairs * (chunks + 1)
    keys = _keys(tokens, 2 * pairs, ranks) + _keys_of_prompts(tokens, ranks)
    return _load(tokens, labels, keys, longest, ranks, shared=pairs)


def _load(tokens: int, labels: int, keys: int, longest: int, ranks: int, *, shared: int = 0) -> Load:
    """A token predicts one label, but for the last of each of the `shared` prompts, which predicts two."""
    of_rank = -(-tokens // ranks)
    return Load(of_rank, labels, min(labels, of_rank + shared), keys, -(-longest // ranks), longest)


def _keys(tokens: int, segments: int, ranks: int) -> int:
    """Keys of a rank's blocks in their own segments, at most.

    Each segment is cut into 2 C chunks of nearly the same size. The first rank has the first chunk, and the last, which
    sees the whole segment. Rows that are left over move a rank's boundaries by C - 1 rows at most.
    """
    return tokens if ranks == 1 else math.ceil(tokens * (1 + 1 / (2 * ranks))) + segments * (ranks - 1)


def _keys_of_prompts(tokens: int, ranks: int) -> int:
    """Keys of shared prompts of so many tokens in a rank's blocks of the rejected responses, two where ranks split."""
    return tokens if ranks == 1 else 2 * tokens
