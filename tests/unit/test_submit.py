"""What tools.submit asks of sbatch, and that a job's machines are those of its settings."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.settings import Command, read_command_line
from tests.support import hub
from tests.support.public_models import PUBLIC_MODELS
from tests.unit.test_align import inputs as _inputs
from tgdpo_megatron.errors import UserError
from tools.submit import STAGES

ROOT = Path(__file__).resolve().parents[2]
inputs = _inputs


def submit(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.submit", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)


def dry_run(*arguments: str) -> dict[str, list[str]]:
    """Stage -> the words of its sbatch command."""
    done = submit(*arguments, "--dry-run")
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert all(words[:2] == ["sbatch", "--parsable"] for words in commands)
    return {words[2].removeprefix("--job-name="): words for words in commands}


@pytest.fixture
def full(inputs: tuple[str, str], tmp_path: Path) -> dict[str, list[str]]:
    """All stages, on two nodes of four GPUs, with a guidance model that is trained."""
    cluster = ("cluster.nodes=2", "cluster.gpus_per_node=4")
    return dry_run(*inputs, *cluster, f"train.output={tmp_path / 'out'}", "guidance.optimizer.lr=1e-6")


def test_every_stage_waits_for_the_success_of_the_one_before_it(full: dict[str, list[str]]) -> None:
    stages = ["prepare", "convert", "guidance", "score", "train", "export"]
    assert list(full) == stages
    assert not any(word.startswith("--dependency") for word in full["prepare"])
    for before, stage in zip(stages, stages[1:], strict=False):
        assert f"--dependency=afterok:<{before}>" in full[stage] and "--kill-on-invalid-dep=yes" in full[stage]


def test_stages_with_gpus_ask_for_those_of_the_settings_and_no_other_does(full: dict[str, list[str]]) -> None:
    for stage, words in full.items():
        assert ({"--nodes=2", "--gpus-per-node=4"} <= set(words)) == (stage in ("guidance", "score", "train"))


def test_stages_read_what_the_stages_before_them_write(full: dict[str, list[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert str(out / "pairs" / "train") in full["prepare"] and "data.max_length=512" in full["prepare"]
    for stage in ("guidance", "score", "train"):
        assert full[stage][-1] == f"data.train={out / 'pairs' / 'train'}"  # the last one holds
    assert "optimizer.lr=1e-6" in full["guidance"] and "optimizer.lr=1e-6" not in full["train"]
    assert f"model.guidance={out / 'guidance'}" in full["score"]
    assert f"scores.path={out / 'scores'}" in full["score"] and f"scores.path={out / 'scores'}" in full["train"]
    assert full["export"][-2:] == [str(out / "policy"), str(out / "hf")]


def test_scripts_exist_and_logs_are_in_the_runs_folder(full: dict[str, list[str]], tmp_path: Path) -> None:
    for stage, words in full.items():
        (script,) = (word for word in words if word.endswith(".sbatch"))
        assert (ROOT / script).is_file()
        assert f"--output={tmp_path / 'out' / 'logs'}/{stage}-%j.log" in words


def test_a_part_of_the_chain_reads_the_pairs_as_they_are_while_they_are_not_prepared(inputs: tuple[str, str]) -> None:
    part = dry_run(*inputs, "--from", "score", "--until", "train")
    assert list(part) == ["score", "train"]
    assert part["train"].count(inputs[1]) == 1 and not any("/pairs/train" in word for word in part["train"])


def test_a_sweep_is_an_array_with_a_task_for_each_pair_of_values(inputs: tuple[str, str]) -> None:
    guidance = inputs[0].replace("checkpoint", "guidance")
    jobs = dry_run(*inputs, "train.output=runs/x", guidance, "--alphas", "0.25,.50, 1.0", "--betas", "1e-1,0.2")
    assert list(jobs) == ["prepare", "convert", "score", "sweep"]
    assert "--array=0-5" in jobs["sweep"]
    script = jobs["sweep"].index("slurm/sweep.sbatch")
    assert jobs["sweep"][script + 1 : script + 4] == ["0.25,0.5,1", "0.1,0.2", "runs/x/sweep"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--alphas", "1,much"], "--alphas '1,much': 'much' is no number"),
        (["--alphas", "0.5,"], "--alphas '0.5,': '' is no number"),
        (["--alphas", ""], "--alphas '': '' is no number"),
        (["--alphas", "1,nan"], "loss.alpha='nan' is refused"),
        (["--betas", "0.5,1,.50"], "--betas '0.5,1,.50': 0.5 is given twice"),
        (["--from", "sweep"], "--from sweep: a sweep needs --alphas or --betas"),
        (["--until", "sweep"], "--until sweep: a sweep needs --alphas or --betas"),
        (["--alphas", "1,2", "--until", "train"], "the sweep, which --until train leaves out"),
        (["train.resume=false"], "train.resume=false: a queued training always goes on from its newest checkpoint"),
        (["guidance.train.resume=false"], "train.resume=false: a queued training always"),
        (
            ["cluster.gpus_per_node=3", "parallel.tensor_model_parallel_size=2"],
            "3 processes are no multiple of the 2 that one copy of the model takes",
        ),
        (["model.guidance=/no/such"], "/no/such: no such folder"),
        (["data.validation=nowhere.jsonl"], "nowhere.jsonl: no such data file"),
        (["--betas", "0.1,-1"], "loss.beta=-1 is refused"),
        (["loss.type=dpo", "--betas", "0.1"], "loss.type=dpo has no alpha"),
        (["--from", "train", "--until", "score"], "leaves no stage; those of these settings are prepare, convert"),
    ],
)
def test_what_cannot_be_queued_is_refused_in_a_sentence(
    arguments: list[str], sentence: str, inputs: tuple[str, str]
) -> None:
    done = submit(*inputs, *arguments, "--dry-run")
    assert done.returncode == 2 and sentence in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_large_recipe_asks_for_its_own_nodes() -> None:
    jobs = dry_run("--conf", "conf/tgdpo-qwen25_72b_8x8-ultrafeedback.yaml")
    assert list(jobs) == ["prepare", "convert", "guidance", "score", "train", "export"]
    assert {"--nodes=8", "--gpus-per-node=8"} <= set(jobs["train"])
    assert "--recipe=dpo_qwen25_72b_8x8" in jobs["guidance"]


def test_the_70b_commands_of_the_page_run_where_the_hub_is_cached(tmp_path: Path) -> None:
    """With the model's own config.json in the cache; nothing else is read, and no hub is asked."""
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    section = page[page.index("\n## A 70B model\n") : page.index("\n## Watching\n")]
    planned, submitted = re.findall("^```\npython (.+?)\n```$", section, flags=re.MULTILINE | re.DOTALL)
    shape, _ = PUBLIC_MODELS["Llama-3.3-70B"]  # the sizes of Llama-3-70B
    files = {"config.json": json.dumps(shape).encode(), "tokenizer.json": b"{}"}
    hub.put_into_cache(hub.Repo("meta-llama/Meta-Llama-3-70B-Instruct", files), tmp_path / "hf" / "hub")
    shown = hub.run(*shlex.split(planned), env=hub.environment(tmp_path))
    assert shown.returncode == 0, shown.stderr
    assert "52.7 GiB of 80.0 GiB: fits" in shown.stdout and "987.8 GB for each of at most 3 checkpoints" in shown.stdout
    queued = hub.run(*shlex.split(submitted), "--dry-run", env=hub.environment(tmp_path))
    assert queued.returncode == 0, queued.stderr
    assert queued.stdout.count("--nodes=4 --gpus-per-node=8") == 3  # guidance, score, train


