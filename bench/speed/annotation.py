"""What padding costs a reward model, and what scoring many answers together gains over one at a time.

    python -m bench.speed.annotation

Both use the product's own batches. The tokens are random, and only their number matters. For the padding, answers are
about as long as those to UltraFeedback's prompts. For the speed, a small classifier of Llama's shape in fp32 scores
answers that are as long as real ones, in turn with itself on one answer at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.files import program
from bench.pairs import VOCABULARY, read_lengths, ultrafeedback_like
from bench.rows import Row, paired
from tgdpo_megatron.reward_models.annotation import BLOCK
from tgdpo_megatron.reward_models.classifier import Classifier
from tgdpo_megatron.reward_models.scorer import BATCH_TOKENS, Group, RewardModel, Scorer, Tokens

PROMPTS, ROUNDS, LONGEST = 5000, 3, 512
TARGET = 1.2
SMALL_BATCH = 4096
"""Tokens of a batch on one core."""
SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8}


class Lengths(RewardModel):
    """Reads answers that are written as their numbers of tokens, and computes nothing."""

    device = torch.device("cpu")
    vocabulary = VOCABULARY

    def encode(self, group: Group, answers: Sequence[str]) -> list[Tokens]:
        return [random_tokens(int(answer)) for answer in answers]

    def numbers(self, sequences: Sequence[Tokens]) -> Tensor:
        return torch.zeros(len(sequences))


class OfLengths(Classifier):
    """A classifier that reads such answers."""

    def encode(self, group: Group, answers: Sequence[str]) -> list[Tokens | None]:
        return [random_tokens(int(answer)) for answer in answers]


def random_tokens(length: int) -> Tokens:
    """As many tokens, the same for the same number."""
    return Tokens(np.random.default_rng(length).integers(1, VOCABULARY, length).tolist())


def measure() -> Iterator[Row]:
    """Both rows."""
    yield _padding()
    yield _speed()


def _padding() -> Row:
    pairs = ultrafeedback_like(PROMPTS)
    lengths = np.diff(pairs.starts).reshape(-1, 2)
    scorer = Scorer(Lengths(), name="lengths", fingerprint="")
    _score(scorer, lengths)
    return Row(
        "annotation: tokens that a reward model reads, padding included, against those without",
        scorer.padded / scorer.tokens,
        target=TARGET,
        limit="1: no padding",
        note=f"{2 * PROMPTS:,} answers, {scorer.tokens / 1e6:.1f} million tokens, {BATCH_TOKENS:,} in a batch",
    )


def _speed() -> Row:
    model = _classifier()
    real = read_lengths()
    lengths = np.minimum(real[:, :1] + real[:, 1:], LONGEST)
    seconds: dict[int, list[float]] = {1: [], SMALL_BATCH: []}
    tokens = 0
    for _ in range(ROUNDS):
        for budget, taken in seconds.items():
            scorer = Scorer(model, name="small", fingerprint="", batch_tokens=budget)
            began = time.process_time()
            _score(scorer, lengths)
            taken.append(time.process_time() - began)
            tokens = scorer.tokens
    return paired(
        "annotation, CPU time: one answer at a time, against many together",
        seconds[1],
        seconds[SMALL_BATCH],
        note=f"{tokens / min(seconds[SMALL_BATCH]):,.0f} tokens/s on one core, {SMALL_BATCH:,} in a batch",
    )


def _classifier() -> OfLengths:
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    config = LlamaConfig(**SHAPE, vocab_size=VOCABULARY, num_labels=1, pad_token_id=0)
    model: Any = AutoModelForSequenceClassification.from_config(config).eval()
    return OfLengths(model, None, LONGEST)


def _score(scorer: Scorer, lengths: np.ndarray) -> None:
    """Score answers of these lengths, a row for each prompt, as many prompts at a time as tools.annotate."""
    groups = (Group([], [str(length) for length in row]) for row in lengths.tolist())
    while block := list(islice(groups, BLOCK)):
        for _ in scorer.scores(block):
            pass


if __name__ == "__main__":
    program(__doc__, measure)
