"""Bad input, as a user meets it: the real programs, started from a shell.

Each mistake gets one sentence on stderr and exit code 2, no traceback, and leaves nothing half-written. Here are those
that need more than one sentence to be compared; the others are a list, in tests/faults/inputs.
"""

from __future__ import annotations

import atexit
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.faults.inputs.forked import ForkedPrograms
from tests.faults.inputs.run import MARK, ROOT, end_of


@dataclass(frozen=True)
class Said:
    """What a program did: exit code, output, and how long it took."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def environment(mark: str, **changes: str) -> dict[str, str]:
    """A user's environment: nothing that tests set to stay offline, no job around it; marked to find its processes."""
    ours = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    return {name: value for name, value in os.environ.items() if name not in ours} | {MARK: mark} | changes


def say(module: str, *arguments: str, **changes: str) -> Said:
    """Run `python -m module` to its end, and assert that none of its processes outlives it.

    A program whose environment differs is started in a Python of its own, which may read it while it starts. Others are
    forks of a process that has imported torch and Megatron.
    """
    mark, started = uuid.uuid4().hex, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        variables = environment(mark, **changes)
        if changes:
            command = [sys.executable, "-m", module, *arguments]
            with out.open("w") as to_out, err.open("w") as to_err:
                done = subprocess.run(command, cwd=ROOT, env=variables, stdout=to_out, stderr=to_err, timeout=120)
            code: int | None = done.returncode
        else:
            code, *_ = _programs().ask([module, *arguments], ROOT, variables, scratch=Path(folder), seconds=120)
        assert code is not None, f"still running after 120 seconds\n{err.read_text()}"
        said = Said(code, out.read_text(), err.read_text(), time.monotonic() - started)
    left = end_of(mark)
    assert not left, f"still running after the program ended: {left}\n{said.err}"
    return said


@functools.cache
def _programs() -> ForkedPrograms:
    """This process's own, which live as long."""
    programs = ForkedPrograms()
    atexit.register(programs.close)
    return programs


def assert_refused(said: Said, *words: str) -> None:
    """Exit code 2 and exactly one error sentence, which holds these words."""
    everything = f"exit code {said.code}\n{said.out}\n{said.err}"
    assert said.code == 2, everything
    assert "Traceback" not in said.out + said.err, everything
    assert len(said.errors) == 1, everything
    assert all(word in said.errors[0] for word in words), said.errors[0]


@pytest.fixture
def train(checkpoint: Path, pairs_file: Path, tmp_path: Path) -> Callable[..., Said]:
    """A function that runs a small DPO training to `tmp_path/run`, with some settings changed."""

    def run(*changes: str, options: Sequence[str] = (), **environment: str) -> Said:
        return say(
            "recipes.train", *options, *settings(checkpoint, pairs_file, tmp_path / "run"), *changes, **environment
        )

    return run


NETWORK_WAIT = 25
"""Seconds. Programs that try a hub first give up after 27 to 54; a busy machine alone needs a few."""


def settings(checkpoint: Path, pairs: Path, output: Path) -> list[str]:
    return [
        "--recipe=dpo_tiny",
        f"model.checkpoint={checkpoint}",
        f"data.train={pairs}",
        f"train.output={output}",
        "data.max_length=64",
        "train.train_iters=2",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "optimizer.lr_warmup_iters=0",
    ]


# ---------------------------------------------------------------- packages


def test_a_foreign_apex_is_refused_at_start(train: Callable[..., Said], tmp_path: Path) -> None:
    """What Megatron does with it while it is imported must not come first."""
    (tmp_path / "site" / "apex").mkdir(parents=True)
    (tmp_path / "site" / "apex" / "__init__.py").touch()
    assert_refused(train(PYTHONPATH=str(tmp_path / "site")), "is not NVIDIA's apex", "uninstall it")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- data


