"""Whether a chat template has a form for tools, for calls of tools, and for their results.

A template that has none does not say so: it leaves them out. So a conversation is rendered with other words in place of
the tools' names, the arguments and the results, words that occur nowhere else, and every one of them must come back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tgdpo_megatron.data.rendering import TemplateFailure, TemplateRefusal
from tgdpo_megatron.data.thinking import thought_of

Turns = Sequence[Mapping[str, Any]]
_NUMBER = 718_281_828
"""The first of the numbers that take the place of arguments that are numbers."""


class _Marked:
    """Words that take the place of others. Word -> what it stands for."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}

    def word(self, what: str) -> str:
        word = f"zq{len(self.words):05d}x"
        self.words[word] = what
        return word

    def argument(self, value: Any) -> Any:
        """An argument of a call, of the same kind. True, false and null stay."""
        if isinstance(value, Mapping):
            return {self.word(_CALLS): self.argument(inner) for inner in value.values()}
        if isinstance(value, list):
            return [self.argument(inner) for inner in value]
        if isinstance(value, str):
            return self.word(_CALLS)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            number = _NUMBER + len(self.words)
            self.words[str(number)] = _CALLS
            return number
        return value

    def tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        function = {**tool["function"], "name": self.word(_TOOLS)}
        if str(function.get("description", "")).strip():
            function["description"] = self.word(_TOOLS)
        return {**tool, "function": function}

    def turn(self, turn: Mapping[str, Any], *, is_answer: bool) -> dict[str, Any]:
        marked = dict(turn)
        if turn["role"] == "tool":
            marked["content"] = self.word(_RESULTS)
        if calls := turn.get("tool_calls"):
            if is_answer and turn["content"].strip() and thought_of(turn) is None:
                marked["content"] = self.word(_TEXT)
            marked["tool_calls"] = [
                {
                    **call,
                    "function": {
                        "name": self.word(_CALLS),
                        "arguments": self.argument(call["function"]["arguments"]),
                    },
                }
                for call in calls
            ]
        return marked


_TOOLS, _CALLS, _RESULTS = "tools", "calls of tools", "results of tools"
_TEXT = "an answer's text beside calls of tools"


def uses_tools(turns: Turns, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a conversation has tools, calls of tools or their results."""
    return bool(tools) or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns)


def check_forms(render: Callable[[Turns, Sequence[Mapping[str, Any]]], str], turns: Turns, tools: Turns) -> None:
    """Check that a template writes all of a conversation that has to do with tools.

    Args:
        render: Renders turns and tools.
        turns: A conversation that ends in an answer.

    Raises:
        TemplateRefusal: It leaves something out, or does not take the conversation.
    """
    marked = _Marked()
    others = [marked.tool(tool) for tool in tools]
    try:
        text = render([marked.turn(turn, is_answer=turn is turns[-1]) for turn in turns], others)
    except TemplateFailure as failure:
        raise TemplateRefusal(f"the chat template has no form for tools ({failure})") from failure
    for word, what in marked.words.items():
        if word not in text:
            raise TemplateRefusal(f"the chat template has no form for {what}")
