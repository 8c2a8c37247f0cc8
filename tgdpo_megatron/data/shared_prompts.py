"""Which pairs share a prompt, and how many tokens a model reads of pairs whose prompts are computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tgdpo_megatron.data.prepare import PreparedPairs


def shares_prompt(data: PreparedPairs, pair: int) -> bool:
    """Whether both responses of a pair continue the same tokens."""
    prompt = int(data.prompt_lengths[pair])
    chosen, rejected = (data.sequence(pair, side)[:prompt] for side in (0, 1))
    return np.array_equal(chosen, rejected)


def tokens_read(data: PreparedPairs, picked: np.ndarray, sides: tuple[int, ...], *, shared_prompts: bool) -> np.ndarray:
    """Number of tokens of some pairs that a model reads. A shared prompt counts once. [n] int64.

    Args:
        picked: Indices of the pairs. [n] int64.
        sides: Which responses are read.
        shared_prompts: Whether prompts are shared where they are the same, see train.shared_prompts.
    """
    return fed_tokens(data, picked, sides, shared_prompts=shared_prompts).sum(axis=1)


def fed_tokens(data: PreparedPairs, picked: np.ndarray, sides: tuple[int, ...], *, shared_prompts: bool) -> np.ndarray:
    """The same for each response: all tokens but the last, and without the prompt where another response has it.

    Returns:
        [n, sides] int64.
    """
    lengths = data.sequence_lengths(sides)[picked]
    if shared_prompts and len(sides) > 1:
        shares = np.array([shares_prompt(data, int(pair)) for pair in picked], dtype=bool)
        lengths[:, 1:] -= (data.prompt_lengths[picked] * shares)[:, None]
    return lengths
