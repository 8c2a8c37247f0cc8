"""Token rewards from a file, checked against the data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.data.prepare import PreparedPairs, prepare_pairs
from tgdpo_megatron.data.token_scores import TokenScores
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.scores.reward_file import read_reward_file

ROWS = [
    {"instruction": "Add 2 and 3.", "chosen": "The sum is 5.", "rejected": "No"},
    {"instruction": "Describe the zoë.", "chosen": "  Ein Café 🦊 für  zwei, naïve!", "rejected": "日本 and\n tree "},
]


@pytest.fixture
def data(tokenizer: Any, write_pairs: Callable[..., Path], tmp_path: Path) -> PreparedPairs:
    return prepare_pairs(DataConfig(max_length=256), write_pairs(tmp_path / "pairs.jsonl", ROWS), tokenizer, tmp_path)


@pytest.fixture
def rewards_of(data: PreparedPairs, tokenizer: Any, tmp_path: Path) -> Callable[..., TokenScores]:
    """A function that writes the lines of a reward file and reads it."""

    def run(*lines: Any) -> TokenScores:
        path = tmp_path / "rewards.jsonl"
        path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
        return TokenScores.of(data, {"reward": read_reward_file(path, data, tokenizer)})

    return run


def empty(row: int, **sides: Any) -> dict[str, Any]:
    return {"row": row, "chosen": [], "rejected": []} | sides


def numbers(data: PreparedPairs, pair: int, side: int) -> list[float]:
    return [round(0.1 * place - pair - side, 3) for place in range(data.response_length(pair, side))]


def test_numbers_meet_their_tokens_whatever_the_order_of_lines(
    data: PreparedPairs, rewards_of: Callable[..., TokenScores]
) -> None:
    lines = [{"row": p + 1, "chosen": numbers(data, p, 0), "rejected": numbers(data, p, 1)} for p in (1, 0)]
    scores = rewards_of(*lines, "\n", empty(99))
    for pair in (0, 1):
        for side in (0, 1):
            expected = torch.tensor(numbers(data, pair, side))
            assert torch.equal(scores.join([pair], [side])["reward"], expected)


def test_spans_give_tokens_the_mean_over_their_characters(
    data: PreparedPairs, tokenizer: Any, rewards_of: Callable[..., TokenScores]
) -> None:
    """Every character its own number; the oracle finds each token's characters by walking over its bytes."""
    spans = {
        name: [[i, i + 1, (7 * i) % 11 - 4.0] for i in range(len(ROWS[1][name]))] for name in ("chosen", "rejected")
    }
    scores = rewards_of(empty(1), empty(2, **spans))
    for side, name in enumerate(spans):
        ids = data.sequence(1, side)[data.prompt_lengths[1] :]
        given = [number for _, _, number in spans[name]]
        expected = by_bytes(tokenizer, ids[:-1], ROWS[1][name], given)
        np.testing.assert_allclose(scores.join([1], [side])["reward"].numpy(), [*expected, 0.0], atol=1e-6)
        assert len(set(expected)) > 3


def by_bytes(tokenizer: Any, ids: Sequence[int], text: str, of_character: list[float]) -> list[float]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    before = len(text) - len(text.lstrip())  # the template takes these away
    character_of = [place for place, letter in enumerate(text) for _ in letter.encode()]
    first, means = len(text[:before].encode()), []
    for token in tokenizer.convert_ids_to_tokens(ids):
        content = bytes(byte_of[letter] for letter in token)
        assert text.encode()[first : first + len(content)] == content
        characters = sorted({character_of[place] for place in range(first, first + len(content))})
        means.append(sum(of_character[place] for place in characters) / len(characters))
        first += len(content)
    return means


