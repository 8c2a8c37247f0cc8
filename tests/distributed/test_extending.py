"""docs/extending.md, followed to the letter in a copy of the repository."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("tgdpo_megatron", "recipes", "tools", "tests", "bench", "results", "docs", "conf")
BLOCK = re.compile(
    r"(?:In a new file|At the end of)\s`(?P<path>[^`]+)`:\n\n```python\n(?P<code>.*?)```"
    r"|```console\n(?P<commands>.*?)```",
    flags=re.DOTALL,
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extending") / "repository"
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(command: str, folder: Path) -> str:
    program, *arguments = shlex.split(command)
    assert program == "python", command
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def said(copy: Path) -> dict[str, str]:
    """Every command of the page, with what it said, after the page was followed."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    commands = []
    for block in BLOCK.finditer(page):
        if block["path"]:
            path = copy / block["path"]
            assert path.exists() == ("At the end of" in block[0])
            with path.open("a", encoding="utf-8") as file:
                file.write(("\n\n" if path.stat().st_size else "") + block["code"])
        else:
            commands += block["commands"].splitlines()
    return {command: run(command, copy) for command in commands}


def test_the_page_followed_to_the_letter_adds_a_loss_that_passes_every_check(copy: Path, said: dict[str, str]) -> None:
    assert len(said) == 7
    for command, words in said.items():
        if "pytest" in command:
            assert "offset_dpo" not in words and " passed" in words
        if "tests.parity" in command:
            assert "DPO with an offset: DP2" in words and "FAIL" not in words
    metrics = (copy / "runs/offset/run/metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 10
    assert "`offset_dpo`" in (copy / "docs/methods.md").read_text(encoding="utf-8")


def test_without_its_second_formula_the_checks_name_what_is_missing(
    copy: Path, said: dict[str, str], tmp_path: Path
) -> None:
    """The same page without step 2 and 3: three tests fail, one for each thing that is not there."""
    folder = tmp_path / "half"
    shutil.copytree(copy, folder, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    for name in ("tests/parity/formulas.py", "docs/methods.md"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "tests/data/golden/offset_dpo.json").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/unit/test_every_loss.py", "-k", "offset_dpo"],
        cwd=folder,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    failed = set(re.findall(r"FAILED \S+::(\w+)\[offset_dpo\]", done.stdout))
    assert failed == {
        "test_a_loss_has_golden_numbers",
        "test_a_loss_is_written_out_again_and_has_rows_in_the_parity_matrix",
        "test_a_loss_stands_in_the_documentation",
    }, done.stdout[-2000:]
