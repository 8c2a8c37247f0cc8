"""The project as pip installs it: without network, beside the same packages, and far from the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tgdpo_megatron.commands import PROGRAMS

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("recipes", "tools", "conf", "slurm")
"""Folders of the repository that lie inside of the package once it is installed."""
Program = Callable[..., str]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that sees the packages of this one, and into which pip has installed the project."""
    made = tmp_path_factory.mktemp("environment")
    source = made / "source"
    for name in ("tgdpo_megatron", *BESIDE):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    venv.create(made / "venv", symlinks=True)
    (site_packages(made / "venv") / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [made / "venv/bin/python", "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, source], cwd=made, env=surroundings(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return made / "venv"


def site_packages(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def surroundings(**variables: str) -> dict[str, str]:
    """Nothing in them leads to the repository."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "TGDPO_"))}
    return outside | {"OMP_NUM_THREADS": "1", **variables}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pairs_file: Path) -> Path:
    """A user's folder, with folders of the same names as ours."""
    made = tmp_path_factory.mktemp("user")
    for name in ("recipes", "tools", "tgdpo_megatron"):
        (made / name).mkdir()
        (made / name / "__init__.py").write_text("raise SystemExit('not the program, but a folder of the user')\n")
    shutil.copy(pairs_file, made / "pairs.jsonl")
    return made


@pytest.fixture(scope="module")
def program(environment: Path, folder: Path) -> Program:
    """A function that runs a command of the environment in the user's folder. Returns what it says."""

    def run(*command: str, code: int = 0) -> str:
        words = [str(environment / "bin" / command[0]), *command[1:]]
        cache = {"TGDPO_CACHE": str(environment.parent / "cache")}
        done = subprocess.run(words, cwd=folder, env=surroundings(**cache), capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    return run


def test_the_wheel_holds_every_file_of_the_project_in_one_package(environment: Path) -> None:
    installed = site_packages(environment)
    ours = {path.name for path in installed.iterdir()} - {"packages.pth", "__pycache__"}
    assert sorted(name.partition("-")[0] for name in ours) == ["tgdpo_megatron", "tgdpo_megatron"]
    places = {ROOT / "tgdpo_megatron": Path("tgdpo_megatron")}
    places |= {ROOT / name: Path("tgdpo_megatron", "repository", name) for name in BESIDE}
    expected = {place / path.relative_to(folder) for folder, place in places.items() for path in files_in(folder)}
    assert {path.relative_to(installed) for path in files_in(installed / "tgdpo_megatron")} == expected


@pytest.mark.parametrize("script", sorted(PROGRAMS))
def test_every_console_script_explains_itself_by_the_names_that_are_installed(script: str, program: Program) -> None:
    said = program(script, "--help")
    assert said.strip() and [module for module in PROGRAMS.values() if module in said] == []


def test_a_program_has_the_name_that_is_installed_also_where_a_job_starts_it(program: Program) -> None:
    assert program("python", "-P", "-m", "tgdpo_megatron", "tools.runs", "--help").startswith("usage: tgdpo-runs ")


def test_a_whole_chain_runs_far_from_the_repository(program: Program, folder: Path) -> None:
    """From a model to a scored, trained, exported and viewed one, on two ranks that our launcher starts."""
    program("tgdpo-tiny-model", "pairs.jsonl", "hf")
    assert "log-probs differ from HuggingFace's by at most" in program("tgdpo-convert", "hf", "start")
    program("tgdpo-convert", "hf", "guidance", "--no-certificate")
    job = (
        "--recipe=tgdpo_tiny",
        "--nproc-per-node=2",
        "parallel.tensor_model_parallel_size=2",
        "data.train=pairs.jsonl",
    )
    models = ("model.checkpoint=start", "model.guidance=guidance", "model.require_certificate=false")
    assert "pairs were scored now" in program("tgdpo-score", *job, *models, "scores.path=scores")
    training = (*job, models[0], "scores.path=scores", "train.train_iters=2", "train.global_batch_size=4")
    said = program("tgdpo-train", *training, "train.output=run")
    assert "; optimizer: torch's AdamW\n" in said
    assert said.splitlines()[-1] == "export      tgdpo-export run/checkpoints/iter-0000002 run/hf"
    report = (folder / "run" / "report.html").read_text()
    assert {"<span>tgdpo-train</span>", "<span>tgdpo-export</span>", "<span>tgdpo-view</span>"} <= set(
        re.findall(r"<span>[\w.-]+</span>", report)
    )
    program("tgdpo-view", "run")
    program("tgdpo-export", "run", "aligned")
    assert (folder / "run" / "view.html").is_file() and (folder / "aligned" / "config.json").is_file()


def test_all_stages_in_one_command_are_named_as_they_are_started(program: Program) -> None:
    program("tgdpo-tiny-model", "pairs.jsonl", "align-hf")
    settings = (
        "train.train_iters=1",
        "train.global_batch_size=4",
        "data.train=pairs.jsonl",
        "train.output=aligned-run",
    )
    said = program("tgdpo-align", "--recipe=tgdpo_tiny", "model.checkpoint=align-hf", *settings)
    stages = [line.split()[1] for line in said.splitlines() if line.startswith("$ ")]
    assert stages == ["tgdpo-train", "tgdpo-score", "tgdpo-train", "tgdpo-export"]
    again = program("tgdpo-align", "--recipe=tgdpo_tiny", "model.checkpoint=align-hf", *settings)
    assert again.count("finished before") == 4


def test_torchrun_starts_the_ranks_as_well(program: Program, environment: Path) -> None:
    program("tgdpo-tiny-model", "pairs.jsonl", "torchrun-hf")
    program("tgdpo-convert", "torchrun-hf", "torchrun-start", "--no-certificate")
    settings = ("model.checkpoint=torchrun-start", "model.require_certificate=false", "data.train=pairs.jsonl")
    program(
        *("python", "-m", "torch.distributed.run", "--nproc_per_node=2"),
        *(str(environment / "bin" / "tgdpo-train"), "--recipe=dpo_tiny", *settings),
        *("train.train_iters=1", "train.global_batch_size=4", "train.micro_batch_size=2", "train.output=torchrun"),
    )


def test_experiments_and_scripts_are_found(program: Program, environment: Path) -> None:
    program("tgdpo-tiny-model", "pairs.jsonl", "conf-hf")
    plan = program(
        "tgdpo-plan", "--conf", "conf/dpo-gemma2_2b-ultrafeedback.yaml", "--model", "conf-hf", "--memory", "80"
    )
    assert "8 ranks" in plan
    settings = ("model.checkpoint=conf-hf", "model.guidance=conf-hf", "data.train=pairs.jsonl")
    queued = program("tgdpo-submit", "--recipe=tgdpo_tiny", *settings, "--dry-run").splitlines()
    folder = site_packages(environment) / "tgdpo_megatron" / "repository" / "slurm"
    for line in queued:
        (script,) = [Path(word) for word in line.split() if word.endswith(".sbatch")]
        assert script.parent == folder and script.is_file() and f"--export=ALL,TGDPO_SLURM={folder}" in line


def test_a_mistake_is_one_sentence_that_names_the_console_script(program: Program) -> None:
    said = program("tgdpo-train", "--recipe=tgdpo_tiny", "model.checkpoint=nowhere", "data.train=pairs.jsonl", code=2)
    assert said.startswith("error: ") and said.count("\n") == 1
    assert program("tgdpo-view", code=2) == "error: command line: folder must be given; see tgdpo-view --help.\n"
