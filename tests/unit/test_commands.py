"""Programs by their names: in the repository, and once they are installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from recipes.settings import read_command_line
from tgdpo_megatron import commands
from tgdpo_megatron.commands import PROGRAMS, WITHOUT_SCRIPT

ROOT = Path(__file__).resolve().parents[2]
OF_THE_REPOSITORY = {
    *("tools.docs", "tools.gpu_environment", "tools.gpu_wheels", "tools.lock_for", "tools.real_run"),
}
"""Programs that need the repository."""


def programs() -> set[str]:
    """Every module of recipes and tools that can be started."""
    files = {path for folder in ("recipes", "tools") for path in (ROOT / folder).rglob("*.py")}
    started = {path for path in files if 'if __name__ == "__main__":' in path.read_text()}
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in started}


def test_every_program_for_users_has_a_console_script() -> None:
    assert {*PROGRAMS.values(), *WITHOUT_SCRIPT} == programs() - OF_THE_REPOSITORY
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert listed == dict.fromkeys(PROGRAMS, "tgdpo_megatron.commands:main")
    assert list(listed) == sorted(listed)


def test_the_documentation_lists_every_console_script() -> None:
    lines = (ROOT / "docs" / "README.md").read_text().splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| `tgdpo-")]
    assert {script.strip(" `"): module.strip(" `") for _, script, module, *_ in rows} == PROGRAMS


@pytest.fixture
def in_the_wheel(tmp_path: Path) -> ModuleType:
    """The module as it lies in the wheel."""
    (tmp_path / "repository").mkdir()
    file = shutil.copy(commands.__file__, tmp_path)
    spec = importlib.util.spec_from_file_location("in_the_wheel", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
def test_a_text_names_programs_as_they_are_called_here(text: str, called: str, in_the_wheel: ModuleType) -> None:
    """Whichever way this one was started: a job, say, may have been queued by another installation."""
    assert commands.as_called(text) == text
    assert in_the_wheel.as_called(text) == called


def test_a_program_starts_from_any_folder_even_one_with_folders_of_the_same_names(tmp_path: Path) -> None:
    for name in ("recipes", "tools", "tgdpo_megatron"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the user's')")
    command = [sys.executable, "-P", "-m", "tgdpo_megatron", "tools.runs", "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "List runs in a table" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [([], "no program is named"), (["train"], "'train' is no program"), (["os"], "'os' is no program")],
)
def test_what_is_no_program_is_refused_with_those_that_there_are(words: list[str], says: str) -> None:
    done = subprocess.run([sys.executable, "-m", "tgdpo_megatron", *words], cwd=ROOT, capture_output=True, text=True)
    known = ", ".join(sorted((*PROGRAMS.values(), *WITHOUT_SCRIPT)))
    assert (done.returncode, done.stderr) == (2, f"error: {says}; name one of {known}.\n")


def test_a_console_script_keeps_the_options_of_python_and_leaves_nothing_to_other_pythons(tmp_path: Path) -> None:
    script = tmp_path / "tgdpo-runs"
    script.write_text(CONSOLE_SCRIPT)
    command = [sys.executable, "-u", "-X", "utf8=0", "-W", "error::UserWarning", script, "--help"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    *helped, kept, left = done.stdout.splitlines()
    assert any("List runs in a table" in line for line in helped), done.stderr
    assert kept == "True {'utf8': '0'} ['error::UserWarning']"
    assert left == "[]"


CONSOLE_SCRIPT = f"""
import os, sys
unbuffered = sys.stdout.write_through
sys.path.insert(1, {str(ROOT)!r})
from tgdpo_megatron.commands import main
try:
    main()
except SystemExit:
    print(unbuffered, sys._xoptions, sys.warnoptions)
    print([name for name in os.environ if name in ("PYTHONPATH", "PYTHONSAFEPATH")])
"""
"""As pip writes it, but for what it says at its end."""


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


def test_nothing_but_the_standard_library_is_imported_before_a_program() -> None:
    """A program that is refused, or only named wrongly, is so at once."""
    look = "import sys; before = {*sys.modules}; import tgdpo_megatron.commands; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert "tgdpo_megatron" in imported and imported <= sys.stdlib_module_names | {"tgdpo_megatron"}
