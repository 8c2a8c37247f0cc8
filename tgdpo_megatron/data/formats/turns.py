"""Turns and answers as chat templates take them, from the ways in which people write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tgdpo_megatron.data.formats.tools import CALL_ROLES, RESULT_ROLES, read_calls, read_result, written_calls
from tgdpo_megatron.data.formats.values import (
    ROLES,
    TURN_KEYS,
    Answer,
    Malformed,
    Row,
    Turn,
    Unusable,
    read_text,
    turn_keys,
)

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names that a turn gives to what the model thought before it answered; templates take the first."""


def read_turns(column: str, values: Sequence[Any]) -> list[Turn]:
    """Turns as chat templates take them. Turns that each hold one call and follow each other become one turn.

    Raises:
        Malformed: A role that is not known, or a text that is none.
        Unusable: A turn that holds more than text, or a call in a form that is not known.
    """
    turns: list[Turn] = []
    called = False
    for value in values:
        turn, calls = _turn(column, value), _role(value) in CALL_ROLES
        if calls and called:
            turns[-1]["tool_calls"] += turn["tool_calls"]
        else:
            turns.append(turn)
        called = calls
    return turns


def _role(value: Row) -> Any:
    return value[(turn_keys(value) or TURN_KEYS[0])[0]]


def _turn(column: str, value: Row) -> Turn:
    role_key, text_key = turn_keys(value) or TURN_KEYS[0]
    role, content = value[role_key], value.get(text_key)
    what = f"'{column}' has a turn whose {text_key}"
    if role in CALL_ROLES:
        return {"role": "assistant", "content": "", "tool_calls": written_calls(content)}
    if role in RESULT_ROLES:
        named = {key: value[key] for key in ("tool_call_id", "name") if isinstance(value.get(key), str)}
        return {"role": "tool", "content": read_text(what, read_result(content)), **named}
    if not isinstance(role, str) or role not in ROLES:
        raise Malformed(f"'{column}' has a turn of {role_key} {role!r}; known are {', '.join(ROLES)}")
    calls = read_calls(value)
    turn: Turn = {"role": ROLES[role], "content": read_text(what, "" if content is None and calls else content)}
    if turn["role"] != "assistant":
        if calls:
            raise Unusable("a turn that is not the assistant's calls a tool")
        return turn
    if reasoning := next((value[key] for key in REASONING if isinstance(value.get(key), str)), ""):
        turn["reasoning_content"] = reasoning
    if calls:
        turn["tool_calls"] = calls
    return turn


def read_prompt(column: str, value: Any) -> list[Turn]:
    """The turns before the answers: a string is one user turn."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else read_turns(column, value)


def read_answer(column: str, value: Any, prompt: list[Turn]) -> Answer:
    """An answer: a string, a turn, or turns that may repeat the prompt."""
    if isinstance(value, str):
        return value
    found = read_turns(column, value if isinstance(value, list) else [value])
    return only_answer(found[len(prompt) :] if found[: len(prompt)] == prompt else found)


def only_answer(turns: list[Turn]) -> Answer:
    """The one assistant turn that there is."""
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise Unusable("an answer is not one assistant turn after the shared prompt")
    (turn,) = turns
    return turn["content"] if turn.keys() == {"role", "content"} else turn
