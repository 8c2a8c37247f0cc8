"""Read small files of text, JSON and YAML that others wrote: size, depth and numbers are bounded before they are used.

Every refusal is one sentence. Files are UTF-8, whatever the locale says.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tgdpo_megatron.errors import UserError

LIMIT = 16 * 2**20
"""Largest file, in bytes, where the reader says nothing else. The index of a model with 10^5 tensors has 10 MiB."""
YAML_LIMIT = 2**20
"""Largest YAML file, in bytes: it is read in Python, which takes seconds for this size."""
DEPTH = 100
"""Deepest nesting of lists and mappings. A thousand levels would exhaust Python's stack."""
VALUES = 100_000
"""Most values in a YAML file when every alias is written out. A few lines of aliases can stand for 10^9 values."""
DIGITS = 100
"""Longest integer. Tokenizers write 10^30 for 'no limit'; Python refuses to read some thousands of digits."""

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 200


def shown(value: Any) -> str:
    """A value as Python writes it, shortened to what fits into a sentence."""
    return _repr.repr(value)


def read_text(path: Path, *, what: str, limit: int = LIMIT) -> str:
    """The text of a file, with '\\n' at the end of lines and without a byte order mark.

    Args:
        what: What kind of file it is, for the sentence of a refusal.
        limit: Largest size, in bytes. No more than that is read.

    Raises:
        UserError: There is no such file, it cannot be read, is too large, or is not UTF-8.
    """
    if not path.is_file():
        raise UserError(f"{path}: is a folder, not a {what}." if path.is_dir() else f"{path}: no such {what}.")
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise UserError(f"{path}: has more than {limit:,} bytes, which is too much for a {what}.")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, *, what: str, limit: int = LIMIT, pairs: Callable[[Any], Any] | None = None) -> Any:
    """What a JSON file holds.

    Args:
        what, limit: As for :func:`read_text`.
        pairs: Makes an object of its names and values, as json.loads' `object_pairs_hook`.

    Raises:
        UserError: As for :func:`read_text`, or it is not JSON, nested too deeply, or has too long an integer.
    """
    return parse_json(read_text(path, what=what, limit=limit), where=str(path), pairs=pairs)


def read_json_lines(path: Path, *, what: str, limit: int = LIMIT) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and content of every line of a file of JSON lines that is not blank. One is in memory at a time.

    Args:
        what: As for :func:`read_text`.
        limit: Longest line, in bytes. No more than that is read.

    Raises:
        UserError: There is no such file, it cannot be read, or a line is too long, not UTF-8, or refused by parse_json.
    """
    if not path.is_file():
        raise UserError(f"{path}: is a folder, not a {what}." if path.is_dir() else f"{path}: no such {what}.")
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(limit + 1), b""), start=1):
                if len(line) > limit:
                    raise UserError(f"{path} line {number}: has more than {limit:,} bytes, too much for a {what}.")
                if line.strip():
                    yield number, parse_json(decoded(line, path, number), where=str(path), line=number)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None


def decoded(line: bytes, path: Path, number: int) -> str:
    """The text of a line, without its end.

    Raises:
        UserError: It is not UTF-8.
    """
    try:
        return line.rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} line {number}: byte {error.start} is not UTF-8 text.") from None


def parse_json(text: str, *, where: str, line: int = 1, pairs: Callable[[Any], Any] | None = None) -> Any:
    """What a JSON text holds.

    Args:
        where: Where the text is from, for the sentence of a refusal.
        line: Number of the text's first line there.
        pairs: As for :func:`read_json`.

    Raises:
        UserError: It is not JSON, nested too deeply, or has too long an integer.
    """

    def integer(digits: str) -> int:
        if len(digits) > DIGITS:
            raise UserError(_too_long(where, len(digits.lstrip("-"))))
        return int(digits)

    try:
        content = json.loads(text, parse_int=integer, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} line {line + error.lineno - 1}: not valid JSON ({error.msg}).") from None
    except RecursionError:
        raise UserError(_too_deep(where)) from None
    pending = [(content, 1)]
    while pending:
        value, depth = pending.pop()
        if depth > DEPTH:
            raise UserError(_too_deep(where))
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        pending += [(part, depth + 1) for part in inner if isinstance(part, (dict, list))]
    return content


def read_yaml(path: Path, *, what: str) -> Any:
    """What a YAML file holds.

    Args:
        what: As for :func:`read_text`.

    Raises:
        UserError: As for :func:`read_text`, or it is not YAML, or out of bounds.
    """
    try:
        return parse_yaml(read_text(path, what=what, limit=YAML_LIMIT), where=str(path))
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML{f' ({problem})' if problem else ''}.") from None


def parse_yaml(text: str, *, where: str) -> Any:
    """What a YAML text holds: plain values only. Dates stay text, because nothing here is a date.

    Args:
        where: Where the text is from, for the sentence of a refusal.

    Raises:
        yaml.YAMLError: It is not YAML, or asks for more than plain values.
        UserError: It is nested too deeply, its aliases stand for too many values, an integer is too long, or a key is
            there twice.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _check_nodes(root, where)
        return loader.construct_document(root)
    except RecursionError:
        raise UserError(_too_deep(where)) from None
    except ValueError as error:  # a tag such as !!int in front of what is none
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """YAML's safe loader without dates, of which it refuses those that no calendar has with an error of its own."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _check_nodes(root: yaml.Node, where: str) -> None:
    """Refuse what would be too much, before values are made of it. Aliases are followed; one may hold itself.

    Raises:
        UserError: As for :func:`parse_yaml`.
    """
    pending, values = [(root, 1)], 1
    while pending:
        node, depth = pending.pop()
        if depth > DEPTH:
            raise UserError(_too_deep(where))
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, where)
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        else:
            if node.tag == "tag:yaml.org,2002:int" and len(node.value) > DIGITS:
                raise UserError(_too_long(where, len(node.value)))
            continue
        values += len(inner)
        if values > VALUES:
            raise UserError(
                f"{where}: has more than {VALUES:,} values, with its aliases written out; this is too many."
            )
        pending += [(part, depth + 1) for part in inner]


def _check_keys(node: yaml.MappingNode, where: str) -> None:
    """Refuse a key that is there twice, of which YAML would take the last."""
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if (key.tag, key.value) in seen:
            raise UserError(f"{where} line {key.start_mark.line + 1}: '{key.value}' is there twice; keep one of them.")
        seen.add((key.tag, key.value))


def _too_deep(where: str) -> str:
    return f"{where}: lists or mappings are nested more than {DEPTH} deep."


def _too_long(where: str, digits: int) -> str:
    return f"{where}: holds an integer of {digits:,} digits; at most {DIGITS} are read."