def test_a_malformed_line_is_named_once_for_all_ranks(train: Callable[..., Said], tmp_path: Path) -> None:
    """With two ranks: the one that reads speaks for both, and neither is left waiting."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": \n')
    said = train(f"data.train={bad}", "parallel.tensor_model_parallel_size=2", options=["--nproc-per-node=2"])
    assert_refused(said, f"{bad} line 2: not valid JSON")
    assert not (tmp_path / "run").exists()


def test_a_token_budget_smaller_than_a_pair_is_refused_and_the_needed_one_named(
    train: Callable[..., Said], tmp_path: Path
) -> None:
    said = train("train.micro_batch_tokens=16")
    assert_refused(
        said, "the longest pair (row 3 of pairs.jsonl) has ", "does not fit train.micro_batch_tokens=16; raise it to "
    )
    match = re.search(r"raise it to (\d+) or more", said.errors[0])
    assert match
    assert train(f"train.micro_batch_tokens={match[1]}").code == 0, "the size it named is enough"


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_with_a_weight_that_is_not_finite_is_refused(
    checkpoint: Path, hf_model: Path, train: Callable[..., Said], tmp_path: Path
) -> None:
    """Changed on disk behind our back, so that only loading can find it."""
    from safetensors.numpy import load_file

    shutil.copytree(checkpoint, tmp_path / "megatron")
    before = load_file(hf_model / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    after = before.copy()
    after[0, 0] = math.nan
    (file,) = (p for p in (tmp_path / "megatron" / "weights").glob("*.distcp") if before.tobytes() in p.read_bytes())
    file.write_bytes(file.read_bytes().replace(before.tobytes(), after.tobytes()))
    said = train(f"model.checkpoint={tmp_path / 'megatron'}")
    assert_refused(said, str(tmp_path / "megatron"), "mlp.linear_fc2.weight", "not finite")
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "config.yaml").exists()


def test_a_checkpoint_with_damaged_metadata_is_refused(
    checkpoint: Path, train: Callable[..., Said], tmp_path: Path
) -> None:
    """torch prints a traceback of its own before it gives up; a user should not see it."""
    shutil.copytree(checkpoint, tmp_path / "megatron")
    (tmp_path / "megatron" / "weights" / ".metadata").write_bytes(b"damaged")
    said = train(f"model.checkpoint={tmp_path / 'megatron'}")
    assert_refused(said, f"{tmp_path / 'megatron' / 'weights' / '.metadata'}: the checkpoint's index is damaged")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_checkpoint_that_lost_a_part_is_refused(checkpoint: Path, train: Callable[..., Said], tmp_path: Path) -> None:
    """Megatron stumbles over this one with an error of its own."""
    shutil.copytree(checkpoint, tmp_path / "megatron")
    (tmp_path / "megatron" / "weights" / "common.pt").unlink()
    said = train(f"model.checkpoint={tmp_path / 'megatron'}")
    assert_refused(said, f"{tmp_path / 'megatron' / 'weights' / 'common.pt'}: this part of the checkpoint cannot be")
    assert not (tmp_path / "run").exists()


NO_NETWORK = """
import socket
from pathlib import Path

def refuse(*arguments, **_):
    Path({record!r}).write_text(repr(arguments))
    raise OSError("this test allows no look-up of another machine")

