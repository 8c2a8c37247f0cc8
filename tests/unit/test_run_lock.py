"""A folder that a job writes into is refused to a second one for as long as a process of the first lives."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tgdpo_megatron import run_folder, run_lock
from tgdpo_megatron.run_lock import InUseError, RunLock


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_SECONDS_TO_BE_FREE", 0)
    monkeypatch.setattr(run_lock, "_SECONDS_TO_BE_SEEN", 0)


def test_a_second_job_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.take()
    with pytest.raises(
        InUseError, match=rf"{tmp_path}: another job works there \(process {os.getpid()} on .*, since 2"
    ):
        second.take()
    first.release()
    second.take()
    second.release()


def test_the_lock_holds_while_any_rank_of_the_job_lives(tmp_path: Path) -> None:
    first, other = RunLock(tmp_path), RunLock(tmp_path)
    first.take()
    assert other.share(first.mark)
    first.release()  # as when the first rank is killed
    with pytest.raises(InUseError):
        RunLock(tmp_path).take()
    other.release()
    RunLock(tmp_path).take()


def test_a_rank_that_sees_another_folder_than_the_first_notices(tmp_path: Path) -> None:
    """As where each node has a disk of its own under the same name, perhaps with the lock of an earlier run."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    first = RunLock(here)
    first.take()
    assert not RunLock(there).share(first.mark) and not list(there.iterdir())
    earlier = RunLock(there)
    earlier.take()
    earlier.release()
    assert not RunLock(there).share(first.mark)
    assert not RunLock(tmp_path / "gone").share(first.mark)
    assert RunLock(here).share(first.mark)


@pytest.mark.parametrize("stays", [False, True])
def test_a_job_that_comes_while_the_lock_is_made_shared_is_never_taken_for_the_holder(
    stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel gives an exclusive lock up before it shares it; here another process takes it in between."""
    lock, real = RunLock(tmp_path), fcntl.flock
    with (tmp_path / "lock").open("w") as other:
        asked: list[int] = []

        def flock(file: object, how: int) -> None:
            asked.append(how & ~fcntl.LOCK_NB)
            if asked == [fcntl.LOCK_EX, fcntl.LOCK_SH]:
                real(file, fcntl.LOCK_UN)
                real(other, fcntl.LOCK_EX)
            elif not stays:
                real(other, fcntl.LOCK_UN)
            real(file, how)

        monkeypatch.setattr(fcntl, "flock", flock)
        if not stays:
            return lock.take()
        with pytest.raises(InUseError, match="another job works there; wait"):  # and not this process's own name
            lock.take()


def test_a_rank_that_another_job_keeps_out_does_not_take_itself_for_a_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_SECONDS_TO_BE_SEEN", 0.05)
    first, other = RunLock(tmp_path), RunLock(tmp_path)
    first.take()
    first.release()
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not other.share(first.mark)
    assert other.share(first.mark)


def test_the_lock_ends_with_a_holder_that_is_killed(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from tgdpo_megatron.run_lock import RunLock
lock = RunLock(Path({str(tmp_path)!r}))
lock.take()
print("held", flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(InUseError, match=f"process {holder.pid} on "):
            RunLock(tmp_path).take()
        holder.kill()
    RunLock(tmp_path).take()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "a", "process": 1, "since": 1e300}', "9" * 5000])
def test_whatever_the_file_says_the_refusal_is_a_sentence(content: str, tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    first.take()
    first.path.write_text(content)
    with pytest.raises(InUseError, match="another job works there; wait"):
        RunLock(tmp_path).take()


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    RunLock(tmp_path).take()
    assert "this file system has no locks (Function not implemented)" in capsys.readouterr().out


def test_the_job_that_came_second_to_a_new_folder_does_not_remove_it(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with pytest.raises(InUseError), run_folder.removed_if_refused(folder, is_first=True):
        folder.mkdir()
        raise InUseError("another job works there.")
    assert folder.is_dir()
