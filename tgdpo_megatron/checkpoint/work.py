"""A conversion's work: parts done by one process or several, in a folder that becomes the target when all are done.

TARGET.partial/                       what is finished so far; renamed to TARGET at the end
TARGET.partial/.conversion/what.json  what is converted, and how
TARGET.partial/.conversion/00012.json a finished part: written when its bytes are on the disk
TARGET.partial/.conversion/lock       held, by flock, while a program works in the folder; it ends with its holder

A conversion that was interrupted goes on from its finished parts, if the same is converted in the same way. This file
knows nothing of weights.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import IO, Any, Protocol

from tqdm import tqdm

from tgdpo_megatron.checkpoint.failures import InterruptedWorkError, writable
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.quiet import quiet

LONG = 10**9
"""Bytes above which a conversion shows its progress."""
_JOURNAL = ".conversion"


class Job(Protocol):
    """Work in parts, in any order. Sent to every process that works on it."""

    def write(self, part: int) -> dict[str, Any]:
        """Do one part, wait for the disk, and return what the journal keeps of it, in JSON types."""


class Work:
    """The folder that is worked in.

    Attributes:
        folder: Its path.
        target: What it becomes.
    """

    def __init__(self, folder: Path, target: Path) -> None:
        self.folder, self.target = folder, target

    def finished(self) -> dict[int, dict[str, Any]]:
        """What the journal keeps, by part."""
        files = sorted((self.folder / _JOURNAL).glob("[0-9]*.json"))
        return {int(file.stem): json.loads(file.read_text(encoding="utf-8")) for file in files}

    def do(self, job: Job, sizes: Sequence[int], processes: int) -> list[dict[str, Any]]:
        """Do all parts that are not finished.

        Args:
            sizes: Bytes that each part writes.
            processes: How many work at once. With one, this process does.

        Returns:
            What the journal keeps of each part.

        Raises:
            UserError: No space left, or a process was killed; or whatever the job raises.
        """
        finished = self.finished()
        todo = [part for part in range(len(sizes)) if part not in finished]
        self._check_space(sum(sizes[part] for part in todo))
        with (
            tqdm(
                total=sum(sizes),
                initial=sum(sizes[part] for part in finished),
                desc="converting",
                unit="B",
                unit_scale=True,
                disable=sum(sizes) < LONG,
            ) as progress,
            writable(f"{self.folder}: the conversion"),
        ):
            for part, record in _done(job, todo, min(processes, len(todo))):
                self._keep(part, record)
                finished[part] = record
                progress.update(sizes[part])
        return [finished[part] for part in range(len(sizes))]

    def finish(self) -> None:
        """Make the folder the target, once all that is in it is on the disk."""
        with writable(f"{self.target}: the folder"):
            for path in (*self.folder.rglob("*"), self.folder):
                _wait_for_disk(path)
            self.folder.rename(self.target)
            _wait_for_disk(self.folder.parent)
        shutil.rmtree(self.target / _JOURNAL, ignore_errors=True)

    def _keep(self, part: int, record: dict[str, Any]) -> None:
        path = self.folder / _JOURNAL / f"{part:05d}.json"
        whole = path.with_suffix(".tmp")
        whole.write_text(json.dumps(record), encoding="utf-8")
        whole.rename(path)

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"{self.target}: {needed / 1e9:,.2f} GB are still to be written, but only {free / 1e9:,.2f} GB are "
                "free there; make room, or choose another disk."
            )


def _wait_for_disk(path: Path) -> None:
    """Return when a file, or the list of names that a folder is, would outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems do not know it of folders
            raise
    finally:
        os.close(descriptor)


def check_target(target: Path) -> None:
    """Refuse a target that is there already.

    Raises:
        UserError: It holds something.
    """
    try:
        if target.is_file():
            raise UserError(f"{target}: is a file; choose another folder.")
        if target.exists() and any(target.iterdir()):
            raise UserError(f"{target}: already there and not empty; choose another folder.")
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}).") from None


