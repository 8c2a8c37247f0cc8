"""Pickles read as data: a pickle that comes with a checkpoint can name and call things, and nothing of it is done.

torch writes a checkpoint's index, and the head of each tensor, as a pickle. Python's reader of pickles imports what one
names and calls what one calls. This reader has the instructions alone that such files are written with, and each makes
a number, a text, a container, or a record of what was asked for. So no file can make it run code, take memory that is
not in proportion to the file's size, or recurse.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_INSTRUCTIONS = 30_000_000
"""More than the longest index has that is written; see MAX_BLOCKS in index.py. A reader needs some seconds for as many,
and 2.6 GB for the worst of them."""
_LARGEST_KEY = 2**31
_GETATTR = ("builtins", "getattr"), ("__builtin__", "getattr")
"""The function's names, of which protocol 2 writes the second."""


class Name(NamedTuple):
    """A class or a function that a pickle names. Nobody looks it up."""

    module: str
    name: str


class Made:
    """What a pickle says how to make: of which class or by which function, from which arguments, with which state."""

    __slots__ = ("arguments", "of", "state")

    def __init__(self, of: Name, arguments: tuple[Any, ...]) -> None:
        self.of, self.arguments = of, arguments
        self.state: Any = None

    def is_a(self, name: str) -> bool:
        """Whether it is of a class or function of that name, whatever module that came from."""
        return self.of.name == name


class Outside(NamedTuple):
    """What a pickle refers to, but does not contain: a tensor's numbers, which lie in a file of their own."""

    reference: Any


