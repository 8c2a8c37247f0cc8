"""Apply changes from a file or the command line to a configuration, and refuse what cannot be set."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from tgdpo_megatron.bounded import shown
from tgdpo_megatron.config.foreign_names import Foreign, foreign_name
from tgdpo_megatron.config.settings import Config
from tgdpo_megatron.errors import UserError

COMMAND_LINE = "command line"
"""How errors call settings that were given as key=value."""


def load(base: Config, changes: Mapping[str, Any], *, where: str) -> Config:
    """Return a copy of `base` with `changes` applied and checked.

    Args:
        base: A complete configuration, usually a recipe's.
        changes: Nested groups of values, as read from YAML.
        where: Where the changes come from, for error messages: a file, or COMMAND_LINE.

    Raises:
        UserError: An unknown key (ours is named for another program's, else the nearest), a wrong type, or a value out
            of range.
    """
    merged = base.model_dump()
    _overlay(merged, changes, Config, prefix="", where=where)
    for group, one, other in ALTERNATIVES:
        given = changes.get(group) or {}
        if given.get(one) is not None and given.get(other) is None:
            merged[group][other] = None
        elif given.get(other) is not None and given.get(one) is None:
            merged[group][one] = None
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        found = max(error.errors(), key=lambda one: len(one["loc"]))  # of a list, the value within it
        key = ".".join(str(part) for part in found["loc"] if not _KIND.match(str(part)))
        raise UserError(f"{where}: {key}={_value(found['input'])} is refused: {_reason(found)}.") from None


_KIND = re.compile(r"(lax-or-strict|list)?\[")
"""What pydantic puts into a place where a value may be of several kinds."""


ALTERNATIVES = (
    ("train", "train_iters", "num_epochs"),
    ("optimizer", "lr_warmup_iters", "lr_warmup_fraction"),
)
"""Two settings of a group that say the same in two ways. The one that is set later holds."""


def _reason(error: Any) -> str:
    """What pydantic says of a value, in plain words where it is one of the common mistakes."""
    if words := _WORDS.get(error["type"]) or _WORDS.get(error["type"].partition("_")[0]):
        return words.format(**error.get("ctx", {}))
    text: str = error["msg"].removeprefix("Value error, ")
    return text[0].lower() + text[1:]


_WORDS = {
    "int": "it should be a whole number",
    "float": "it should be a number",
    "finite_number": "it should be a finite number",
    "bool": "it should be true or false",
    "literal_error": "it should be {expected}",
    "greater_than": "it should be more than {gt:.12g}",
    "greater_than_equal": "it should be at least {ge:.12g}",
    "less_than": "it should be less than {lt:.12g}",
    "less_than_equal": "it should be at most {le:.12g}",
    "path": "it should be a path; one that looks like a number or a list is written in quotes",
    "string_type": "it should be a text; one that looks like a number, or yes or no, is written in quotes",
    "string_too_short": "it should not be empty",
    "string_unicode": "it should be text in UTF-8",
    "list": "it should be a list, such as [1, 2]",
    "dict": "it should be a mapping, such as {{prompt: question}}",
    "invalid-json-value": "it should be a text, a number, true, false, null, or a list of these",
}
"""Kind of a mistake, or its first word, as pydantic calls it -> what is said of it."""


def _value(value: Any) -> str:
    """A value in an error, as YAML has it where Python has another word."""
    return json.dumps(value) if value is None or isinstance(value, bool) else shown(value)


RENAMED = {"data.layout": "data.format"}
"""Old name of a setting -> its new name. The old name is still accepted, with a message that it is old."""


def _overlay(
    target: dict[str, Any], changes: Mapping[str, Any], group: type[BaseModel], prefix: str, where: str
) -> None:
    for name, value in changes.items():
        key = f"{prefix}{name}"
        if key in RENAMED:
            print(f"{where}: {key} is now called {RENAMED[key]}; the old name still works.", file=sys.stderr)
            key = RENAMED[key]
            name = key.rpartition(".")[2]
        inner: Any = group.model_fields[name].annotation if name in group.model_fields else None
        is_group = isinstance(inner, type) and issubclass(inner, BaseModel)
        misplaced = is_group != isinstance(value, Mapping) and get_origin(inner) is not dict
        if (inner is None or misplaced) and (said := _foreign(key, value, where)):
            others = "" if where == COMMAND_LINE else "; docs/coming-from.md has the others"
            raise UserError(f"{where}: {said}{others}.")
        if inner is None:
            raise UserError(f"{where}: unknown key '{key}'{_nearest(str(name), prefix, group)}.")
        if is_group:
            if not isinstance(value, Mapping):
                raise UserError(f"{where}: '{key}' is a group of settings, not {shown(value)}; write {key}.NAME=VALUE.")
            _overlay(target[name], value, inner, prefix=f"{key}.", where=where)
        elif isinstance(value, bool) and inner not in (bool, bool | None):
            raise UserError(f"{where}: {key}={_value(value)} is refused: it should not be true or false.")
        else:
            target[name] = value


def _foreign(key: str, value: Any, where: str) -> str | None:
    """What is said of a key that is another program's, or that holds one; None where there is none.

    A name of ours without its group is left to _nearest, unless it means something else there.
    """
    for path, inner in _leaves(key, value):
        group, _, name = path.rpartition(".")
        at_home = not group or group in Config.model_fields
        found = foreign_name(path) or (foreign_name(name) if at_home else None)
        if found is not None and (found.difference or not (at_home and name in _elsewhere())):
            return found.sentence(path, _example(found, inner, where))
    return None


def explain_option(option: str, value: str) -> str | None:
    """What is said of an option such as `--learning_rate` that is no option here but a setting; None for any other.

    Args:
        option: The option as it was given, with its dashes.
        value: What followed it; empty where nothing did.
    """
    if (found := foreign_name(option)) is not None:
        return found.sentence(option, _example(found, value, COMMAND_LINE))
    name = option.lstrip("-").replace("-", "_")
    group, _, inner = name.rpartition(".")
    if group in Config.model_fields and inner in _fields(Config.model_fields[group].annotation):
        ours = name
    else:
        ours = _elsewhere().get(name, "")
    return f"'{option}': a setting is written without dashes: write {ours}={value or '…'}" if ours else None


def _example(found: Foreign, value: Any, where: str) -> str:
    """How our setting is written at the same place, with the value only where it means the same."""
    same = not found.difference and value not in ("", None) and not isinstance(value, (Mapping, list))
    shown = (str(value).lower() if isinstance(value, bool) else str(value)) if same else "…"
    if where == COMMAND_LINE:
        return f"{found.ours}={shown}"
    group, _, name = (found.ours or "").partition(".")
    return f"'{group}: {{{name}: {shown}}}'"


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every value within a value, with its path."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key, value


def _nearest(name: str, prefix: str, group: type[BaseModel]) -> str:
    """A hint: the same name in another group, else the most similar name in this group, else in another group."""
    elsewhere = _elsewhere()
    if not prefix and name in elsewhere.values():  # in a YAML file
        return f"; write '{name.replace('.', ': {', 1)}: …}}'"
    if name in elsewhere:
        return f"; did you mean '{elsewhere[name]}'"
    if close := difflib.get_close_matches(name, group.model_fields, n=1, cutoff=0.5):
        return f"; did you mean '{prefix}{close[0]}'"
    if close := difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.7):
        return f"; did you mean '{elsewhere[close[0]]}'"
    return f"; known here: {', '.join(prefix + field for field in group.model_fields)}"


def _elsewhere() -> dict[str, str]:
    """Name of a setting -> the same with its group."""
    return {
        field: f"{group}.{field}"
        for group, description in Config.model_fields.items()
        for field in _fields(description.annotation)
    }


def _fields(annotation: Any) -> Iterable[str]:
    return annotation.model_fields if isinstance(annotation, type) and issubclass(annotation, BaseModel) else ()
