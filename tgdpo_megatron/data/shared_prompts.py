"""How many tokens a model reads of pairs whose shared prompts are computed once."""

from __future__ import annotations

import numpy as np

from tgdpo_megatron.data.prepare import PreparedPairs


def tokens_read(data: PreparedPairs, picked: np.ndarray, sides: tuple[int, ...], *, shared_prompts: bool) -> np.ndarray:
    """Number of tokens of some pairs that a model reads. A shared prompt counts once. [n] int64.

    Args:
        picked: Indices of the pairs. [n] int64.
        sides: Which responses are read.
        shared_prompts: Whether prompts are shared where they are the same, see train.shared_prompts.
    """
    read, _ = tokens_read_by_side(data, picked, sides, shared_prompts=shared_prompts)
    return read.sum(axis=1)


def tokens_read_by_side(
    data: PreparedPairs, picked: np.ndarray, sides: tuple[int, ...], *, shared_prompts: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that a model reads of each response: all but the last, and not the prompt where the first response has it.

    Returns:
        These numbers, and those of the prompt tokens that are left out. Each [n, sides] int64.
    """
    lengths = data.sequence_lengths(sides, picked)
    prefixes = np.zeros_like(lengths)
    if shared_prompts and len(sides) > 1:
        shares = np.array([data.shares_prompt(pair) for pair in picked.tolist()], dtype=bool)
        prefixes[:, 1:] = (data.prompt_lengths[picked] * shares)[:, None]
    return lengths - prefixes, prefixes