socket.getaddrinfo = socket.gethostbyname = refuse
"""


def test_a_path_that_is_no_name_on_a_hub_is_not_looked_for_there(train: Callable[..., Said], tmp_path: Path) -> None:
    """With the hub reachable as far as the program knows: one sentence, soon."""
    (tmp_path / "site").mkdir()
    record = tmp_path / "looked-up"
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_NETWORK.format(record=str(record)))
    said = train("model.checkpoint=models/meta-llama/Meta-Llama-3-8B-Instruct", PYTHONPATH=str(tmp_path / "site"))
    assert_refused(said, "models/meta-llama/Meta-Llama-3-8B-Instruct: no such folder; a model on a hub is named")
    assert not record.exists(), record.read_text()
    assert said.seconds < NETWORK_WAIT
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- while training


def test_a_training_that_explodes_saves_nothing_as_a_result(train: Callable[..., Said], tmp_path: Path) -> None:
    """At learning rate 1e15 the only step leaves finite weights whose products are not."""
    said = train("optimizer.lr=1e15", "train.train_iters=1")
    assert_refused(
        said, "error: the loss after step 1 (rows ", "of pairs.jsonl) is not finite; no checkpoint was saved"
    )
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_loss_that_is_not_finite_names_step_and_row_and_keeps_the_last_good_checkpoint(
    checkpoint: Path, pairs_file: Path, train: Callable[..., Said], tmp_path: Path
) -> None:
    """Scores of the third pair so low that its sums overflow."""
    from tgdpo_megatron.checkpoint.convert import megatron_to_hf

    scores = tmp_path / "scores"
    write_scores(scores, checkpoint, pairs_file, overflowing_row=3)
    settings = ["data.shuffle=false", "train.global_batch_size=1", "train.micro_batch_size=1"]
    settings.append("loss.sft_loss_weight=0.1")  # so that no loss is known beforehand: the scores are made up
    length = ["train.train_iters=5", "train.save_interval=1", "train.max_skipped_steps=0"]
    said = train("scores.source=cached", f"scores.path={scores}", *settings, *length)
    assert_refused(
        said, "the loss of step 3 (rows 3 of pairs.jsonl) is not finite, because of row 3 of ", "iter-0000002"
    )
    run = tmp_path / "run"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["iter-0000001", "iter-0000002"]
    megatron_to_hf(run / "checkpoints" / "iter-0000002", tmp_path / "exported")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    assert all(math.isfinite(value) for line in lines for value in line.values())


def write_scores(folder: Path, checkpoint: Path, pairs_file: Path, *, overflowing_row: int | None = None) -> None:
    """Reference scores of -1 nat a token, but for the rejected response of one row. A shard for each pair."""
    from tgdpo_megatron.checkpoint.manifest import HF, read_manifest
    from tgdpo_megatron.config import DataConfig
    from tgdpo_megatron.data.prepare import prepare_pairs
    from tgdpo_megatron.data.token_scores import ScoresManifest
    from tgdpo_megatron.data.tokenizer import load_tokenizer
    from tgdpo_megatron.scores.store import Key, write_scores_manifest, write_shard

    data = prepare_pairs(
        DataConfig(max_length=64), pairs_file, load_tokenizer(checkpoint / HF), folder.with_name("tokenised")
    )
    (folder / "train").mkdir(parents=True)
    for pair, row in enumerate(data.rows):
        numbers = {0: -1.0, 1: -3e38 if row == overflowing_row else -1.0}
        scores = {
            Key(data.hashes[pair].tobytes(), side, "reference"): np.full(data.response_length(pair, side), number)
            for side, number in numbers.items()
        }
        write_shard(folder / "train", scores)
    manifest = ScoresManifest(
        reference=read_manifest(checkpoint).weights,
        tokenizer=data.summary.tokenizer,
        template=data.summary.template,
        max_length=64,
        precision="fp32",
    )
    write_scores_manifest(folder / "train", manifest)


def test_a_rank_that_dies_ends_the_job_and_keeps_the_newest_checkpoint(
    checkpoint: Path, pairs_file: Path, tmp_path: Path
) -> None:
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
    from tgdpo_megatron.checkpoint.manifest import read_manifest
    from tgdpo_megatron.run_folder import newest_checkpoint

    run = tmp_path / "run"
    changes = ["parallel.tensor_model_parallel_size=2", "train.train_iters=100000", "train.save_interval=5"]
    command = [sys.executable, "-m", "recipes.train", "--nproc-per-node=2", *settings(checkpoint, pairs_file, run)]
    mark = uuid.uuid4().hex
    with open(tmp_path / "stderr", "w+") as err:
        job = psutil.Popen([*command, *changes], cwd=ROOT, env=environment(mark), stdout=subprocess.DEVNULL, stderr=err)
        try:
            wait_for(lambda: newest_checkpoint(run) is not None, seconds=60, job=job)
            second_rank(job).kill()
            code = job.wait(timeout=60)
        finally:
            left = end_of(mark)
    said = Said(code, "", (tmp_path / "stderr").read_text(), 0)
    assert said.code != 0 and "Traceback" not in said.err, said.err
    assert len(said.errors) == 1 and said.errors[0].startswith("error: rank 1 was ended by SIGKILL"), said.err
    assert not left, f"still running after the job ended: {left}"

    newest = newest_checkpoint(run)
    assert newest is not None
    megatron_to_hf(newest, tmp_path / "exported")
    assert hf_to_megatron(tmp_path / "exported", tmp_path / "again").weights == read_manifest(newest).weights


def second_rank(job: psutil.Popen) -> psutil.Process:
    """The process of rank 1."""
    (found,) = (
        process
        for process in job.children(recursive=True)
        if "recipes.train" in process.cmdline() and process.environ().get("RANK") == "1"
    )
    return found


def wait_for(ready: Callable[[], bool], *, seconds: float, job: psutil.Popen) -> None:
    """Wait until something is true, while the job runs."""
    end = time.monotonic() + seconds
    while not ready():
        assert job.poll() is None, f"ended with exit code {job.poll()}"
        assert time.monotonic() < end, f"nothing after {seconds} seconds"
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("{{ 'a' * 10 ** 10 }}", "the chat template takes more than 1024 MiB of memory"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "the chat template did not finish a conversation within 10 seconds",
        ),
    ],
    ids=["fills the memory", "loops"],
)
def test_a_template_that_means_harm_ends_the_program_in_one_sentence(
    harm: str, words: str, train: Callable[..., Said], tmp_path: Path
) -> None:
    template = tmp_path / "harm.jinja"
    template.write_text(harm)
    assert_refused(train(f"data.template={template}"), f"data.template={template}: {words}")
    assert not (tmp_path / "run").exists()
