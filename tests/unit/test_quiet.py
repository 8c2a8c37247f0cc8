"""What libraries say is silenced in one place, and nowhere else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOUD = """
import logging, subprocess, sys, warnings
from tgdpo_megatron.errors import one_sentence_errors
with one_sentence_errors():
    warnings.warn("a warning")
    own_level = logging.getLogger("a.library")
    own_level.setLevel(logging.INFO)
    own_level.error("a log")
    subprocess.run([sys.executable, "-c", "import warnings; warnings.warn('a warning of a process started here')"])
    from huggingface_hub.utils import are_progress_bars_disabled
    from datasets.utils import are_progress_bars_disabled as are_those_of_datasets
    from transformers.utils.logging import is_progress_bar_enabled
    print(are_progress_bars_disabled(), are_those_of_datasets(), not is_progress_bar_enabled())
"""


def loud(**environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program whose libraries say all they can."""
    # A program that ran in this process before may have set the others.
    ours = ("PYTHONWARNINGS", "TGDPO_DEBUG", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, "-c", LOUD], cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=True
    )


def test_libraries_are_silent() -> None:
    done = loud()
    assert done.stderr == ""
    assert done.stdout == "True True True\n"


def test_libraries_are_heard_while_debugging() -> None:
    done = loud(TGDPO_DEBUG="1")
    assert "UserWarning: a warning\n" in done.stderr
    assert "a log\n" in done.stderr
    assert "UserWarning: a warning of a process started here\n" in done.stderr
    assert done.stdout == "False False False\n"


def test_warnings_that_were_asked_for_are_shown() -> None:
    done = loud(PYTHONWARNINGS="default")
    assert "UserWarning: a warning\n" in done.stderr
    assert "a log\n" not in done.stderr


SILENCING = re.compile(
    r"simplefilter|filterwarnings|catch_warnings|PYTHONWARNINGS|-W[ \"',]*ignore|setLevel|logging\.disable|VERBOSITY"
    r"|set_verbosity|disable_progress|DISABLE_PROGRESS|redirect_std|LOG_LEVEL|LOGLEVEL|ADVISORY"
)


@pytest.mark.parametrize(
    "line", ['[python, "-W", "ignore"]', "python -W ignore -m tools.demo", "datasets.disable_progress_bars()"]
)
def test_silencing_is_recognised(line: str) -> None:
    assert SILENCING.search(line)


def test_nothing_else_silences_libraries() -> None:
    """Neither the package, nor the programs, nor what starts them."""
    files = [
        path for folder in ("tgdpo_megatron", "recipes", "tools", "bench") for path in (ROOT / folder).rglob("*.py")
    ]
    found = {
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*files, ROOT / "Makefile", *(ROOT / ".ci").glob("*")]
        if path != ROOT / "tgdpo_megatron" / "quiet.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if SILENCING.search(line)
    }
    assert found == set()
    assert len(files) > 50
