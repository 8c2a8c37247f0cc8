"""The kinds of values that a column can hold, and how they become texts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Turn = dict[str, Any]
"""A turn as chat templates take it: `role` (system, user, assistant or tool) and `content`, a text. An assistant's turn
may also have `reasoning_content`, a text, and `tool_calls`; a tool's turn `tool_call_id` and `name`."""
Answer = str | Turn
"""The assistant's turn that follows a prompt: its text, or the whole turn where it holds more than text."""
Row = Mapping[str, Any]


class Unusable(Exception):
    """The row is well formed but cannot be trained on. It is left out, and the reason is counted."""


class Malformed(Exception):
    """The row does not have the format. It is refused, with its name before the message."""


# ---------------------------------------------------------------- kinds


TURN_KEYS = (("role", "content"), ("from", "value"), ("from", "content"), ("role", "parts"))
"""Names that a turn gives to its speaker and its text."""


def turn_keys(value: Any) -> tuple[str, str] | None:
    """The names that a turn gives to its speaker and its text; None for what is no turn."""
    if not isinstance(value, dict):
        return None
    if "role" in value and value.get("tool_calls"):  # it may say nothing beside
        return TURN_KEYS[0]
    return next((keys for keys in TURN_KEYS if set(keys) <= value.keys()), None)


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and all(map(turn_keys, value))


def _is_list_of(item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(item, value))


def _has(**fields: str) -> Callable[[Any], bool]:
    """Whether a value is an object whose fields are of these kinds."""
    return lambda value: isinstance(value, dict) and all(KINDS[kind](value.get(name)) for name, kind in fields.items())


def _is_candidates(value: Any) -> bool:
    """Whether a value is turns of which the last holds two answers: Amazon Nova's."""
    if not (isinstance(value, list) and value and isinstance(value[-1], dict)):
        return False
    return _is_turns(value[:-1]) and _is_list_of(_has(preferenceLabel="string"))(value[-1].get("candidates"))


KINDS: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "turns": _is_turns,
    "turn": lambda value: turn_keys(value) is not None,
    "number": lambda value: number(value) is not None,
    "string or turns": lambda value: isinstance(value, str) or _is_turns(value),
    "string, turn or turns": lambda value: KINDS["string or turns"](value) or KINDS["turn"](value),
    "strings": _is_list_of(lambda item: isinstance(item, str)),
    "string or strings": lambda value: isinstance(value, str) or KINDS["strings"](value),
    "two strings": lambda value: KINDS["strings"](value) and len(value) == 2,
    "scores": _is_list_of(lambda item: item is None or number(item) is not None),
    "transcript": lambda value: isinstance(value, str) and value.startswith("\n\nHuman:"),
    "open transcript": lambda value: KINDS["transcript"](value) and value.rstrip().endswith("\n\nAssistant:"),
    "conversation": _has(messages="turns"),
    "ranked completions": _is_list_of(_has(rank="number", completion="string or turns")),
    "scored completions": _is_list_of(
        lambda item: _has(response="string")(item) and bool({"overall_score", "fine-grained_score"} & item.keys())
    ),
    "ranked answers": _is_list_of(_has(rank="number", answer="string")),
    "scored turns": _is_list_of(_has(score="number", completion="turn")),
    "summaries": _is_list_of(_has(text="string")),
    "turns that end in candidates": _is_candidates,
    "question": _has(full_text="string"),
    "post": lambda value: isinstance(value, dict) and bool({"post", "article"} & value.keys()),
}
"""Kinds of values by name. What an object must hold is said in docs/formats.md."""


def kind_of(value: Any) -> str:
    """The name of a value's kind, in error messages."""
    if value is None:
        return "null"
    return next((kind for kind in ("string", "turns", "turn") if KINDS[kind](value)), type(value).__name__)


def number(value: Any) -> float | None:
    """A number, or a text that is one, as a cell of a .csv file is; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


# ---------------------------------------------------------------- turns and texts


ROLES = {
    **{"system": "system", "user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant"},
}


def read_text(what: str, content: Any) -> str:
    """A turn's text: a string, or parts that are all text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise Malformed(f"{what} must be a string, found {kind_of(content)}")
    texts = [part.get("text") for part in content if part.get("type", "text" if "text" in part else None) == "text"]
    if len(texts) < len(content):
        raise Unusable("a turn holds more than text")
    return "".join(read_text(f"{what} part", piece) for piece in texts)


def split_transcript(text: str) -> list[Turn]:
    """The turns of a text in which each begins with a blank line and `Human:` or `Assistant:`."""
    parts = re.split(r"\n\n(Human|Assistant):", text)
    return [
        {"role": ROLES[speaker.lower()], "content": said.strip()}
        for speaker, said in zip(parts[1::2], parts[2::2], strict=True)
    ]


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of elements with which both begin. The last element of the shorter one never counts."""
    most = max(min(len(first), len(second)) - 1, 0)
    return next((index for index in range(most) if first[index] != second[index]), most)


def read_optional(row: Row, column: str) -> str:
    """The text of a column that may be missing."""
    found = row.get(column) or ""
    if not isinstance(found, str):
        raise Malformed(f"'{column}' must be a string, found {kind_of(found)}")
    return found