def test_characters_outside_spans_count_0(rewards_of: Callable[..., TokenScores]) -> None:
    """ "No" is one token."""
    scores = rewards_of(empty(1, rejected=[[0, 1, 3.0]]), empty(2))
    assert scores.join([0], [1])["reward"].tolist() == [1.5, 0.0]
    assert not scores.join([0, 1], [0])["reward"].any()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1: not valid JSON"),
        ("[" * 100_000, "line 1: not valid JSON"),
        ("[1]", "line 1: expected an object with row and the lists chosen and rejected"),
        ({"row": 1, "chosen": [1.0]}, "line 1: expected an object with row"),
        ({"row": "1", "chosen": [], "rejected": []}, "line 1: 'row' must be the number"),
        ({"row": True, "chosen": [], "rejected": []}, "line 1: 'row' must be the number"),
        (empty(1, rejected=[1.0]), "the rejected response of row 1 of pairs.jsonl has 2 tokens, its end-of-turn"),
        (
            empty(1, chosen=[float("nan")]),
            "line 1: the chosen response of row 1 of pairs.jsonl has a reward that is not",
        ),
        (empty(1, chosen=[1e39]), "is not a finite number (1e+39)"),
        (empty(1, chosen=[10**400]), "is not a finite number (1000"),
        (empty(1, chosen=["1"]), "is not a finite number (1)"),
        (empty(1, chosen=[True]), "is not a finite number (True)"),
        (empty(1, chosen=[[0, 1, None]]), "is not a finite number (None)"),
        (empty(1, chosen=[[0, 1, 1.0], 0.5]), "give numbers, one for each token, or spans"),
        (empty(1, chosen=[[0, 1]]), "a span is [first character, character after the last, number]"),
        (empty(1, chosen=[[0, 14, 1.0]]), "the span 0–14 is not within the response's 13 characters"),
        (empty(1, chosen=[[3, 3, 1.0]]), "the span 3–3 is not within"),
        (empty(1, chosen=[[-1, 3, 1.0]]), "the span -1–3 is not within"),
        (empty(1, chosen=[[0.0, 3, 1.0]]), "the span 0.0–3 is not within"),
        (empty(1, chosen=[[0, 3, 1.0], [2, 4, 1.0]]), "the span 2–4 overlaps another"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_line_that_does_not_fit_is_refused(line: Any, words: str, rewards_of: Callable[..., TokenScores]) -> None:
    with pytest.raises(UserError) as refused:
        rewards_of(line)
    assert "rewards.jsonl line 1" in str(refused.value) and words in str(refused.value), str(refused.value)


def test_a_row_that_is_there_twice_is_refused(rewards_of: Callable[..., TokenScores]) -> None:
    with pytest.raises(UserError, match="line 3: row 1 has rewards already, on line 1"):
        rewards_of(empty(1), empty(2), empty(1))


def test_a_pair_without_rewards_is_refused_by_name(rewards_of: Callable[..., TokenScores]) -> None:
    with pytest.raises(UserError, match="no rewards for row 1 of pairs.jsonl"):
        rewards_of(empty(2))


def test_a_missing_file_is_refused(data: PreparedPairs, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such reward file"):
        read_reward_file(tmp_path / "no.jsonl", data, tokenizer)


def test_spans_in_a_text_that_was_edited_since_are_refused(
    rewards_of: Callable[..., TokenScores], write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    write_pairs(tmp_path / "pairs.jsonl", [ROWS[0] | {"chosen": "The total is 5."}, ROWS[1]])
    with pytest.raises(UserError, match="the chosen response of row 1 .* spans cannot be used"):
        rewards_of(empty(1, chosen=[[0, 3, 1.0]]))


def test_the_scores_of_a_file_of_pairs_are_the_rewards_of_last_tokens(
    data: PreparedPairs, rewards_of: Callable[..., TokenScores]
) -> None:
    """Lines count themselves, a blank one included, and a response's rewards sum to its score."""
    scores = rewards_of(ROWS[0] | {"score_chosen": 3.5, "score_rejected": -1}, ROWS[1] | SCORED)
    for pair, expected in enumerate([(3.5, -1.0), (0.25, 0.0)]):
        for side in (0, 1):
            found = scores.join([pair], [side])["reward"].tolist()
            assert found == [0.0] * (len(found) - 1) + [expected[side]]


SCORED = {"score_chosen": 0.25, "score_rejected": 0.0}


def test_a_score_of_a_file_of_pairs_that_is_no_number_is_refused(rewards_of: Callable[..., TokenScores]) -> None:
    with pytest.raises(UserError, match=r"line 2: the rejected response of row 2 .* not a finite number \(None\)"):
        rewards_of(ROWS[0] | SCORED, ROWS[1] | SCORED | {"score_rejected": None})
