"""Sizes that are fixed in the code and shared by the planner and the programs. This file does not import torch."""

MOST = 2**31 - 1
"""Largest whole number of any setting, and largest size of a model: beyond it torch's and NumPy's 32-bit numbers, and
in products their 64-bit numbers, would overflow."""

FP8_MULTIPLE, FP8_BLOCK = 16, 128
"""FP8 matrix products need sizes that are multiples of the first number. Where scaling is blockwise and ranks split the
sequence, Transformer Engine gathers only whole blocks, of the second number."""

FP8_FORMATS = {"tensorwise": "hybrid", "delayed": "hybrid", "blockwise": "e4m3"}
"""FP8 recipe -> its format. These are Transformer Engine's defaults."""

VOCAB_MULTIPLE = 128
"""Each rank's share of the vocabulary is padded to a multiple of this number, which is Megatron's default."""

TILE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Number of logits in one tile of the head. In fp32 these take 16 MiB and 512 MiB; bf16 models also hold a bf16 copy. A
tile is large enough for its matrix products to run at full rate."""

MIN_TILE_COLUMNS = 128
"""A tile has at least this many columns, however many tokens it has."""

SCORED_AT_ONCE = 128
"""Pairs that scoring gives to each data-parallel rank between progress updates: enough to fill the pipeline, and few
enough for a moving progress bar."""

ATTENTION_SCORES = 1 << 24
"""Number of scores in one strip of queries where model/attention.py computes attention itself. In fp32 these take
64 MiB."""
_LEAST_ROWS = 64

MASKED_ROWS, MASK_MULTIPLE = 256, 1024
"""Queries that attention takes at a time where it needs a mask, which has a number for each of them and each key. One
mask is kept, for numbers of keys up to a multiple of the second number."""


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def attention_rows(tokens: int, heads: int, window: int | None) -> int:
    """Queries in one strip of that attention.

    With a window a strip of r queries sees r + window keys. More queries than the window would compute more scores in
    vain than are needed, and far fewer would make the matrix products small.
    """
    most = tokens
    if window is not None:
        most = min(tokens, max(window, _LEAST_ROWS))
    columns = min(tokens, most + (window or tokens))
    return max(1, min(most, ATTENTION_SCORES // (heads * columns)))
