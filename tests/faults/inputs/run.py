"""Run an entry of the list, and judge what the program did."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

import psutil

from tests.faults.inputs.entry import BadInput

ROOT = Path(__file__).resolve().parents[3]
MARK = "TGDPO_TEST_MARK"
"""Marks the processes of a program, which inherit their environment."""
SECONDS_TO_START = 60
"""What Python and torch may take to start on a busy machine."""
_NOT_INHERITED = re.compile(
    "RANK|WORLD_SIZE|LOCAL_RANK|MASTER_.*|SLURM_.*|TORCHELASTIC_.*|TGDPO_.*|PYTEST_.*|LC_.*|LANG"
)


@dataclass(frozen=True)
class Outcome:
    """What a program did.

    Attributes:
        code: Exit code; None where it had to be killed.
        out, err: What it wrote, with FOLDER, ROOT and ~ in the place of three folders' names.
        seconds: How long it took.
        left: Command lines of processes that outlived it.
        changed: Files that are there or differ, and were not to.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    left: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def said(self) -> str:
        """The sentence, or what came in its place."""
        errors = [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]
        return errors[0] if errors else (self.err.strip().splitlines() or ["(nothing)"])[-1]

    def faults(self, entry: BadInput) -> list[str]:
        """What is wrong with it, in words; empty where it did as the entry says."""
        found = []
        if self.code != 2:
            found.append(f"exit code {self.code}")
        if "Traceback" in self.out + self.err:
            found.append("a traceback")
        if not _matches(self.said, entry.says):
            found.append("another sentence")
        if self.err.count("error: ") != 1 or self.err.strip().splitlines()[-1] != f"error: {self.said}":
            found.append("the sentence is not the last that is said")
        if self.left:
            found.append(f"processes left: {'; '.join(self.left)}")
        if self.changed:
            found.append(f"files left or changed: {', '.join(self.changed)}")
        if self.seconds > entry.seconds + SECONDS_TO_START:
            found.append(f"{self.seconds:.0f} seconds")
        return found


def _matches(said: str, pattern: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), said) is not None


def run(entry: BadInput, parts: Path, programs: Programs) -> Outcome:
    """Make the mistake in a copy of the parts, and run the command there."""
    with tempfile.TemporaryDirectory() as root:
        folder, scratch = Path(root) / "work", Path(root) / "scratch"
        shutil.copytree(parts, folder, symlinks=True)
        _make(entry, folder)
        scratch.mkdir()
        with _disk(folder, entry.room):
            before = contents(folder)
            mark = uuid.uuid4().hex
            environment = _environment(entry, mark, scratch)
            started = time.monotonic()
            code, out, err = programs.run(entry, folder, environment)
            seconds = time.monotonic() - started
            left = end_of(mark)
            after = contents(folder)
        changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
        forgotten = [f"TMPDIR/{path.name}" for path in (scratch / "tmp").iterdir()]
    return Outcome(
        code,
        *(_without_places(text, folder) for text in (out, err)),
        seconds,
        tuple(left),
        tuple(name for name in (*changed, *forgotten) if not any(fnmatch(name, known) for known in entry.leaves)),
    )


def _without_places(text: str, folder: Path) -> str:
    # The environment's packages may lie anywhere: in the repository, or where a link leads.
    packages = Path(sysconfig.get_path("purelib"))
    for place, name in ((folder, "FOLDER"), (packages, "PACKAGES"), (ROOT, "ROOT"), (Path.home(), "~")):
        text = text.replace(str(place), name)
    return text


def _make(entry: BadInput, folder: Path) -> None:
    for name, content in entry.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    if entry.make is not None:
        entry.make(folder)


@contextlib.contextmanager
def _disk(folder: Path, room: int | None) -> Iterator[None]:
    """A small file system at `disk`, while the block runs."""
    if room is None:
        yield
        return
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "none", disk], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", disk], check=True)


def _environment(entry: BadInput, mark: str, scratch: Path) -> dict[str, str]:
    """A user's environment: no job around it, no network, folders of its own for what is temporary."""
    for name in ("tmp", "cache"):
        (scratch / name).mkdir()
    own = {
        MARK: mark,
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(scratch / "tmp"),
        "TGDPO_CACHE": str(scratch / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "cache" / "inductor"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    found = {name: value for name, value in os.environ.items() if not _NOT_INHERITED.fullmatch(name)}
    together: dict[str, str | None] = {**found, **own, **entry.environment}
    return {name: value for name, value in together.items() if value is not None}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder; a folder without files as its name with a slash."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink() or path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else b""
        elif path.is_dir() and not any(path.iterdir()):
            found[f"{path.relative_to(folder)}/"] = b""
    return found


def end_of(mark: str) -> list[str]:
    """Give what a program started fifteen seconds to end; end the rest, and return their command lines."""
    _, alive = psutil.wait_procs(
        [process for process in psutil.process_iter() if _is_marked(process, mark)], timeout=15
    )
    left = []
    for process in alive:
        with contextlib.suppress(psutil.Error):  # it has ended since
            left.append(" ".join(process.cmdline()))
            process.kill()
    return left


def _is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def limit(limits: Mapping[str, int], *, obeys: bool) -> None:
    """Set limits of the system for this process, and take from root the right to pass over permissions."""
    for name, number in limits.items():
        resource.setrlimit(getattr(resource, name), (number, number))
    if not obeys:
        return
    system = ctypes.CDLL(None, use_errno=True)
    for capability in _PASSES_OVER_PERMISSIONS:
        assert (
            system.prctl(_DROP_FROM_BOUNDING_SET, capability, 0, 0, 0) == 0
        )  # for programs that are started from here
    header, data = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0), (ctypes.c_uint32 * 6)()
    assert system.capget(header, data) == 0
    for place in range(3):  # effective, permitted, inheritable
        data[place] &= ~sum(1 << capability for capability in _PASSES_OVER_PERMISSIONS)
    assert system.capset(header, data) == 0


_PASSES_OVER_PERMISSIONS = (1, 2)
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
_DROP_FROM_BOUNDING_SET, _CAPABILITIES_VERSION = 24, 0x20080522


class Programs:
    """Programs as a shell starts them: each in a Python of its own."""

    def run(self, entry: BadInput, folder: Path, environment: dict[str, str]) -> tuple[int | None, str, str]:
        """Exit code, standard output and standard error of an entry's command."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", *entry.command],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                preexec_fn=lambda: limit(entry.limits, obeys=entry.obeys),
            )
            code = _wait(process, entry.seconds + SECONDS_TO_START)
            return code, _text(out), _text(err)


def _wait(process: Any, seconds: float) -> int | None:
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
