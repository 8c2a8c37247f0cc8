"""The scripts in slurm/: short, correct bash, options that sbatch knows, and a program at the end of each."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "slurm"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
KNOWN = {
    *("job-name", "nodes", "gpus-per-node", "ntasks", "ntasks-per-node", "cpus-per-task", "exclusive", "mem", "time"),
    *("signal", "requeue", "open-mode", "output"),
}
"""Of sbatch's options, those that these scripts may use: resources, and what becomes of the job."""


def options(script: Path) -> dict[str, str]:
    """The options that a script gives sbatch, without comments."""
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?(?: +#.*)?$", script.read_text(), flags=re.MULTILINE)
    assert len(lines) == len(re.findall("^#SBATCH", script.read_text(), flags=re.MULTILINE))
    return dict(lines)


def test_there_is_a_script_for_every_stage() -> None:
    names = {script.stem for script in SCRIPTS}
    assert names == {"prepare", "convert", "score", "train", "export", "sweep"}


@pytest.mark.parametrize("path", [*SCRIPTS, FOLDER / "environment.sh"], ids=lambda path: path.name)
def test_a_script_is_correct_bash_and_fits_a_screen(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        found = subprocess.run(
            ["shellcheck", "--external-sources", "--exclude=SC1091", "--shell=bash", path.name],
            cwd=FOLDER,
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0, found.stdout


@each_script
def test_sbatch_knows_every_option(script: Path) -> None:
    given = options(script)
    assert set(given) <= KNOWN
    assert {"job-name", "time", "output", "requeue", "open-mode"} <= set(given)
    assert given["job-name"] == script.stem


@each_script
def test_a_script_ends_in_a_program_that_gets_every_argument(script: Path) -> None:
    *_, ending = script.read_text().split("\n\n")
    (program,) = re.findall(r"^(?:once|on_each_node) (\S+)", ending, flags=re.MULTILINE)
    assert importlib.util.find_spec(program) is not None
    assert '"$@"' in ending or '"${@:4}"' in ending  # the sweep has three of its own
    assert "set -euo pipefail" in script.read_text()


@each_script
def test_one_launcher_runs_on_each_node_and_a_warned_training_is_queued_again(script: Path) -> None:
    given, text = options(script), script.read_text()
    if "on_each_node" in text:
        assert given["ntasks-per-node"] == "1" and "gpus-per-node" in given
    else:
        assert given["ntasks"] == "1" and "gpus-per-node" not in given
    if "recipes.train" in text:
        assert given["signal"] == "B:USR1@300" and "train.resume=true" in text
