"""Thinking blocks: what a model writes between `<think>` and `</think>` before it answers.

Many templates drop the block from an answer that they render, because they render earlier answers so, or write its
start into the prompt. What is trained on must be what the model saw and wrote itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

OPEN, CLOSE = "<think>", "</think>"
MARKS = (OPEN, CLOSE)
"""They belong to an answer. Where a tokenizer counts them as special tokens, they still are no marks of turns."""
_LEFT_OPEN = re.compile(rf"{OPEN}\s*$")
_EMPTY = re.compile(rf"({OPEN}\s*)?{CLOSE}\s*$")
_CLOSED = re.compile(rf"{CLOSE}\s*$")


def thought_of(answer: Mapping[str, Any]) -> str | None:
    """What the model thought before an answer, without blanks at its ends; None where the answer has no such block."""
    if reasoning := str(answer.get("reasoning_content", "")).strip():
        return reasoning
    before, closed, _ = answer["content"].partition(CLOSE)
    return before.rpartition(OPEN)[2].strip() if closed else None


def opened(prompt: str) -> str:
    """The open block at the end of a prompt, such as `<think>` and a newline; empty where there is none."""
    found = _LEFT_OPEN.search(prompt)
    return found[0] if found else ""


def is_closed(prompt: str) -> bool:
    """Whether a prompt ends with a closed block, which tells the model not to think."""
    return _CLOSED.search(prompt) is not None


def without_block(text: str) -> str:
    """A text without an open, closed or empty block at its end, and without blanks there."""
    return _LEFT_OPEN.sub("", _EMPTY.sub("", text)).rstrip()


def keeps(said: str, prompt: str, answer: Mapping[str, Any]) -> bool:
    """Whether a template kept the block of an answer, if it has one; blanks do not count.

    Args:
        said: What the template wrote after the prompt.
    """
    thought = thought_of(answer)
    if thought is None:
        return True
    shown = CLOSE in said or is_closed(prompt) or bool(answer.get("reasoning_content"))
    return shown and " ".join(thought.split()) in " ".join(said.split())


def as_written(prompt: str, answer: Mapping[str, Any]) -> str:
    """An answer with its block as the model writes it after a prompt, which may have opened the block."""
    start = opened(prompt)
    if reasoning := answer.get("reasoning_content"):
        return f"{reasoning.strip()}\n{CLOSE}\n\n{answer['content'].lstrip()}"
    content: str = answer["content"]
    if not start or not content.lstrip().startswith(OPEN):
        return content
    rest = content.lstrip().removeprefix(OPEN)
    return rest.lstrip("\n") if start.endswith("\n") else rest
