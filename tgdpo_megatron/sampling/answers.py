"""The file of sampled answers: JSON lines, one for each prompt. Every line stands for itself: `cat` joins files.

A line keeps the columns that SimPO's scripts write (`prompt`, `format_prompt`, `all_generated_responses`), and adds
what it takes to sample the same answers again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tgdpo_megatron.bounded import read_json_lines
from tgdpo_megatron.data.formats.values import KINDS, Turn, kind_of
from tgdpo_megatron.errors import UserError

FINISHED = ("stop", "length")
"""How an answer ends: the model closed its turn, or the answer had no room left and is unfinished."""
WHAT = "file of answers"


@dataclass(frozen=True)
class Answered:
    """One prompt and its answers.

    Attributes:
        prompt: The text where the prompt is one turn of the user, else all turns before the answer.
        format_prompt: What the chat template made of it, which is what the model was given.
        prompt_id: SHA-256 of the prompt's token ids, as hex.
        all_generated_responses: The answers' texts, n of them. An answer may be empty.
        finish_reasons: For each answer one of FINISHED.
        num_tokens: Number of tokens of each answer. The token that closes the turn is one of them.
        seeds: The seed of each answer's noise.
        model: `name`, as the user gave it, and `fingerprint`, a hash of its files. Where a server answered, which does
            not tell, that is None, and `served` is what the server calls the model.
        sampling: `engine`, `n`, `seed`, `template` (a hash of the chat template), and the fields of engine.Sampling.
        source: `row`, the number of the input's row or line, those of its fields that name it, such as `id`, and where
            the prompts were answered in parts `shard`, such as 1/4.
        tools: What the model may call, as JSON schemas. The line has no such field where there are none.
    """

    prompt: str | list[Turn]
    format_prompt: str
    prompt_id: str
    all_generated_responses: list[str]
    finish_reasons: list[str]
    num_tokens: list[int]
    seeds: list[int]
    model: dict[str, Any]
    sampling: dict[str, Any]
    source: dict[str, Any]
    tools: list[dict[str, Any]] = field(default_factory=list)

    @property
    def messages(self) -> list[Turn]:
        """The turns before the answer."""
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt


def as_line(answered: Answered) -> bytes:
    """The line of a prompt, with its end."""
    content = asdict(answered)
    if not answered.tools:
        del content["tools"]
    text = json.dumps(content, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "replace")  # the source may hold half a character


def read_answers(path: Path) -> Iterator[Answered]:
    """The lines of a file, one after another; no more than one is in memory.

    Raises:
        UserError: There is no such file, or a line is damaged or lacks a field; file and line are named.
    """
    for number, content in read_json_lines(path, what=WHAT):
        yield from_json(content, where=f"{path} line {number}")


def from_json(content: Any, *, where: str) -> Answered:
    """What a line holds. Fields that are not known are left out, so that a file with more columns is read as well.

    Args:
        where: File and line, for the sentence of a refusal.

    Raises:
        UserError: A field is missing, or its value is not what it should be.
    """
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected an object with an answer's fields, found {kind_of(content)}.")
    content = whole_characters({"tools": [], **content})
    for name, kind in _KINDS.items():
        if name not in content:
            raise UserError(f"{where}: no field '{name}'; give a file that tools.sample wrote.")
        if not _is(kind, content[name]):
            raise UserError(f"{where}: '{name}' must hold {kind}, found {kind_of(content[name])}.")
    lengths = {name: len(content[name]) for name in _FOR_EACH_ANSWER}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise UserError(f"{where}: the answers and what is said of them differ in number ({counts}).")
    if unknown := sorted(set(content["finish_reasons"]) - set(FINISHED)):
        raise UserError(f"{where}: an answer finished by '{unknown[0]}'; known are {' and '.join(FINISHED)}.")
    return Answered(**{name: content[name] for name in _KINDS})


def whole_characters(content: dict[str, Any]) -> dict[str, Any]:
    """The same with a question mark in place of each half of a character, which JSON can hold and UTF-8 cannot."""
    text = json.dumps(content, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        whole: dict[str, Any] = json.loads(text.encode("utf-8", "replace"))
        return whole
    return content


_FOR_EACH_ANSWER = ("all_generated_responses", "finish_reasons", "num_tokens", "seeds")
_KINDS = {
    "prompt": "string or turns",
    "format_prompt": "string",
    "prompt_id": "string",
    "all_generated_responses": "strings",
    "finish_reasons": "strings",
    "num_tokens": "whole numbers",
    "seeds": "whole numbers",
    "model": "object",
    "sampling": "object",
    "source": "object",
    "tools": "objects",
}
"""Field -> kind of its value."""


def _is(kind: str, value: Any) -> bool:
    if kind == "object":
        return isinstance(value, dict)
    if kind == "objects":
        return isinstance(value, list) and all(isinstance(item, dict) for item in value)
    if kind == "whole numbers":
        return isinstance(value, list) and all(type(item) is int for item in value)
    return KINDS[kind](value)