@contextlib.contextmanager
def work_on(target: Path, what: Mapping[str, Any]) -> Iterator[Work]:
    """Work on a target, alone.

    A refused input leaves nothing. Where the disk is full or fails, a process was killed or the user interrupts, the
    finished parts stay, and the same call goes on from them.

    Args:
        target: Folder to make.
        what: Everything that the result depends on, in JSON types.

    Raises:
        UserError: The target is in use, or cannot be written.
    """
    check_target(target)
    folder = Path(os.path.abspath(target))
    folder = folder.with_name(f"{folder.name}.partial")
    with _locked(folder, target):
        work = Work(folder, target)
        try:
            check_target(target)  # another program may just have made it
            with writable(f"{folder}: the conversion"):
                _begin(work, json.dumps(what, sort_keys=True, indent=1))
        except UserError:
            if not (folder / _JOURNAL / "what.json").exists():
                shutil.rmtree(folder / _JOURNAL, ignore_errors=True)
                with contextlib.suppress(OSError):  # it holds something else
                    folder.rmdir()
            raise
        try:
            yield work
        except BaseException as error:
            if not folder.is_dir():  # the target is made already
                raise
            refused = isinstance(error, UserError) and not isinstance(error, InterruptedWorkError)
            if refused or not work.finished():
                shutil.rmtree(folder, ignore_errors=True)
            elif isinstance(error, UserError):
                kept = f"what is finished stays in {folder}, and the same command goes on from it"
                raise type(error)(f"{str(error).removesuffix('.')}; {kept}.") from error
            raise


@contextlib.contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    while True:
        try:
            (folder / _JOURNAL).mkdir(parents=True, exist_ok=True)
            lock = (folder / _JOURNAL / "lock").open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{target}: cannot be written ({error.strerror}).") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{target}: another conversion to this folder is running; wait for its end.") from None
            except OSError as error:
                raise UserError(
                    f"{lock.name}: this file cannot be locked ({error.strerror}); choose a target on another file "
                    "system, with TGDPO_CACHE for models that are converted by themselves."
                ) from None
            if not _is_still_at(lock, folder / _JOURNAL / "lock"):
                continue  # whoever held it has just finished, and has renamed or removed the folder
            yield
            return


def _is_still_at(lock: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _begin(work: Work, what: str) -> None:
    """Go on from what is finished, or throw it away where it is of another conversion."""
    record = work.folder / _JOURNAL / "what.json"
    if record.is_file() and record.read_text(encoding="utf-8") == what:
        if finished := len(work.finished()):
            print(f"{work.folder}: going on from {finished} finished parts.", file=sys.stderr)
        return
    others = [path for path in work.folder.iterdir() if path.name != _JOURNAL]
    if others and not record.is_file():
        raise UserError(f"{work.folder}: this folder is needed, but holds files of something else; move it away.")
    if work.finished():
        reason = "another model, dtype or version of the program"
        print(f"{work.folder}: unfinished, but of {reason}; starting again from nothing.", file=sys.stderr)
    for path in [*others, *(path for path in (work.folder / _JOURNAL).iterdir() if path.name != "lock")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    record.write_text(what, encoding="utf-8")


# ---------------------------------------------------------------- processes


class KilledError(InterruptedWorkError):
    """A process that worked on a job was killed."""


def _done(job: Job, todo: Sequence[int], processes: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Do parts, and yield each as it is finished."""
    if processes <= 1:
        for part in todo:
            yield part, job.write(part)
        return
    others = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _start, (job, max(1, (os.cpu_count() or 1) // processes))
    )
    try:
        parts = {pool.submit(_write, part): part for part in todo}
        for future in concurrent.futures.as_completed(parts):
            yield parts[future], future.result()
    except BrokenProcessPool:
        raise KilledError(
            "a process of the conversion was killed, perhaps because the machine's memory is full; try with fewer "
            "processes."
        ) from None
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(job: Job, threads: int) -> None:
    """Begin a process that works on a job: it is quiet, and ends with the program that started it."""
    import torch

    global _job
    _job = job
    quiet()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program ends this process itself
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    threading.Thread(target=_end_with_the_program, daemon=True).start()


_job: Job | None = None


def _end_with_the_program() -> None:
    program = multiprocessing.parent_process()
    assert program is not None
    program.join()
    os._exit(1)


def _write(part: int) -> dict[str, Any]:
    assert _job is not None
    return _job.write(part)
