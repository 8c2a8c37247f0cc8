"""Programs by their names: in the repository, and once they are installed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from recipes.settings import read_command_line
from tests.support.in_process import Program
from tgdpo_megatron.commands import BY_SCRIPT, PROGRAMS, as_called
from tools import runs

ROOT = Path(__file__).resolve().parents[2]
OF_THE_REPOSITORY = {
    "recipes.convert",  # recipes.train does it by itself; a job of its own is queued by tools.submit
    *(
        "tools.docs",
        "tools.gpu_environment",
        "tools.gpu_wheels",
        "tools.lock_for",
        "tools.marked_pairs",
        "tools.real_run",
    ),
}
"""Programs that need the repository, or that another program starts: they have no console script."""


def programs() -> set[str]:
    """Every module of recipes and tools that can be started."""
    files = {path for folder in ("recipes", "tools") for path in (ROOT / folder).rglob("*.py")}
    started = {path for path in files if 'if __name__ == "__main__":' in path.read_text()}
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in started}


def test_every_program_for_users_has_a_console_script() -> None:
    assert set(PROGRAMS.values()) == programs() - OF_THE_REPOSITORY
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert listed == dict.fromkeys(PROGRAMS, "tgdpo_megatron.commands:main")
    assert list(listed) == sorted(listed)


def test_the_documentation_lists_every_console_script() -> None:
    lines = (ROOT / "docs" / "README.md").read_text().splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| `tgdpo-")]
    assert {script.strip(" `"): module.strip(" `") for _, script, module, *_ in rows} == PROGRAMS


@pytest.mark.parametrize(
    ("text", "called"),
    [
        ("run python -m recipes.score again, which adds", "run tgdpo-score again, which adds"),
        ("queue it with tools.submit, or set it.", "queue it with tgdpo-submit, or set it."),
        ("python -m tools.convert_megatron_to_hf a b", "tgdpo-export a b"),
        ("start it with recipes.train.", "start it with tgdpo-train."),
        ("python -m recipes.convert --recipe x", "python -m tgdpo_megatron recipes.convert --recipe x"),
        (
            "runs/tools.view and tools.view.png and recipes/tiny.py",
            "runs/tools.view and tools.view.png and recipes/tiny.py",
        ),
        ("train.output and loss.type stay", "train.output and loss.type stay"),
    ],
)
def test_a_text_names_programs_as_the_user_started_this_one(
    text: str, called: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(BY_SCRIPT, raising=False)
    assert as_called(text) == text
    monkeypatch.setenv(BY_SCRIPT, "1")
    assert as_called(text) == called


def test_help_and_errors_of_a_console_script_name_it(
    in_process: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(BY_SCRIPT, "1")
    code, said = in_process(runs.main, ["--help"])
    assert code == 0 and said.startswith("usage: tgdpo-runs ") and "    tgdpo-runs FOLDER" in said
    code, said = in_process(runs.main, [])
    assert (code, said) == (2, "command line: FOLDER must be given; see tgdpo-runs --help.")
    with pytest.raises(SystemExit):
        read_command_line("recipes.score", "python -m recipes.score [key=value ...]", ["--help"])
    said = capsys.readouterr().out
    assert said.startswith("tgdpo-score [key=value ...]") and "tgdpo-train --help.)" in said
    assert "recipes." not in said.replace("recipes:", "")


def test_a_program_starts_from_any_folder_even_one_with_folders_of_the_same_names(tmp_path: Path) -> None:
    for name in ("recipes", "tools", "tgdpo_megatron"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the user's')")
    command = [sys.executable, "-P", "-m", "tgdpo_megatron", "tools.runs", "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "List runs in a table" in done.stdout, done.stderr


def test_a_program_must_be_named() -> None:
    done = subprocess.run([sys.executable, "-m", "tgdpo_megatron"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: name a program: recipes.align, recipes.score, ")


def test_an_experiment_is_found_from_any_folder_but_the_users_own_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "conf/dpo-gemma2_2b-ultrafeedback.yaml"
    assert read_command_line("recipes.train", "", ["--conf", name]).recipe == "dpo_gemma2_2b"
    (tmp_path / "conf").mkdir()
    (tmp_path / name).write_text("recipe: sft_tiny\n")
    assert read_command_line("recipes.train", "", ["--conf", name]).recipe == "sft_tiny"


def test_every_file_that_is_no_code_is_packed() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    folders = [ROOT / name for name in ("tgdpo_megatron", "recipes", "tools", "conf", "slurm")]
    files = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    others = {path for path in files if path.suffix not in (".py", ".pyc")}
    assert len(others) > 20 and {path for path in others if not any(map(path.match, patterns))} == set()


def test_no_program_of_ours_is_imported_to_start_one() -> None:
    """A console script imports this module alone: it takes milliseconds."""
    tree = ast.parse((ROOT / "tgdpo_megatron" / "commands.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported <= sys.stdlib_module_names | {"__future__"}
