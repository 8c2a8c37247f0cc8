"""How many floating-point operations some sequences need: counted from their lengths, not measured.

Matrix products and attention, a multiply-add counting 2. Nothing that is computed twice to save memory is counted, and
no padding, and no prompt twice that two responses share. A token goes through every weight of the layers, and a
labelled token through the output matrix as well. Causal attention takes two products over the tokens that a query sees:
half of a sequence's square, less with a window.
"""

from __future__ import annotations

import numpy as np

from tgdpo_megatron.model.description import ModelDescription

TRAINING = 3
"""Operations of forward and backward to those of forward alone: backward takes a product for each factor of one."""


def forward_operations(
    description: ModelDescription, lengths: np.ndarray, labels: int, prefixes: np.ndarray | int = 0
) -> int:
    """Operations of one forward pass of a model.

    Args:
        lengths: Tokens of each sequence that the model reads, without a shared prompt that it continues. int64.
        labels: Number of labelled tokens.
        prefixes: Tokens of the shared prompt that each sequence continues. int64.
    """
    hidden = description.hidden_size
    prefixes = np.broadcast_to(prefixes, lengths.shape)
    layer = (
        2 * hidden * (description.query_channels + description.key_channels) + 3 * hidden * description.ffn_hidden_size
    )
    halves = sum(
        _halves_seen(prefixes + lengths, window) - _halves_seen(prefixes, window)
        for window in (
            description.sliding_window if description.is_windowed(number) else None
            for number in range(description.num_layers)
        )
    )
    return (
        2 * description.num_layers * layer * int(lengths.sum())
        + 2 * hidden * description.vocab_size * labels
        + 2 * description.query_channels * halves
    )


def _halves_seen(lengths: np.ndarray, window: int | None) -> int:
    """Twice the number of keys that the queries see. A query sees the keys before it and half of its own."""
    seen = lengths if window is None else np.minimum(lengths, window)
    return int((seen * (2 * lengths - seen)).sum())
