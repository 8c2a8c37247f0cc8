"""A program that a test runs in its own process: quicker than one that must be started first."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tgdpo_megatron import quiet

Program = Callable[[Callable[[], None], Sequence[Any]], tuple[int, str]]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """A function that calls a program's main() with arguments: its exit code, and its sentence or else its output."""

    def run(main: Callable[[], None], arguments: Sequence[Any]) -> tuple[int, str]:
        for name in ("PYTHONWARNINGS", *quiet._PROGRESS_BARS):  # which a program sets for those that it starts
            monkeypatch.setenv(name, "ignore")
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        refused = re.search(r"^error: (.*)$", captured.err, flags=re.MULTILINE)
        return code, refused[1] if refused else captured.out

    return run
