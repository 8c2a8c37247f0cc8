"""Checksums of a checkpoint's files: FOLDER/SHA256SUMS, which `sha256sum --check SHA256SUMS` reads as well.

It names every file of the folder but itself, the manifest included.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from tgdpo_megatron.checkpoint.manifest import HF, WEIGHTS

SUMS = "SHA256SUMS"
_PIECE = 1 << 22
_ON_ITS_WAY = 1 << 28
"""Bytes that the operating system may hold before they must be on the disk. Without a bound it takes what its memory
holds, and the end of a file then waits for all of it at once, as long as a disk that has died would."""


class SummedFile:
    """A file that is written from its beginning to its end, and hashed on the way.

    Args:
        gets_on: Called whenever some bytes were written, or have reached the disk.
    """

    def __init__(self, file: IO[bytes], gets_on: Callable[[], None]) -> None:
        self.file, self.gets_on = file, gets_on
        self.hash = hashlib.sha256()
        self._since_disk = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write some bytes."""
        whole = memoryview(data).cast("B")
        for first in range(0, len(whole), _PIECE):
            piece = whole[first : first + _PIECE]
            self.hash.update(piece)
            self.file.write(piece)
            self.gets_on()
            self._since_disk += len(piece)
            if self._since_disk >= _ON_ITS_WAY:
                self.wait_for_disk()
        return len(whole)

    def wait_for_disk(self) -> None:
        """Return when all that was written would outlast a loss of power."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self._since_disk = 0
        self.gets_on()

    def tell(self) -> int:
        """Bytes written so far."""
        return self.file.tell()

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        self.file.flush()


def sum_of(path: Path) -> str:
    """SHA-256 of a file, as hex. The file is read in any case: nothing is remembered from before."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


def write_sums(folder: Path, known: Mapping[str, str]) -> None:
    """Write SHA256SUMS.

    Args:
        known: Sums of files that need not be read again, by their names within the folder. They count as there: the
            list of a shared folder may not show yet what other machines have written.
    """
    listed = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = sorted({*listed, *known})
    lines = [f"{known.get(name) or sum_of(folder / name)}  {name}\n" for name in names if name != SUMS]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """Name of a file -> its sum.

    Raises:
        ValueError: A line is something else, or names a file outside the folder.
        OSError: The file cannot be read.
    """
    sums = {}
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        found, _, name = line.partition("  ")
        if len(found) != 64 or not name or name.startswith("/") or ".." in Path(name).parts:
            raise ValueError(f"{SUMS} has the line '{line[:80]}', which names no file and its sum")
        sums[name] = found
    return sums


def first_damage(folder: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the first file of a folder that is not as it was saved, in words; None where all are.

    Args:
        part, parts: Look at this part of the files alone. The parts have about equally many bytes.

    Raises:
        OSError: A file is there, but cannot be read.
    """
    try:
        sums = read_sums(folder)
    except FileNotFoundError:
        return f"{SUMS} is missing"
    except ValueError as error:
        return str(error)
    if unnamed := sorted(_named_when_whole(folder) - sums.keys()):
        return f"{SUMS} does not name {unnamed[0]}"
    sizes = {name: (folder / name).stat().st_size if (folder / name).is_file() else None for name in sums}
    for name in sorted(sums, key=lambda name: -(sizes[name] or 0))[part::parts]:
        if sizes[name] is None:
            return f"{name} is missing"
        if sum_of(folder / name) != sums[name]:
            return f"{name} is not as it was saved"
    return None


def _named_when_whole(folder: Path) -> set[str]:
    """Files that SHA256SUMS names if it is whole: the first and the last of its lines, and what lies between them.

    What somebody has laid into the folder itself, such as notes or a certificate, is no damage.
    """
    listed = (path for part in (WEIGHTS, HF) for path in (folder / part).rglob("*") if path.is_file())
    there = {str(path.relative_to(folder)) for path in listed if not path.name.startswith(".nfs")}
    return there | {"manifest.json", f"{WEIGHTS}/.metadata", f"{WEIGHTS}/metadata.json"}