def test_without_slurm_it_says_so_and_leaves_nothing_behind(inputs: tuple[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = submit(*inputs, "model.guidance=" + inputs[0].partition("=")[2], f"train.output={output}", PATH="/nowhere")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "sbatch is not on this machine; submit from a login node of the cluster" in done.stderr
    assert not output.exists()


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Variables with which a Slurm is found that counts jobs from 1 and writes down how its commands were called.

    sbatch refuses a job once there is a file `full`; squeue shows the ids in the file `queue`.
    """
    refusal = "echo 'sbatch: warning: slow' >&2; echo 'sbatch: error: Batch job submission failed: No account' >&2"
    answers = {
        "sbatch": f'[[ -e full && -s calls ]] && {{ {refusal}; exit 1; }}; echo "$*" >>calls; wc -l <calls',
        "squeue": "cat queue",
        "scancel": 'echo "scancel $*" >>calls',
    }
    (commands := tmp_path / "slurm").mkdir()
    for name, answer in answers.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\ncd {commands}\n{answer}\n")
        (commands / name).chmod(0o755)
    (commands / "queue").touch()
    return {"PATH": f"{commands}:{os.environ['PATH']}"}


def test_a_folder_that_queued_jobs_will_write_is_queued_once(
    inputs: tuple[str, str], slurm: dict[str, str], tmp_path: Path
) -> None:
    arguments = [*inputs, inputs[0].replace("checkpoint", "guidance"), f"train.output={tmp_path / 'out'}"]
    first = submit(*arguments, **slurm)
    assert first.returncode == 0, first.stderr
    stages = ["prepare", "convert", "score", "train", "export"]
    ids = {str(place): stage for place, stage in enumerate(stages, start=1)}
    assert json.loads((tmp_path / "out" / "jobs.json").read_text()) == ids
    (tmp_path / "slurm" / "queue").write_text("4\n5\n77\n")
    again = submit(*arguments, "--from", "hf", **slurm)
    assert again.returncode == 2 and "are queued already: 4 (train), 5 (export);" in again.stderr
    (tmp_path / "slurm" / "queue").write_text("77\n")
    after = submit(*arguments, "--from", "hf", **slurm)
    assert after.returncode == 0 and after.stdout.startswith("6 ")


def test_where_slurm_refuses_a_job_the_others_are_cancelled_and_nothing_is_left(
    inputs: tuple[str, str], slurm: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "slurm" / "full").touch()  # after the first job
    done = submit(*inputs, inputs[0].replace("checkpoint", "guidance"), f"train.output={tmp_path / 'out'}", **slurm)
    assert done.returncode == 2
    assert done.stderr.endswith("stage convert, so nothing is queued: Batch job submission failed: No account\n")
    assert "warning" not in done.stderr
    assert (tmp_path / "slurm" / "calls").read_text().splitlines()[1:] == ["scancel 1"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("theirs", "ours"), [("scores", "score"), ("policy", "train"), ("hf", "export")])
def test_stages_have_their_names_of_recipes_align_as_well(theirs: str, ours: str, inputs: tuple[str, str]) -> None:
    assert list(dry_run(*inputs, "--from", theirs, "--until", theirs)) == [ours]


def test_help_begins_with_its_own_options_and_the_stages() -> None:
    shown = submit("--help").stdout
    own = shown.partition("--recipe NAME |")[2].partition("arguments:")[0]
    assert all(word in own for word in ("--from", "--until", "--alphas", "--betas", "--dry-run", *STAGES))


def command(*arguments: str) -> Command:
    return read_command_line("recipes.train", "", arguments)


def test_a_program_starts_as_many_ranks_as_the_settings_say_unless_its_command_says_otherwise() -> None:
    assert command("cluster.gpus_per_node=4").processes == 4
    assert command("cluster.gpus_per_node=4", "--nproc-per-node", "2").processes == 2
    assert command("--recipe", "tgdpo_llama3_70b_4x8").ranks == 32
    assert command().ranks == 1


@pytest.mark.parametrize(
    ("arguments", "gpus", "sentence"),
    [
        (["cluster.nodes=4"], "", "cluster.nodes=4, but this job is started on 1;"),
        (["cluster.gpus_per_node=2"], "8", "cluster.gpus_per_node=2, but Slurm gave this job 8 of each node"),
    ],
)
def test_a_job_on_other_machines_than_its_settings_say_is_refused(
    arguments: list[str], gpus: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", gpus)
    with pytest.raises(UserError, match=sentence):
        command(*arguments).check_machines()


def test_a_job_without_settings_of_machines_takes_those_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    command("--nproc-per-node", "2").check_machines()
