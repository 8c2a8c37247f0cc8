"""Contrastive prompts: what is put before a response, and that the response stays what it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.data.prepare import PreparedPairs, prepare_pairs
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.scores.contrastive import DEFAULT, ContrastivePrompts, contrastive_sequences, read_prompts
from tgdpo_megatron.scores.texts import read_texts

DIRECT = DEFAULT.with_name("direct.yaml")


@pytest.fixture
def prepare(tokenizer: Any, tmp_path: Path) -> Callable[..., PreparedPairs]:
    def run(source: Path, max_length: int = 256) -> PreparedPairs:
        return prepare_pairs(DataConfig(max_length=max_length), source, tokenizer, tmp_path / "prepared")

    return run


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("path", [None, DIRECT], ids=["refine", "direct"])
def test_the_prompts_that_come_along_are_good(path: Path | None) -> None:
    prompts = read_prompts(path)
    quotes = path is None
    assert ("{response}" in prompts.better) == ("{response}" in prompts.worse) == quotes


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("better: 'Do {instruction}'\n", "expected the two templates 'better' and 'worse', and nothing else"),
        ("- a\n- b\n", "expected the two templates"),
        ("better: 'Do it'\nworse: 'No {instruction}'\n", "'better' has no placeholder {instruction}; put it where"),
        (
            "better: '{instruction} {respons}'\nworse: 'No {instruction}'\n",
            "'better' has an unknown placeholder {respons}; known are {instruction} and {response}",
        ),
        ("better: 3\nworse: 'No {instruction}'\n", "'better' has no placeholder {instruction}"),
        ("better: '{instruction} {response}'\nworse: 'No {instruction}'\n", "one template quotes {response}"),
        ("better: '{instruction}'\nworse: '{instruction}'\n", "both templates are the same"),
        ("better: '{instruction}\nworse: [\n", "line 3: not valid YAML"),
        (b"better: \xff", "byte 8 is not UTF-8 text"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_meant_is_refused(content: str | bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        read_prompts(path)
    assert str(refused.value).startswith(str(path)) and words in str(refused.value)


def test_a_missing_file_of_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file of contrastive prompts"):
        read_prompts(tmp_path / "no.yaml")


def test_prompts_that_differ_in_one_letter_have_another_hash() -> None:
    hashes = {ContrastivePrompts(*both).hash for both in (("a", "b"), ("a", "c"), ("b", "a"), ("ab", ""), ("", "ab"))}
    assert len(hashes) == 5


def test_placeholders_in_a_text_are_text() -> None:
    prompts = ContrastivePrompts("Task: {instruction}\nDraft: {response}", "{response} {instruction}")
    said = prompts.turn("better", "Explain {response} and \\1", "It is {instruction}.")
    assert said == "Task: Explain {response} and \\1\nDraft: It is {instruction}."


# ---------------------------------------------------------------- the sequences


def test_response_ids_follow_the_prompt_unchanged(
    prepare: Callable[..., PreparedPairs], tokenizer: Any, pairs_file: Path
) -> None:
    data = prepare(pairs_file)
    pairs = [4, 1]
    texts = read_texts(data)
    made, keys, too_long = contrastive_sequences(
        data, pairs, [texts[pair] for pair in pairs], tokenizer, read_prompts(None), 1000
    )
    assert not too_long
    expected = [
        (data.hashes[pair].tobytes(), side, name) for pair in pairs for side in (0, 1) for name in ("better", "worse")
    ]
    assert keys == expected
    for sample, (pair_hash, side, _) in enumerate(expected):
        pair = next(pair for pair in pairs if data.hashes[pair].tobytes() == pair_hash)
        response = data.sequence(pair, side)[data.prompt_lengths[pair] :]
        assert made.sequence(sample, 0)[made.prompt_lengths[sample] :].tolist() == response.tolist()
        assert made.response_length(sample, 0) == data.response_length(pair, side) and made.response_length(sample, 1)


def test_a_sequence_that_is_too_long_shuts_out_both_prompts_of_its_response_alone(
    prepare: Callable[..., PreparedPairs], tokenizer: Any, pairs_file: Path
) -> None:
    """Scores under one prompt alone would be no reward."""
    data, prompts = prepare(pairs_file), ContrastivePrompts("{instruction}", "{instruction} " + "x" * 20)
    everything, _, _ = contrastive_sequences(data, [2], read_texts(data)[2:3], tokenizer, prompts, 1000)
    lengths = np.diff(everything.starts)[::2]  # better and worse of the chosen, then of the rejected response
    assert lengths[0] < lengths[1] < lengths[3], "Paris. is the shorter answer"
    for longest, left in [(lengths[3], 4), (lengths[3] - 1, 2), (lengths[1], 2), (lengths[1] - 1, 0)]:
        _, keys, too_long = contrastive_sequences(data, [2], read_texts(data)[2:3], tokenizer, prompts, int(longest))
        assert (len(keys), len(too_long)) == (left, 4 - left)
        assert {key.side for key in keys}.isdisjoint(key.side for key in too_long)


def test_a_prompt_that_was_cut_is_whole_under_the_contrastive_prompts(
    prepare: Callable[..., PreparedPairs], tokenizer: Any, write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    row = {"instruction": "First words. " + "again " * 30, "chosen": "Yes.", "rejected": "No."}
    data = prepare(write_pairs(tmp_path / "long.jsonl", [row]), max_length=24)
    assert data.summary.prompts_cut == 1
    made, _, _ = contrastive_sequences(data, [0], read_texts(data), tokenizer, read_prompts(DIRECT), 1000)
    assert "First words." in tokenizer.decode(made.sequence(0, 0))


def test_a_text_that_was_edited_after_tokenising_is_refused(
    prepare: Callable[..., PreparedPairs], tokenizer: Any, write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"instruction": "Say hello.", "chosen": "Hello!", "rejected": "No."}] * 2
    source = write_pairs(tmp_path / "pairs.jsonl", rows)
    data = prepare(source)
    for name in ("instruction", "chosen", "rejected"):
        write_pairs(source, [rows[0], rows[1] | {name: "Goodbye"}])
        with pytest.raises(UserError, match="row 2 of pairs.jsonl is not the text that was tokenised; prepare"):
            contrastive_sequences(data, [0, 1], read_texts(data), tokenizer, read_prompts(None), 1000)
    write_pairs(source, rows[:1])
    with pytest.raises(UserError, match="row 2 of pairs.jsonl is not the text"):
        read_texts(data)


def test_the_first_row_that_is_gone_is_missed_too(
    prepare: Callable[..., PreparedPairs], pairs_file: Path, tmp_path: Path
) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_text(pairs_file.read_text())
    data = prepare(source)
    source.write_text("\n" + source.read_text().split("\n", 1)[1])
    with pytest.raises(UserError, match="row 1 of pairs.jsonl is not the text"):
        read_texts(data)


def test_a_source_that_has_moved_is_asked_for(
    prepare: Callable[..., PreparedPairs], pairs_file: Path, tmp_path: Path
) -> None:
    source = tmp_path / "moved.jsonl"
    source.write_text(pairs_file.read_text())
    data = prepare(source)
    source.unlink()
    with pytest.raises(UserError, match=r"moved.jsonl: the pairs were tokenised from this data .* put it back"):
        read_texts(data)


def test_the_text_is_read_in_the_format_it_was_tokenised_from(
    tokenizer: Any, write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    """Both formats fit this row; the one that is recognised is not the one that was asked for."""
    row = {"prompt": "Say hello.", "instruction": "Say goodbye.", "chosen": "Hello!", "rejected": "Bye!"}
    source = write_pairs(tmp_path / "pairs.jsonl", [row])
    data = prepare_pairs(DataConfig(format="llama_factory"), source, tokenizer, tmp_path / "prepared")
    assert json.loads((tmp_path / "prepared" / "summary.json").read_text())["format"] == "llama_factory"
    assert read_texts(data)[0].messages[-1]["content"] == "Say goodbye."
