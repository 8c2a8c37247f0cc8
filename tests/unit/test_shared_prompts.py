"""Pairs whose two prompts differ share none, and are counted where pairs are prepared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.data.prepare import PreparedPairs, load_prepared, measured, prepare_pairs, save_prepared
from tgdpo_megatron.data.shared_prompts import tokens_read_by_side


@pytest.fixture
def data(prepared_by_hand: Callable[..., Any]) -> PreparedPairs:
    """Three pairs; the second's rejected response has 99 as the last token of its prompt."""
    same: PreparedPairs = prepared_by_hand([([1, 2], [4, 5], [6]), ([1, 2], [3], [7, 8]), ([9], [4], [5])])
    tokens = same.tokens.copy()
    tokens[same.starts[3] + 1] = 99
    return replace(same, tokens=tokens)


def test_a_pair_shares_its_prompt_if_both_prompts_are_the_same_tokens(data: PreparedPairs) -> None:
    assert [data.shares_prompt(pair) for pair in range(3)] == [True, False, True]


def test_whether_a_pair_shares_its_prompt_is_read_once_and_for_no_other_pair(data: PreparedPairs) -> None:
    """Tokens that change afterwards show which prompts are read again, and a copy of the pairs reads all anew."""
    assert data.shares_prompt(0) and not data.shares_prompt(1)
    for pair in range(3):
        data.tokens[data.starts[2 * pair + 1]] = 100 + pair
    assert [data.shares_prompt(pair) for pair in range(3)] == [True, False, False]
    assert [replace(data).shares_prompt(pair) for pair in range(3)] == [False, False, False]


def test_the_tokens_of_some_pairs_are_counted_at_their_places(data: PreparedPairs) -> None:
    """In any order, and one pair twice. Only the second pair's prompts differ, so that it alone is read twice."""
    picked, sides = np.array([2, 0, 1, 2]), (1, 0)
    expected = [[len(data.sequence(pair, side)) - 1 for side in sides] for pair in picked]
    assert data.sequence_lengths(sides, picked).tolist() == expected
    fed, left_out = tokens_read_by_side(data, picked, (0, 1), shared_prompts=True)
    assert left_out.tolist() == [[0, 1], [0, 2], [0, 0], [0, 1]]
    assert (fed + left_out).tolist() == [row[::-1] for row in expected]


def test_pairs_whose_prompts_differ_are_counted_and_told(data: PreparedPairs, tmp_path: Path) -> None:
    prepared = measured(data)
    assert prepared.summary.prompts_apart == 1
    assert ", 1 pairs with two different prompts;" in prepared.summary.sentences()
    save_prepared(replace(prepared, prompts=np.zeros((3, 8), dtype=np.uint8)), tmp_path)
    assert load_prepared(tmp_path).summary.prompts_apart == 1


@pytest.mark.parametrize("truncation", ["prompt_left", "response_right", "proportional"])
def test_both_prompts_of_a_pair_are_cut_alike(
    truncation: str, write_pairs: Callable[..., Path], tokenizer: Any, tmp_path: Path
) -> None:
    """However much longer one of its responses is."""
    long, short = "Hello there! " * 12, "No."
    rows = [
        {"instruction": "Say hello. " * words, "chosen": one, "rejected": other}
        for words in (1, 9)
        for one, other in ((long, short), (short, long))
    ]
    config = DataConfig(max_length=90, truncation=truncation)
    prepared = prepare_pairs(config, write_pairs(tmp_path / "pairs.jsonl", rows), tokenizer, tmp_path / "prepared")
    assert prepared.summary.prompts_apart == 0 and "different prompts" not in prepared.summary.sentences()
    assert prepared.summary.prompts_cut + prepared.summary.responses_cut > 0
