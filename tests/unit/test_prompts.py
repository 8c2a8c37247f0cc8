"""Prompts of every kind of file: each once, as training renders them, with what names them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PAIRS
from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.data.prepare import prepare_pairs
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.sampling.prompts import encode_prompts, read_prompts

DATA = DataConfig()
USER = {"role": "user", "content": "Say hello."}
ASSISTANT = {"role": "assistant", "content": "Hello."}


def turns_of(path: Path, data: DataConfig = DATA) -> list[list[dict[str, Any]]]:
    return [list(text.messages) for text in read_prompts(path, data).asked]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "Say hello."}, [USER]),
        ({"prompt": [USER, ASSISTANT, USER]}, [USER, ASSISTANT, USER]),
        ({"messages": [USER]}, [USER]),
        ({"messages": [USER, ASSISTANT]}, [USER]),
        ({"conversations": [{"from": "human", "value": "Say hello."}, {"from": "gpt", "value": "Hello."}]}, [USER]),
        ({"instruction": "Say", "input": "hello.", "output": "Hello."}, [{"role": "user", "content": "Say\nhello."}]),
        ({"instruction": "Say hello.", "dataset": "koala"}, [USER]),
        ({"question": "Say hello.", "answer": "Hello."}, [USER]),
        ({"prompt": "Say hello.", "system": "Be brief."}, [{"role": "system", "content": "Be brief."}, USER]),
        ({"prompt": "Say hello.", "chosen": "Hello.", "rejected": "No."}, [USER]),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "No."}]}, [USER]),
        ({"uid": "7", "category": "coding", "prompt": "Say hello."}, [USER]),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_the_prompt_of_a_row_is_found(
    row: dict[str, Any], turns: list[Any], write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    assert turns_of(write_pairs(tmp_path / "prompts.jsonl", [row])) == [turns]


def test_a_text_file_has_a_prompt_in_each_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Say hello.\n\nWhat is a “tree”?\nSay hello.\n", encoding="utf-8")
    prompts = read_prompts(tmp_path / "prompts.txt", DATA)
    assert [text.messages[0]["content"] for text in prompts.asked] == ["Say hello.", "What is a “tree”?"]
    assert prompts.sources == {1: {"row": 1}, 3: {"row": 3}}
    assert prompts.left_out == {"the prompt was there before": [4]}


def test_a_prompt_is_asked_once_and_keeps_what_names_its_first_row(
    write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [
        {"prompt": "a", "question_id": 81, "category": "writing", "score": 0.5, "chosen": "x", "rejected": "y"},
        {"prompt": "b", "question_id": 82, "category": None, "chosen": "x", "rejected": "y"},
        {"prompt": "a", "question_id": 83, "category": "math", "chosen": "z", "rejected": "y"},
    ]
    prompts = read_prompts(write_pairs(tmp_path / "pairs.jsonl", rows), DATA)
    assert [text.row for text in prompts.asked] == [1, 2]
    assert prompts.sources[1] == {"row": 1, "question_id": 81, "category": "writing"}
    assert prompts.sources[2] == {"row": 2, "question_id": 82}
    assert prompts.left_out == {"the prompt was there before": [3]}


def test_a_column_is_named_as_in_training(write_pairs: Callable[..., Path], tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "prompts.jsonl", [{"task_text": "Say hello."}])
    with pytest.raises(UserError, match="no column holds a prompt.*the first row has task_text"):
        read_prompts(path, DATA)
    assert turns_of(path, DataConfig(columns={"prompt": "task_text"})) == [[USER]]


def test_prompts_are_encoded_as_training_encodes_them(tokenizer: Any, pairs_file: Path, tmp_path: Path) -> None:
    prepared = prepare_pairs(DATA, pairs_file, tokenizer, tmp_path / "prepared")
    found = encode_prompts(read_prompts(pairs_file, DATA), tokenizer, DATA, max_length=256)
    assert len(found) == len(prepared) == len(PAIRS)
    for pair, prompt in enumerate(found):
        expected = prepared.sequence(pair, 0)[: int(prepared.prompt_lengths[pair])]
        assert prompt.ids.tolist() == expected.tolist()
        assert prompt.written == PAIRS[pair]["instruction"]
        assert prompt.text.startswith("<|begin|><|user|>") and prompt.text.endswith("<|assistant|>\n")


def test_prompts_that_the_template_writes_alike_are_one_prompt(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Say hello.\nSay hello. \nWhy?\n  Say hello.\nWhy?\n")
    prompts = read_prompts(path, DATA)
    found = encode_prompts(prompts, tokenizer, DATA, max_length=256)
    assert [prompt.written for prompt in found] == ["Say hello.", "Why?"]
    assert prompts.left_out == {"the prompt was there before": [5, 2, 4]}


def test_a_prompt_of_several_turns_is_written_as_turns(
    tokenizer: Any, write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_pairs(tmp_path / "prompts.jsonl", [{"prompt": [USER, ASSISTANT, USER]}])
    (prompt,) = encode_prompts(read_prompts(path, DATA), tokenizer, DATA, max_length=256)
    assert prompt.written == [USER, ASSISTANT, USER]


def test_a_prompt_that_fills_the_model_is_refused_or_left_out(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("short\n" + "long " * 100 + "\n")
    with pytest.raises(UserError, match=r"prompts.txt row 2: the prompt has \d+ tokens, and the model takes 64 with"):
        encode_prompts(read_prompts(path, DATA), tokenizer, DATA, max_length=64)
    prompts = read_prompts(path, DATA)
    (kept,) = encode_prompts(prompts, tokenizer, DATA, max_length=64, max_prompt_tokens=32)
    assert kept.written == "short" and prompts.left_out == {"longer than 32 tokens": [2]}


def test_special_tokens_in_a_prompt_are_refused_dropped_or_kept_as_in_training(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("plain\na <|end|> in it\n")
    with pytest.raises(UserError, match=r"row 2: the prompt holds '<\|end\|>', a special token"):
        encode_prompts(read_prompts(path, DATA), tokenizer, DATA, max_length=64)
    for choice, left in {"drop": 1, "keep": 2}.items():
        data = DataConfig(special_tokens=choice)
        assert len(encode_prompts(read_prompts(path, data), tokenizer, data, max_length=64)) == left


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "holds no pairs"),
        (["a text"], "holds texts alone; give them as a .txt file, or as objects with the field 'prompt'."),
        ([7], "row 1: expected an object with named columns, found int."),
        ([{"prompt": "a"}, {"prompt": 7}], "row 2: 'prompt' must hold string or turns, found int; the data is read as"),
        ([{"prompt": "a"}, {"text": "b"}], "row 2: prompt missing; the row has text; the data is read as prompts"),
    ],
    ids=str,
)
def test_rows_without_a_prompt_are_refused(content: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=says.replace(".", r"\.")):
        read_prompts(path, DATA)
