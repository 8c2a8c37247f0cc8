"""Cut a large file into parts for transfers of limited size, and put it together again, byte for byte."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from tgdpo_megatron.errors import UserError

PART = ".part-"
SUM = ".sha256"


def cut(file: Path, folder: Path, *, size: int) -> list[Path]:
    """Cut a file into `folder/NAME.part-000` and so on, and write `folder/NAME.sha256` as sha256sum would.

    Args:
        file: The file. It is kept.
        folder: An existing folder for the parts.
        size: Largest number of bytes of a part.

    Returns:
        The parts, in order.
    """
    parts: list[Path] = []
    with file.open("rb") as source:
        while piece := source.read(size):
            parts.append(folder / f"{file.name}{PART}{len(parts):03d}")
            parts[-1].write_bytes(piece)
    (folder / f"{file.name}{SUM}").write_text(f"{_sha256(file)}  {file.name}\n", encoding="utf-8")
    return parts


def join(folder: Path) -> list[Path]:
    """Put together every file whose `NAME.sha256` lies in the folder or below it. The parts may lie anywhere below it.

    A file that is there already, whole, is left as it is.

    Returns:
        The files. Each lies beside its `NAME.sha256`.

    Raises:
        UserError: Parts are missing, damaged, or those of another file.
    """
    return [_join(sum_file, folder) for sum_file in sorted(folder.rglob(f"*{SUM}"))]


def _join(sum_file: Path, folder: Path) -> Path:
    target = sum_file.with_suffix("")
    wanted = sum_file.read_text(encoding="utf-8").split()[0]
    if target.is_file() and _sha256(target) == wanted:
        return target
    parts = sorted(folder.rglob(f"{target.name}{PART}*"), key=lambda part: part.name)
    work = target.with_name(f"{target.name}.tmp")
    with work.open("wb") as joined:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, joined)
    if _sha256(work) != wanted:
        work.unlink()
        raise UserError(
            f"{target}: its {len(parts)} parts do not make the file that was cut: one is missing or damaged; "
            "transfer them again."
        )
    work.rename(target)
    return target


def _sha256(file: Path) -> str:
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