def read_pickle(content: bytes) -> Any:
    """The data of a pickle: None, bool, int, float, str, list (for sets too), tuple, dict, Name, Made and Outside.

    Containers may hold themselves, and share parts; who walks through them has to bound how far.

    Raises:
        ValueError: Damaged, too long, or with an instruction that no file of torch's has.
    """
    try:
        return _Reader(content).read()
    except LookupError as error:  # of an empty stack, of an empty place of the memo
        raise ValueError("the pickle is damaged") from error


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        """The stacks below each mark."""
        self.memo: dict[int, Any] = {}

    def read(self) -> Any:
        instructions = _INSTRUCTIONS
        for _ in range(MAX_INSTRUCTIONS):
            (code,) = self.bytes(1)
            if code == _STOP:
                return self.stack.pop()
            if code not in instructions:
                raise ValueError(
                    f"the pickle has an instruction, {bytes([code])!r}, that no checkpoint is written with"
                )
            instructions[code](self)
        raise ValueError(f"the pickle has more than {MAX_INSTRUCTIONS:,} instructions")

    def number(self, form: str) -> Any:
        """A number in struct's form, from the file."""
        (found,) = struct.unpack(form, self.bytes(struct.calcsize(form)))
        return found

    def bytes(self, length: int) -> bytes:
        if length > len(self.content) - self.place:
            raise ValueError("the pickle ends too early")
        self.place += length
        return self.content[self.place - length : self.place]

    def line(self) -> str:
        end = self.content.find(b"\n", self.place)
        length = end - self.place if end >= 0 else len(self.content)
        return self.bytes(length + 1)[:-1].decode()

    def since_mark(self) -> list[Any]:
        found, self.stack = self.stack, self.outer.pop()
        return found

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"the pickle treats a {type(self.stack[-1]).__name__} as a {kind.__name__}")
        return self.stack[-1]

    def pop(self, kind: type) -> Any:
        self.top(kind)
        return self.stack.pop()

    def proto(self) -> None:
        if not 2 <= (version := self.number("<B")) <= 5:
            raise ValueError(f"the pickle has protocol {version}")

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def long(self) -> None:
        self.stack.append(int.from_bytes(self.bytes(self.number("<B")), "little", signed=True))

    def tuple_of(self, length: int) -> None:
        if len(self.stack) < length:
            raise ValueError("the pickle makes a tuple of more than there is")
        self.stack[-length:] = [tuple(self.stack[-length:])]

    def tuple_since_mark(self) -> None:
        items = self.since_mark()
        self.stack.append(tuple(items))

    def append(self) -> None:
        item = self.stack.pop()
        self.top(list).append(item)

    def extend(self) -> None:
        items = self.since_mark()
        self.top(list).extend(items)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.put(key, value)

    def set_items(self) -> None:
        items = self.since_mark()
        if len(items) % 2:
            raise ValueError("the pickle has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.put(key, value)

    def put(self, key: Any, value: Any) -> None:
        """Set an item. A key is one whose hash needs no recursion, and cannot be chosen to collide with many others."""
        if not (isinstance(key, str | Made) or (isinstance(key, int) and abs(key) < _LARGEST_KEY)):
            raise ValueError(f"the pickle has a {type(key).__name__} as a key")
        self.top(dict)[key] = value

    def keep(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def name(self) -> None:
        name, module = self.pop(str), self.pop(str)
        self.stack.append(Name(module, name))

    def name_in_lines(self) -> None:
        module, name = self.line(), self.line()
        self.stack.append(Name(module, name))

    def make(self) -> None:
        arguments, of = self.pop(tuple), self.pop(Name)
        if of in _GETATTR and len(arguments) == 2 and isinstance(arguments[0], Name):
            # So Python 3.11.0 to 3.11.3 write a member of an enum: with its name, where others write its value.
            of, arguments = arguments[0], arguments[1:]
        self.stack.append(Made(of, arguments))

    def build(self) -> None:
        state = self.stack.pop()
        self.top(Made).state = state


def _push(read: Callable[[_Reader], Any]) -> Callable[[_Reader], None]:
    return lambda reader: reader.stack.append(read(reader))


def _text(form: str) -> Callable[[_Reader], None]:
    return _push(lambda reader: reader.bytes(reader.number(form)).decode())


_STOP = pickle.STOP[0]
_INSTRUCTIONS: dict[int, Callable[[_Reader], None]] = {
    code[0]: instruction
    for code, instruction in {
        pickle.PROTO: _Reader.proto,
        pickle.FRAME: lambda reader: reader.number("<Q"),
        pickle.MARK: _Reader.mark,
        pickle.NONE: _push(lambda _: None),
        pickle.NEWTRUE: _push(lambda _: True),
        pickle.NEWFALSE: _push(lambda _: False),
        pickle.BININT: _push(lambda reader: reader.number("<i")),
        pickle.BININT1: _push(lambda reader: reader.number("<B")),
        pickle.BININT2: _push(lambda reader: reader.number("<H")),
        pickle.LONG1: _Reader.long,
        pickle.BINFLOAT: _push(lambda reader: reader.number(">d")),
        pickle.SHORT_BINUNICODE: _text("<B"),
        pickle.BINUNICODE: _text("<I"),
        pickle.EMPTY_LIST: _push(lambda _: []),
        pickle.EMPTY_SET: _push(lambda _: []),
        pickle.EMPTY_DICT: _push(lambda _: {}),
        pickle.EMPTY_TUPLE: _push(lambda _: ()),
        pickle.TUPLE1: lambda reader: reader.tuple_of(1),
        pickle.TUPLE2: lambda reader: reader.tuple_of(2),
        pickle.TUPLE3: lambda reader: reader.tuple_of(3),
        pickle.TUPLE: _Reader.tuple_since_mark,
        pickle.APPEND: _Reader.append,
        pickle.APPENDS: _Reader.extend,
        pickle.ADDITEMS: _Reader.extend,
        pickle.SETITEM: _Reader.set_item,
        pickle.SETITEMS: _Reader.set_items,
        pickle.MEMOIZE: lambda reader: reader.keep(len(reader.memo)),
        pickle.BINPUT: lambda reader: reader.keep(reader.number("<B")),
        pickle.LONG_BINPUT: lambda reader: reader.keep(reader.number("<I")),
        pickle.BINGET: _push(lambda reader: reader.memo[reader.number("<B")]),
        pickle.LONG_BINGET: _push(lambda reader: reader.memo[reader.number("<I")]),
        pickle.GLOBAL: _Reader.name_in_lines,
        pickle.STACK_GLOBAL: _Reader.name,
        pickle.REDUCE: _Reader.make,
        pickle.NEWOBJ: _Reader.make,
        pickle.BUILD: _Reader.build,
        pickle.BINPERSID: _push(lambda reader: Outside(reader.stack.pop())),
    }.items()
}
