"""The folder of a conversion: what holds it, and what is on the disk when it becomes the target."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from tgdpo_megatron.checkpoint.work import work_on
from tgdpo_megatron.errors import UserError


def test_all_of_a_target_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a loss of power may leave empty files in a folder that looks whole."""
    target, waited = tmp_path / "target", []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        waited.append((os.readlink(f"/proc/self/fd/{descriptor}"), target.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    with work_on(target, {}) as work:
        (work.folder / "weights").mkdir()
        for name in ("weights/.metadata", "manifest.json", "certificate.json"):
            (work.folder / name).write_text("content")
        work.finish()
    before = {path for path, named in waited if not named}
    names = ("", "/weights", "/weights/.metadata", "/manifest.json", "/certificate.json")
    assert {f"{work.folder}{name}" for name in names} <= before
    assert (str(tmp_path), True) in waited


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"target.partial/.conversion/lock: .*\(No locks available\).* TGDPO_CACHE"):  # noqa: SIM117
        with work_on(tmp_path / "target", {}):
            pass
