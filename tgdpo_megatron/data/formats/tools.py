"""Tools, calls of tools and their results, in the forms that people have, as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tgdpo_megatron.data.formats.values import Unusable

CALL_ROLES = ("function_call", "tool_call")
"""Roles of turns whose text is a call, or several, written as JSON: LLaMA-Factory's and ms-swift's."""
RESULT_ROLES = ("tool", "function", "observation", "ipython", "tool_response")
_UNKNOWN_CALL = "a turn calls a tool in a form that is not known"
_UNKNOWN_TOOLS = "tools belong to the row, in a form that is not known"


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Tools as JSON schemas, `{"type": "function", "function": {"name": ...}}`; none where the value is empty.

    Raises:
        Unusable: They are written in another way.
    """
    found = _from_json(value, _UNKNOWN_TOOLS)
    tools = [_from_json(tool, _UNKNOWN_TOOLS) for tool in (found if isinstance(found, list) else [found])]
    return tuple(_tool(tool) for tool in tools if tool)


def _tool(value: Any) -> dict[str, Any]:
    tool = without_nulls(value)
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable(_UNKNOWN_TOOLS)
    return {**({} if function is tool else tool), "type": "function", "function": function}


def read_calls(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls of an assistant's turn: `tool_calls`, or one `function_call` as OpenAI had it first.

    Raises:
        Unusable: They are written in another way.
    """
    calls = _from_json(turn.get("tool_calls"), _UNKNOWN_CALL)
    if not calls and (single := turn.get("function_call")):
        calls = [single]
    if not isinstance(calls or [], list):
        raise Unusable(_UNKNOWN_CALL)
    return [_call(call) for call in (calls or []) if call]


def written_calls(text: Any) -> list[dict[str, Any]]:
    """The calls of a turn whose text is one call or a list of calls.

    Raises:
        Unusable: It is not.
    """
    found = _from_json(text, _UNKNOWN_CALL)
    calls = [_call(_from_json(call, _UNKNOWN_CALL)) for call in (found if isinstance(found, list) else [found])]
    if not calls:
        raise Unusable(_UNKNOWN_CALL)
    return calls


def _call(value: Any) -> dict[str, Any]:
    """A call whose arguments are an object, as templates take them. Text that holds an object is read."""
    call = without_nulls(value)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable(_UNKNOWN_CALL)
    arguments = _from_json(function.get("arguments", function.get("parameters", {})), _UNKNOWN_CALL) or {}
    if not isinstance(arguments, dict):
        raise Unusable(_UNKNOWN_CALL)
    kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def read_result(content: Any) -> Any:
    """The content of a tool's turn: text as it is, and any other value as JSON."""
    if isinstance(content, str) or (isinstance(content, list) and all(isinstance(part, dict) for part in content)):
        return content
    return json.dumps(without_nulls(content), ensure_ascii=False)


def without_nulls(value: Any) -> Any:
    """A value without the fields that are null: a table gives every object the fields of all others."""
    if isinstance(value, Mapping):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _from_json(value: Any, unknown: str) -> Any:
    """A value, or what it holds as JSON where it is text; empty text is nothing."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise Unusable(unknown) from None


def strings_of(value: Any) -> list[str]:
    """All text in tools or calls, the names of fields included."""
    if isinstance(value, Mapping):
        return [text for name, inner in value.items() for text in (str(name), *strings_of(inner))]
    if isinstance(value, (list, tuple)):
        return [text for inner in value for text in strings_of(inner)]
    return [value] if isinstance(value, str) else []
