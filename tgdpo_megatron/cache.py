"""The cache folder of this program: what is made once of a model or a data set, and used by every run after that."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tgdpo_megatron.errors import UserError

_SHOWN_FROM = 2**30
"""Size in bytes from which on the hashing of a file is shown."""


def cache_folder() -> Path:
    """TGDPO_CACHE, or ~/.cache/tgdpo_megatron (in XDG_CACHE_HOME where that is set)."""
    if given := os.environ.get("TGDPO_CACHE"):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "tgdpo_megatron"


@contextlib.contextmanager
def mended_by_deletion(folder: Path) -> Iterator[None]:
    """Let refusals of a folder say that it may be deleted, where it is one of the cache, and so is made again.

    Raises:
        UserError: What was refused.
    """
    try:
        yield
    except UserError as error:
        if cache_folder().resolve() not in folder.resolve().parents:
            raise
        raise UserError(f"{str(error).removesuffix('.')}; or delete {folder}, since it is made again.") from error


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[int]:
    """Hold a lock that ends with its holder. Programs on other machines respect it where the file system is shared.

    Args:
        path: The file of the lock, which stays.
        waiting: What is said where another program holds the lock.

    Yields:
        The file descriptor of the lock. A process that inherits it holds the lock as well.

    Raises:
        UserError: The folder cannot be written, or its file system has no locks.
    """
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(path.open("a", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(waiting, file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{path}: this file cannot be locked ({error.strerror}); set TGDPO_CACHE to a folder on another file "
                "system."
            ) from None
        yield file.fileno()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, as hex.

    A large file in the cache of a hub is named by it. Any other file is read once: the cache remembers its hash for as
    long as its size, its time of change and its inode stay the same.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return real.name
    status = real.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
    index = cache_folder() / "hashes.json"
    known = _read_index(index)
    if known.get(str(real), [])[:3] == stamp:
        return str(known[str(real)][3])
    digest = _read_through(real, status.st_size)
    known = {name: entry for name, entry in _read_index(index).items() if os.path.exists(name)}
    write_json(index, known | {str(real): [*stamp, digest]})
    return digest


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")  # process ids repeat in containers
    part.write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(part, path)


def _read_index(path: Path) -> dict[str, Any]:
    """The hashes that are remembered: path -> size in bytes, time of change in ns, inode, SHA-256."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: entry for name, entry in content.items() if isinstance(entry, list) and len(entry) == 4}


def _read_through(path: Path, size: int) -> str:
    from tqdm import tqdm

    digest = hashlib.sha256()
    with (
        path.open("rb", buffering=0) as file,
        tqdm(total=size, desc=f"hashing {path.name}", unit="B", unit_scale=True, disable=size < _SHOWN_FROM) as shown,
    ):
        while block := file.read(2**24):
            digest.update(block)
            shown.update(len(block))
    return digest.hexdigest()
