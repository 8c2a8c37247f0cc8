"""The pairs the benchmark runs on: real ones where they are, and made-up ones with UltraFeedback's lengths."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.data.formats import read_pairs
from tgdpo_megatron.data.prepare import PreparedPairs, Summary, prepare_pairs

VOCABULARY = 2048
NO_DATA = "no preferences_instruction.json in TGDPO_DATA or ../shared/data"


def real_file() -> Path | None:
    """The real pairs: in the folder the environment variable TGDPO_DATA names, or beside the repository."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    path = Path(os.environ.get("TGDPO_DATA", beside)) / "preferences_instruction.json"
    return path if path.is_file() else None


def real_tokenizer(source: Path) -> Any:
    """A byte-level BPE of VOCABULARY tokens, trained on the pairs themselves."""
    from tools.make_tiny_model import train_tokenizer

    texts = [text for pair in read_pairs(source).pairs for text in pair.texts]
    return train_tokenizer(texts, vocab_size=VOCABULARY)


def real_pairs(source: Path, tokenizer: Any, max_length: int, folder: Path) -> PreparedPairs:
    """The real pairs as the product tokenises them."""
    return prepare_pairs(DataConfig(max_length=max_length), source, tokenizer, folder)


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
    lengths = (prompts[:, None] + responses).ravel()
    return PreparedPairs(
        tokens=random.integers(0, vocabulary, lengths.sum()).astype(np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=prompts.astype(np.int32),
        hashes=np.frombuffer(np.arange(number * 4).tobytes(), dtype=np.uint8).reshape(number, 32),
        rows=np.arange(number),
        summary=Summary(source="UltraFeedback-like", pairs=number),
    )
