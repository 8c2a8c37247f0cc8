"""Watch what Python does: an audit hook that notes every action outside a fixed list."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NEVER_MATTERS = {
    "object.__getattr__",
    "sys._getframe",
    "os.listdir",
    "os.scandir",
    "builtins.id",
    "pathlib.Path.glob",
    "pathlib.Path.rglob",
    "pathlib.Path.walk",
}
_NEVER_MATTERS |= {"ctypes.cdata", "shutil.copyfile"}
"""Looking at attributes, at frames and into folders, how safetensors copies what it writes; and copying a
file, which opens both."""
_IN_SCRATCH = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.utime", "os.chmod", "shutil.rmtree", "shutil.move"}
_IN_SCRATCH |= {"shutil.copymode", "shutil.copystat", "os.truncate", "fcntl.flock", "os.link"}


class Watch:
    """The actions outside the list, while it is on. One in a process, since a hook cannot be removed.

    Inside the list are reading a file of the folder `read`, anything with files of the folder `scratch`, and looking up
    the names `names` for a pickle, which processes of our own exchange.
    """

    def __init__(self, read: Path, scratch: Path, names: frozenset[tuple[str, str]]) -> None:
        self.read, self.scratch, self.names = str(read), str(scratch), names
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[str]]:
        """The actions that are seen from now on, as text."""
        self.seen, self.on = [], True
        try:
            yield self.seen
        finally:
            self.on = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or event in _NEVER_MATTERS:
            return
        if event == "open" and self._may_open(*arguments):
            return
        if event in _IN_SCRATCH and all(map(self._is_scratch, self._paths(arguments))):
            return
        if event == "pickle.find_class" and arguments in self.names:
            return
        self.seen.append(f"{event} {arguments!r:.150}")

    def _may_open(self, path: Any, mode: Any, flags: int) -> bool:
        if self._is_scratch(path):
            return True
        writes = bool(flags & _WRITING) or (isinstance(mode, str) and any(letter in mode for letter in "wax+"))
        relative = mode is None and not os.path.isabs(str(path))  # to a folder that is open: shutil.rmtree
        return not writes and (relative or os.path.abspath(str(path)).startswith(self.read))

    @staticmethod
    def _paths(arguments: tuple[Any, ...]) -> list[Any]:
        """The paths of an action; none where it is within a folder that is open, as shutil.rmtree's are."""
        within = isinstance(arguments[-1], int) and arguments[-1] >= 0
        return [] if within else [path for path in arguments if isinstance(path, str | Path)]

    def _is_scratch(self, path: Any) -> bool:
        return isinstance(path, int) or os.path.abspath(str(path)).startswith(self.scratch)
