"""The file of sampled answers: every line stands for itself, is checked, and is in memory alone."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tgdpo_megatron.data.formats import read_pairs
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.sampling.answers import Answered, as_line, read_answers

LINE = Answered(
    prompt="Say “hello”.",
    format_prompt="<|begin|><|user|>\nSay “hello”.<|end|><|assistant|>\n",
    prompt_id="ab" * 32,
    all_generated_responses=["Hello\u2028there \N{GRINNING FACE}\n", ""],
    finish_reasons=["stop", "length"],
    num_tokens=[7, 1],
    seeds=[1, 2**31 - 1],
    model={"name": "runs/start-hf", "fingerprint": "cd" * 32},
    sampling={"engine": "transformers", "n": 2, "temperature": 0.8},
    source={"row": 3, "category": "greetings"},
)
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Also where files are joined, and where an answer holds what some programs take for the end of a line."""
    with_tools = replace(LINE, prompt=TURNS, tools=[{"type": "function", "function": {"name": "f"}}])
    (tmp_path / "answers.jsonl").write_bytes(as_line(LINE) + as_line(with_tools) + as_line(LINE))
    assert list(read_answers(tmp_path / "answers.jsonl")) == [LINE, with_tools, LINE]
    assert LINE.messages == [{"role": "user", "content": "Say “hello”."}] and with_tools.messages == TURNS
    assert b'"tools"' not in as_line(LINE)


def test_a_line_with_scores_is_a_pair_of_ours(tmp_path: Path) -> None:
    """SimPO's columns: its scripts, and ours, add `all_rm_scores` to them."""
    row = {**asdict(LINE), "all_generated_responses": ["Hello.", "No."], "all_rm_scores": [0.5, -1.5]}
    (tmp_path / "scored.json").write_text(json.dumps([row]))
    (pair,) = read_pairs(tmp_path / "scored.json").pairs
    assert (pair.chosen, pair.rejected) == ("Hello.", "No.")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda line: line.pop("seeds"), "line 2: no field 'seeds'; give a file that tools.sample wrote."),
        (lambda line: line.update(prompt=7), "line 2: 'prompt' must hold string or turns, found int."),
        (lambda line: line.update(num_tokens=[1, "2"]), "line 2: 'num_tokens' must hold whole numbers, found list."),
        (lambda line: line.update(num_tokens=[1, True]), "line 2: 'num_tokens' must hold whole numbers, found list."),
        (lambda line: line.update(model=None), "line 2: 'model' must hold object, found null."),
        (
            lambda line: line["finish_reasons"].append("stop"),
            "line 2: the answers and what is said of them differ in number (2 all_generated_responses, "
            "3 finish_reasons, 2 num_tokens, 2 seeds).",
        ),
        (
            lambda line: line.update(finish_reasons=["stop", "abort"]),
            "line 2: an answer finished by 'abort'; known are stop and length.",
        ),
    ],
)
def test_a_line_that_is_none_is_named(change: Callable[[Any], Any], says: str, tmp_path: Path) -> None:
    line = asdict(LINE)
    change(line)
    path = tmp_path / "answers.jsonl"
    path.write_bytes(as_line(LINE) + json.dumps(line).encode() + b"\n")
    with pytest.raises(UserError) as refused:
        list(read_answers(path))
    assert str(refused.value) == f"{path} {says}"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[1]\n", "line 1: expected an object with an answer's fields, found list."),
        (as_line(LINE)[:-20], "line 1: not valid JSON"),
        (as_line(LINE) + b"\xff\n", "line 2: byte 0 is not UTF-8 text."),
        (as_line(LINE) + b"[" * 500 + b"\n", "line 2: not valid JSON"),
        (as_line(LINE) + b"[" * 101 + b"]" * 101 + b"\n", "lists or mappings are nested more than 100 deep."),
        (b"1" * (16 * 2**20 + 1), "line 1: has more than 16,777,216 bytes, too much for a file of answers."),
    ],
    ids=lambda value: repr(value[-20:]) if isinstance(value, bytes) else "",
)
def test_a_damaged_file_is_refused_by_its_line(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        list(read_answers(path))
    assert str(refused.value).startswith(str(path)) and says in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file of answers"):
        list(read_answers(tmp_path / "answers.jsonl"))
    with pytest.raises(UserError, match="is a folder, not a file of answers"):
        list(read_answers(tmp_path))


def peak_of_reading(path: Path) -> int:
    """Most bytes that Python holds while a file is read through."""
    tracemalloc.start()
    for _ in read_answers(path):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    line = as_line(replace(LINE, all_generated_responses=["word " * 200, ""]))
    (tmp_path / "short.jsonl").write_bytes(line * 20)
    (tmp_path / "long.jsonl").write_bytes(line * 2000)
    short, long = (peak_of_reading(tmp_path / name) for name in ("short.jsonl", "long.jsonl"))
    assert long < short + 20_000 < len(line) * 2000 / 10
