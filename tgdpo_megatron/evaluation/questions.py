"""The questions of three public benchmarks, read from the files that they publish. The user brings the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgdpo_megatron.bounded import parse_json, read_text
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.report.words import plural

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: What the benchmark knows it by; its number in the file, from 1, where the benchmark gives none.
        turns: What the user says: one text, or two, the second after the model's first answer.
        row: The question as the file has it.
    """

    id: int | str
    turns: tuple[str, ...]
    category: str
    row: Row


class _Wrong(Exception):
    """A question is not of the benchmark's form; the message is a clause."""


def read_questions(benchmark: str, path: Path) -> list[Question]:
    """All questions of a file of JSON lines, or of a JSON list.

    Args:
        benchmark: A name in READERS.

    Raises:
        UserError: The file cannot be read or holds no question; a question lacks something, has another number of
            turns, or has an id that another one has.
    """
    questions: list[Question] = []
    places: dict[int | str, str] = {}
    for number, place, row in _rows(path):
        try:
            if not isinstance(row, dict):
                raise _Wrong(f"expected an object, found {type(row).__name__}")
            question = READERS[benchmark](number, row)
        except _Wrong as wrong:
            raise UserError(
                f"{path} {place}: {wrong}; give the questions of {benchmark} as they are published."
            ) from None
        if question.id in places:
            raise UserError(
                f"{path} {place}: has the id {question.id} of {places[question.id]}; give each question its own."
            )
        places[question.id] = place
        questions.append(question)
    if not questions:
        raise UserError(f"{path}: holds no questions.")
    return questions


def _rows(path: Path) -> list[tuple[int, str, Any]]:
    """Number, place in words, and content of every row."""
    text = read_text(path, what="file of questions")
    if text.lstrip().startswith("["):
        return [(number, f"row {number}", row) for number, row in enumerate(parse_json(text, where=str(path)), 1)]
    lines = [(f"line {line}", content) for line, content in enumerate(text.split("\n"), 1) if content.strip()]
    return [
        (number, place, parse_json(content, where=f"{path} {place}"))
        for number, (place, content) in enumerate(lines, 1)
    ]


def _mt_bench(_: int, row: Row) -> Question:
    turns = row.get("turns")
    if not isinstance(turns, list) or len(turns) != 2:
        found = plural(len(turns), "turn") if isinstance(turns, list) else "no turns"
        raise _Wrong(f"the question has {found}, and MT-Bench's have two")
    texts = tuple(_text({"a turn": turn}, "a turn") for turn in turns)
    return Question(_id(row, "question_id"), texts, _text(row, "category"), row)


def _alpaca_eval(number: int, row: Row) -> Question:
    return Question(number, (_text(row, "instruction"),), str(row.get("dataset", "")), row)


def _arena_hard(_: int, row: Row) -> Question:
    category = row.get("category")
    category = category if isinstance(category, str) else ""
    if "uid" in row:
        return Question(_id(row, "uid"), (_text(row, "prompt"),), category, row)
    turns = row.get("turns")
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], dict):
        raise _Wrong("the question has neither a uid and a prompt nor a question_id and one turn")
    return Question(_id(row, "question_id"), (_text(turns[0], "content"),), category, row)


READERS: dict[str, Callable[[int, Row], Question]] = {
    "mt-bench": _mt_bench,
    "alpaca-eval": _alpaca_eval,
    "arena-hard": _arena_hard,
}
"""Benchmark -> what makes a question of a row and its number."""


def _id(row: Row, name: str) -> int | str:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise _Wrong(f"the question has no {name}")
    return value


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise _Wrong(f"{name} is no text")
    return value
