"""Token rewards from a .jsonl file with a line for each pair.

    {"row": 1, "chosen": [0.1, -0.3, 0.0], "rejected": [0.2, 0.0]}
    {"row": 2, "chosen": [[0, 4, 0.5], [4, 9, -1.0]], "rejected": []}
    {"score_chosen": 3.5, "score_rejected": 1.0, …}

`row` is the number of the pair's row in the data file, or of its line in a .jsonl file. Lines for rows that are not
trained on are skipped. The rewards of a response are either one number for each of its tokens, the closing end-of-turn
token included, or spans [first character, character after the last, number] of the response as the data file has it.
With spans a token gets the mean over its characters, where characters outside all spans count 0, and the end-of-turn
token gets 0. An empty list gives 0 to all tokens of the response.

A line without `row` and with the scores of whole responses is one of the data file itself, and is named by its own
number. A response's score is then the reward of its last token.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tgdpo_megatron.data.formats import TextPair
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.token_scores import response_starts
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.scores.texts import read_texts

_SIDES = ("chosen", "rejected")
_SCORES = ("score_chosen", "score_rejected")


def read_reward_file(path: Path, data: PreparedPairs, tokenizer: Any) -> np.ndarray:
    """Rewards of all response tokens, in the order of the data, chosen before rejected. fp32.

    Raises:
        UserError: A line cannot be read, a pair has no rewards, or rewards do not fit their response. The sentence
            names the line or the pair.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such reward file.")
    texts = cache(lambda: read_texts(data))  # read only where a line has spans
    pair_of = {int(row): pair for pair, row in enumerate(data.rows)}
    starts = response_starts(data)
    rewards = np.zeros(starts[-1], np.float32)
    line_of: dict[int, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row, sides = _line(line, number, f"{path} line {number}")
            if row in line_of:
                raise UserError(
                    f"{path} line {number}: row {row} has rewards already, on line {line_of[row]}; delete one line."
                )
            line_of[row] = number
            if (pair := pair_of.get(row)) is None:
                continue
            for side, given in enumerate(sides):
                where = f"{path} line {number}: the {_SIDES[side]} response of {data.name(pair)}"
                ids = data.sequence(pair, side)[data.prompt_lengths[pair] :]
                response = 2 * pair + side
                rewards[starts[response] : starts[response + 1]] = _of(
                    given, ids, tokenizer, texts, (pair, side), where
                )
    for row, pair in pair_of.items():
        if row not in line_of:
            raise UserError(f"{path}: no rewards for {data.name(pair)}; add a line for that row.")
    return rewards


def _line(line: bytes, number: int, where: str) -> tuple[int, tuple[Any, Any]]:
    """The row's number, and what the line gives for the chosen and for the rejected response: a list, or a number."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: not valid JSON.") from None
    if isinstance(content, dict) and "row" not in content and content.keys() >= set(_SCORES):
        return number, (content[_SCORES[0]], content[_SCORES[1]])
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in _SIDES):
        raise UserError(f"{where}: expected an object with row and the lists chosen and rejected.")
    if type(row := content.get("row")) is not int:
        raise UserError(f"{where}: 'row' must be the number of the pair's row in the data file.")
    return row, (content["chosen"], content["rejected"])


def _of(
    given: Any,
    ids: np.ndarray,
    tokenizer: Any,
    texts: Callable[[], list[TextPair]],
    response: tuple[int, int],
    where: str,
) -> np.ndarray:
    """Rewards of one response's tokens. [tokens]"""
    if not isinstance(given, list):
        _check_numbers([given], where)
        return np.append(np.zeros(len(ids) - 1, np.float32), np.float32(given))
    spans = [isinstance(entry, list) for entry in given]
    if any(spans) and not all(spans):
        raise UserError(f"{where}: give numbers, one for each token, or spans [start, end, number], not both.")
    if any(spans):
        if any(len(entry) != 3 for entry in given):
            raise UserError(f"{where}: a span is [first character, character after the last, number].")
        _check_numbers([number for _, _, number in given], where)
        pair, side = response
        text = texts()[pair]
        return _from_spans(given, ids, tokenizer, (text.chosen, text.rejected)[side], where)
    if not given:
        return np.zeros(len(ids), np.float32)
    _check_numbers(given, where)
    if len(given) != len(ids):
        raise UserError(f"{where} has {len(ids)} tokens, its end-of-turn token included, but {len(given)} rewards.")
    return np.asarray(given, dtype=np.float32)


_LARGEST = float(np.finfo(np.float32).max)


def _check_numbers(numbers: list[Any], where: str) -> None:
    for number in numbers:
        # The number is compared before it is converted, because an integer may be too large for any float.
        if type(number) not in (int, float) or not -_LARGEST <= number <= _LARGEST:
            raise UserError(f"{where} has a reward that is not a finite number ({str(number)[:20]}).")


def _from_spans(spans: list[Any], ids: np.ndarray, tokenizer: Any, response: str, where: str) -> np.ndarray:
    """Rewards of a response's tokens: the mean over the characters of each token. [tokens] fp32.

    Args:
        response: The text whose characters the spans count. The chat template may have removed blanks at its ends, or
            written a thinking block or a call of a tool beside it, whose tokens get 0.
    """
    of_character, given = np.zeros(len(response)), np.zeros(len(response), bool)
    for start, end, number in spans:
        if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(response):
            raise UserError(f"{where}: the span {start}–{end} is not within the response's {len(response)} characters.")
        if given[start:end].any():
            raise UserError(f"{where}: the span {start}–{end} overlaps another span.")
        of_character[start:end], given[start:end] = number, True
    learned: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    encoded = tokenizer(learned, add_special_tokens=False, return_offsets_mapping=True)
    text = response.strip()
    before, after = response.find(learned), learned.rfind(text) if text else -1
    if max(before, after) < 0 or encoded["input_ids"] != ids[: len(encoded["input_ids"])].tolist():
        raise UserError(
            f"{where}: tokenising its text again gives other tokens, so spans cannot be used; give one number for each "
            "token."
        )
    of_learned = np.zeros(len(learned))
    if before >= 0:
        of_learned[:] = of_character[before : before + len(learned)]
    else:
        first = response.find(text)
        of_learned[after : after + len(text)] = of_character[first : first + len(text)]
    rewards = np.zeros(len(ids), np.float32)
    for place, (start, end) in enumerate(encoded["offset_mapping"]):
        rewards[place] = of_learned[start:end].mean() if end > start else 0.0
    return rewards
