"""The scripts in slurm/: short, correct bash, options that sbatch knows, and a program at the end of each."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm import cluster

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
    assert names == {"prepare", "convert", "score", "train", "export", "sweep", "sample", "serve"}


@pytest.mark.parametrize("path", [*SCRIPTS, FOLDER / "environment.sh"], ids=lambda path: path.name)
def test_a_script_is_correct_bash_and_fits_a_screen(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        found = subprocess.run(
            ["shellcheck", "--external-sources", "--exclude=SC1090,SC1091", "--shell=bash", path.name],
            cwd=FOLDER,
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0, found.stdout


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """A function that runs a line after environment.sh, on a Slurm that writes down how its commands were called.

    Its jobs are in the state `state`, and a program that srun starts ends with `code`. Returns the exit code and the
    calls.
    """
    calls = tmp_path / "calls"
    answers = {"srun": 'exit "$CODE"', "squeue": 'echo "$STATE"', "scontrol": "[[ $1 == show ]] && echo node-0 || true"}
    answers["sleep"] = ""
    for name, answer in answers.items():
        command = tmp_path / name
        command.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>{calls}\n{answer}\n')
        command.chmod(0o755)

    def run(line: str, *, code: int = 0, state: str = "RUNNING", **variables: str) -> tuple[int, list[str]]:
        given = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node-[0-1]", "SLURM_NNODES": "2"}
        given |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code), "STATE": state, **variables}
        program = f"set -euo pipefail; source {FOLDER / 'environment.sh'}; {line}"
        done = subprocess.run(["bash", "-c", program], cwd=tmp_path, env=given, capture_output=True, text=True)
        return done.returncode, calls.read_text().splitlines()

    return run


Slurm = Callable[..., tuple[int, list[str]]]


@pytest.mark.parametrize(
    ("code", "state", "again"),
    [(75, "RUNNING", True), (75, "COMPLETING", False), (0, "RUNNING", False), (2, "RUNNING", False)],
)
def test_only_a_job_that_asks_for_it_and_was_not_cancelled_is_queued_again(
    code: int, state: str, again: bool, slurm: Slurm
) -> None:
    ended, calls = slurm("on_each_node recipes.train a=1", code=code, state=state)
    assert ended == code
    assert ("scontrol requeue 12345" in calls) == again


def test_a_slurm_that_does_not_answer_for_a_moment_is_asked_again(slurm: Slurm) -> None:
    """Its answer is empty. The job was not cancelled as far as anybody knows, and has saved its work."""
    ended, calls = slurm("on_each_node recipes.train a=1", code=75, state="")
    assert ended == 75 and "scontrol requeue 12345" in calls
    assert 1 < sum(call.startswith("squeue") for call in calls) < 10 and any(call.startswith("sleep") for call in calls)


def test_launchers_are_told_how_many_they_are_and_where_they_meet(slurm: Slurm) -> None:
    _, calls = slurm("on_each_node recipes.train a=1 b=2")
    (started,) = [call for call in calls if call.startswith("srun")]
    port = 20000 + 12345 % 12000
    assert started.endswith(f" recipes.train --nnodes 2 --rdzv-endpoint node-0:{port} --rdzv-id 12345.0 a=1 b=2")
    assert '--node-rank "$SLURM_NODEID"' in started  # read on each node, not here
    _, calls = slurm("on_each_node recipes.train", TGDPO_RENDEZVOUS="10.0.0.7", SLURM_RESTART_COUNT="3")
    assert calls[-1].endswith(f"--rdzv-endpoint 10.0.0.7:{port} --rdzv-id 12345.3")


def test_a_container_is_used_where_one_is_named(slurm: Slurm, tmp_path: Path) -> None:
    _, calls = slurm("once tools.prepare_pairs pairs.jsonl")
    assert "container" not in calls[-1]
    _, calls = slurm("once tools.prepare_pairs pairs.jsonl", TGDPO_CONTAINER="image.sqsh", TGDPO_MOUNTS="/a:/a")
    options = f"--container-image=image.sqsh --container-mounts=/a:/a --container-workdir={tmp_path}"
    assert calls[-1].endswith(f"{options} python -m tgdpo_megatron tools.prepare_pairs pairs.jsonl")


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
    assert re.search(r'"\$@"|"\$\{@:[24]\}"', ending)  # some have arguments of their own before those
    assert "set -euo pipefail" in script.read_text()


@each_script
def test_one_launcher_runs_on_each_node_and_a_warned_training_is_queued_again(script: Path) -> None:
    given, text = options(script), script.read_text()
    if "on_each_node" in text:
        assert given["ntasks-per-node"] == "1" and "gpus-per-node" in given
        assert given["signal"].startswith("B:USR1@")
    else:
        assert given["ntasks"] == "1" and ("gpus-per-node" in given) == (script.stem in ("sample", "serve"))
    if "recipes.train" in text:
        assert "train.resume=true" in text


def test_parts_of_the_prompts_are_sampled_by_a_server_that_ends_with_the_job(slurm: Slurm, tmp_path: Path) -> None:
    """vLLM is a script here, which listens and answers."""
    (tmp_path / "slurm").symlink_to(FOLDER)
    (tmp_path / "bin").mkdir()
    vllm = tmp_path / "bin" / "vllm"
    server = "import http.server as h, sys; h.test(h.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind='127.0.0.1')"
    lines = ['echo "vllm $*" >>calls', "touch health", "echo $$ >id", f'exec {sys.executable} -c "{server}" "$6"']
    vllm.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    vllm.chmod(0o755)
    arguments = "runs/on-policy runs/start-hf prompts.txt --n 5"
    code, calls = slurm(
        f"set -- {arguments}; source slurm/serve.sbatch",
        SLURM_JOB_ID=str(os.getpid()),
        SLURM_ARRAY_TASK_ID="2",
        SLURM_ARRAY_TASK_MAX="4",
        TGDPO_VLLM=str(tmp_path),
    )
    port = 20000 + os.getpid() % 12000
    assert code == 0
    assert calls[0] == f"vllm serve runs/start-hf --host 127.0.0.1 --port {port} --data-parallel-size 8"
    assert calls[-1].endswith(
        "python -m tgdpo_megatron tools.sample --output runs/on-policy/answers-002.jsonl --shard 2/4 "
        f"--engine http --url http://127.0.0.1:{port} runs/start-hf prompts.txt --n 5"
    )
    assert not Path(f"/proc/{(tmp_path / 'id').read_text().strip()}").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {},
            r"slurm/serve\.sbatch: line \d+: TGDPO_VLLM: is not set; name the virtual environment of .*\n",
        ),
        ({"TGDPO_VLLM": "no"}, r".*no/bin/vllm: No such .*\nvLLM's server did not start; what it said is above\n"),
    ],
)
def test_a_server_that_cannot_be_started_is_said_so_and_nothing_else(given: dict[str, str], said: str) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "TGDPO_VLLM"}
    done = subprocess.run(
        ["bash", "slurm/serve.sbatch", "runs/on-policy", "runs/start-hf", "prompts.txt"],
        cwd=FOLDER.parent,
        env={**variables, "SLURM_JOB_ID": str(os.getpid()), **given},
        capture_output=True,
        text=True,
    )
    assert done.returncode not in (0, 75) and re.fullmatch(said, done.stderr), done.stderr


def test_parts_that_are_submitted_again_are_the_same_parts(slurm: Slurm, tmp_path: Path) -> None:
    """sbatch --array=1,3, after --array=1-4 of which two jobs failed."""
    (tmp_path / "slurm").symlink_to(FOLDER)
    line = "set -- runs/on-policy runs/start-hf prompts.txt; source slurm/sample.sbatch"
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "3", "SLURM_ARRAY_TASK_COUNT": "2"}
    for variables, shard in ((array | {"TGDPO_PARTS": "4"}, "3/4"), (array, "3/3"), ({}, "1/1")):
        code, calls = slurm(line, **variables)
        assert code == 0 and f" --shard {shard} runs/start-hf prompts.txt" in calls[-1]


def test_make_slurm_says_what_it_lacks_before_it_installs_or_starts_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was started"))
    assert cluster.missing() == "a local Slurm needs root"
