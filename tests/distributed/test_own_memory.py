"""Tokens and scores belong to no rank: what a rank takes for itself does not grow with them."""

from __future__ import annotations

from pathlib import Path

from tests.support.own_memory import PROMPT, RESPONSE, write_set
from tests.support.program import run_ranks

PAIRS = 100_000
INDEX = 160
"""Bytes for each pair. 65 of them are kept: where its two responses begin among the labelled tokens, twice, and where
their scores of two names lie, eight bytes each, and whether they share their prompt. The rest is what the allocator
keeps of the search for the hashes."""
AT_ONCE = 8 * 2**20
"""Bytes of what is in memory at once, whatever the size of the set: a shard of scores with the sums that check it, one
micro-batch, and what the allocator keeps of both."""


def test_two_ranks_read_their_shares_of_200_megabytes_in_little_memory_of_their_own(tmp_path: Path) -> None:
    size = write_set(tmp_path, PAIRS)
    assert size > 200e6
    found = run_ranks("tests.support.own_memory", "read_share", 2, folder=str(tmp_path))
    tokens = PAIRS * 2 * (PROMPT + RESPONSE) * 4
    for rank in found:
        assert max(rank["opened"], rank["read"]) <= INDEX * PAIRS + AT_ONCE, rank
        assert rank["copied"] >= tokens, "a copy in memory would be seen"
