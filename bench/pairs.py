"""The pairs the benchmark runs on: random tokens, as long as real pairs are, or about as long as UltraFeedback's."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from tgdpo_megatron.data.prepare import PreparedPairs, Summary

VOCABULARY = 1344
LENGTHS = Path(__file__).with_name("lengths.csv")
"""Tokens of the prompt and of both responses of 75 real pairs, nothing cut off. Written by bench.lengths."""
LEAST_PROMPT = 2
"""Tokens that a prompt keeps when it is cut: the first of all, which begins the text, and the last."""


def with_real_lengths(longest: int, *, lengths: np.ndarray | None = None, seed: int = 0) -> PreparedPairs:
    """Pairs of random tokens, as long as real ones are after the product has cut them to `longest` tokens.

    The product's rule: a prompt is cut on the left until the longer response fits behind it, and a pair with a
    response that leaves no room for a prompt is dropped.

    Args:
        lengths: Tokens of prompt, chosen and rejected response of each pair, [N, 3]; by default those of LENGTHS.
    """
    if lengths is None:
        lengths = read_lengths()
    prompts, responses = lengths[:, 0], lengths[:, 1:]
    room = longest - responses.max(axis=1)
    kept = room >= LEAST_PROMPT
    return _random_pairs(
        np.minimum(prompts, room)[kept], responses[kept], VOCABULARY, np.random.default_rng(seed), source="real lengths"
    )


def read_lengths() -> np.ndarray:
    """Tokens of prompt, chosen and rejected response of each real pair. [N, 3] int64."""
    with LENGTHS.open(newline="", encoding="utf-8") as file:
        return np.array([[int(row[part]) for part in ("prompt", "chosen", "rejected")] for row in csv.DictReader(file)])


def ultrafeedback_like(
    number: int, *, seed: int = 0, longest: int = 2048, vocabulary: int = VOCABULARY
) -> PreparedPairs:
    """Pairs of random tokens, with lengths like UltraFeedback's prompts and Llama-3's answers to them.

    The distribution is assumed, not counted: prompts are lognormal with mean 185 and log-deviation 1.0; responses
    lognormal with mean 400 and log-deviation 0.55, their logarithms correlated by 0.6 within a pair; prompts are cut
    on the left to fit `longest`.
    """
    random = np.random.default_rng(seed)
    prompt = np.exp(np.log(185) - 0.5 + random.normal(size=number))
    common, own = random.normal(size=(number, 1)), random.normal(size=(number, 2))
    response = np.exp(np.log(400) - 0.55**2 / 2 + 0.55 * (np.sqrt(0.6) * common + np.sqrt(0.4) * own))
    responses = np.clip(response.round(), 1, longest - 1).astype(np.int64)
    prompts = np.clip(prompt.round(), 1, longest - responses.max(axis=1)).astype(np.int64)
    return _random_pairs(prompts, responses, vocabulary, random, source="UltraFeedback-like")


def _random_pairs(
    prompts: np.ndarray, responses: np.ndarray, vocabulary: int, random: np.random.Generator, *, source: str
) -> PreparedPairs:
    """Random tokens: prompts [N] long, the same for both responses, which are [N, 2] long."""
    number = len(prompts)
    lengths = (prompts[:, None] + responses).ravel()
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = random.integers(0, vocabulary, lengths.sum()).astype(np.int32)
    for chosen, rejected, prompt in zip(starts[0:-1:2], starts[1::2], prompts, strict=True):
        tokens[rejected : rejected + prompt] = tokens[chosen : chosen + prompt]
    return PreparedPairs(
        tokens=tokens,
        starts=starts,
        prompt_lengths=prompts.astype(np.int32),
        hashes=np.frombuffer(np.arange(number * 4).tobytes(), dtype=np.uint8).reshape(number, 32),
        rows=np.arange(number),
        summary=Summary(source=source, pairs=number),
    )
