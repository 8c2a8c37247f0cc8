"""Mistakes of the program itself, planted in the real programs: they show themselves, and nothing hangs."""

from __future__ import annotations

import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.faults.test_bad_inputs import ROOT, Said, assert_refused, end_of, environment, say, settings, wait_for
from tests.support.planted import planted
from tests.support.program import run_ranks

TWO_RANKS = ["--nproc-per-node=2", "parallel.tensor_model_parallel_size=2"]
A_BUG_IN_TOKENISING = """
import tgdpo_megatron.data.prepare as prepare

def broken(*_):
    assert False, "a planted mistake"

prepare._encode = broken
"""
A_BUG_ON_RANK_1 = """
import tgdpo_megatron.data.prepare as prepare

def broken(*_):
    return {}["a planted mistake"]

if os.environ["RANK"] == "1":
    prepare.load_prepared = broken
"""
NO_LARGE_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, {bytes}))
"""


@pytest.fixture
def train(checkpoint: Path, pairs_file: Path, tmp_path: Path) -> Callable[..., Said]:
    """A function that runs a small DPO training with a mistake planted in it, to `tmp_path/run`."""

    def run(mistake: str, *changes: str, ranks: int = 1, **environment: str) -> Said:
        layout = TWO_RANKS if ranks == 2 else []
        plant = planted(tmp_path, mistake, launched=ranks > 1)
        arguments = [*settings(checkpoint, pairs_file, tmp_path / "run"), *layout, *changes]
        return say("recipes.train", *arguments, **plant, **environment)

    return run


def lines_of(rank: int, said: Said) -> list[str]:
    """What a rank wrote of its traceback."""
    return [line for line in said.err.splitlines() if line.startswith(f"[rank {rank}] ")]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_mistake_in_the_first_ranks_work_keeps_its_traceback_and_the_run_folder(
    ranks: int, train: Callable[..., Said], tmp_path: Path
) -> None:
    said = train(A_BUG_IN_TOKENISING, ranks=ranks)
    assert said.code == 1, said.err
    traceback = lines_of(0, said)
    assert traceback[0] == "[rank 0] Traceback (most recent call last):", said.err
    assert any("data/prepare.py" in line and "in _tokenise" in line for line in traceback)
    assert traceback[-1] == "[rank 0] AssertionError: a planted mistake"
    assert not lines_of(1, said), said.err
    assert len(said.errors) == 1, said.err
    assert said.errors[0].startswith("error: rank 0 failed with AssertionError: a planted mistake")
    assert (tmp_path / "run").is_dir()


def test_a_mistake_on_another_rank_is_shown_by_that_rank(train: Callable[..., Said], tmp_path: Path) -> None:
    said = train(A_BUG_ON_RANK_1, ranks=2)
    assert said.code == 1, said.err
    assert lines_of(1, said)[-1] == "[rank 1] KeyError: 'a planted mistake'", said.err
    assert not lines_of(0, said), said.err
    assert len(said.errors) == 1 and "rank 1 failed with KeyError" in said.errors[0], said.err
    assert "lines that begin with [rank 1]" in said.errors[0]
    assert (tmp_path / "run" / "data").is_dir()


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_operating_system_refusing_the_first_ranks_work_is_one_sentence_and_leaves_nothing(
    ranks: int, train: Callable[..., Said], tmp_path: Path
) -> None:
    """Files may have 1,200 bytes; the tokenised pairs have more."""
    said = train(NO_LARGE_FILES.format(bytes=1200), ranks=ranks)
    assert_refused(said, "the operating system refused with 'File too large'", "TGDPO_DEBUG=1")
    assert not (tmp_path / "run").exists()


def test_memory_that_runs_out_in_the_first_ranks_work_is_explained_once_for_all(
    train: Callable[..., Said], tmp_path: Path
) -> None:
    said = train(A_BUG_IN_TOKENISING.replace("assert False, ", "raise MemoryError #"), ranks=2)
    assert_refused(said, "rank 0 ran out of memory: by the planner's arithmetic its configuration needs ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_that_the_operating_system_refuses_is_one_sentence_and_the_one_before_is_kept(
    ranks: int, train: Callable[..., Said], checkpoint: Path, tmp_path: Path
) -> None:
    """Weights and optimizer state have more than 400 KiB."""
    said = train(NO_LARGE_FILES.format(bytes=400 << 10), ranks=ranks)
    assert_refused(said, f"{tmp_path / 'run' / 'checkpoints' / 'iter-0000002'}: the checkpoint cannot be written (")
    assert (tmp_path / "run" / "config.yaml").is_file()
    assert not list((tmp_path / "run").glob("checkpoints/*/manifest.json"))


def test_a_refused_input_shows_its_traceback_only_while_debugging(train: Callable[..., Said], tmp_path: Path) -> None:
    """And the cause beneath it, which the sentence left out."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": \n')
    said = train("pass", f"data.train={bad}", TGDPO_DEBUG="1")
    assert said.code == 2 and len(said.errors) == 1 and "line 1: not valid JSON" in said.errors[0], said.err
    assert "\njson.decoder.JSONDecodeError: " in said.err and "\ntgdpo_megatron.errors.UserError: " in said.err
    assert not (tmp_path / "run").exists(), "an empty folder that is in use would be refused next time"
    assert_refused(train("pass", f"data.train={bad}"), "line 1: not valid JSON")


# ---------------------------------------------------------------- long work of the first rank


def test_tokenising_may_take_longer_than_any_collective(checkpoint: Path, pairs_file: Path, tmp_path: Path) -> None:
    """12 seconds and more, where a collective has 8."""
    started = time.monotonic()
    pairs = run_ranks(
        "tests.support.first_rank",
        "load_slowly",
        2,
        timeout_minutes=8 / 60,
        checkpoint=str(checkpoint),
        pairs=str(pairs_file),
        folder=str(tmp_path / "data"),
        seconds_per_pair=2,
    )
    assert pairs == 6 and time.monotonic() - started > 12


@dataclass(frozen=True)
class Job:
    """A training that runs beside the test: its launcher, and what it says."""

    launcher: psutil.Popen
    out: Path
    err: Path

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        (found,) = (child for child in self.launcher.children() if child.environ().get("RANK") == str(number))
        return found


@contextmanager
def started(*arguments: str, folder: Path, **changes: str) -> Iterator[Job]:
    """Start a training; at the end of the block, none of its processes is left."""
    mark, out, err = uuid.uuid4().hex, folder / "stdout", folder / "stderr"
    command = [sys.executable, "-m", "recipes.train", *arguments]
    with out.open("w") as to_out, err.open("w") as to_err:
        launcher = psutil.Popen(command, cwd=ROOT, env=environment(mark, **changes), stdout=to_out, stderr=to_err)
    try:
        yield Job(launcher, out, err)
    finally:
        left = end_of(mark)
    assert not left, f"still running after the job ended: {left}"


SLOW_TOKENISING = """
import time
import tgdpo_megatron.data.prepare as prepare

def slow(*_):
    print("tokenising", flush=True)
    time.sleep(600)

prepare._encode = slow
"""


def test_a_first_rank_that_is_killed_while_others_wait_ends_the_job(
    checkpoint: Path, pairs_file: Path, tmp_path: Path
) -> None:
    plant = planted(tmp_path, SLOW_TOKENISING, launched=True)
    arguments = [*settings(checkpoint, pairs_file, tmp_path / "run"), *TWO_RANKS]
    with started(*arguments, folder=tmp_path, **plant) as job:
        wait_for(lambda: "tokenising" in job.out.read_text(), seconds=60, job=job.launcher)
        time.sleep(1)  # the other rank is waiting by now
        job.rank(0).kill()
        code = job.launcher.wait(timeout=30)
    assert code == 1
    assert "error: rank 0 was ended by SIGKILL; all ranks were stopped" in job.err.read_text()


# ---------------------------------------------------------------- looking into a run


def test_a_signal_to_the_launcher_shows_where_every_rank_is_and_the_run_goes_on(
    checkpoint: Path, pairs_file: Path, tmp_path: Path
) -> None:
    changes = ["train.train_iters=30", "train.save_interval=10"]
    arguments = [*settings(checkpoint, pairs_file, tmp_path / "run"), *TWO_RANKS, *changes]
    with started(*arguments, folder=tmp_path) as job:
        wait_for(lambda: bool(list(tmp_path.glob("run/checkpoints/*/manifest.json"))), seconds=60, job=job.launcher)
        job.launcher.send_signal(signal.SIGUSR2)
        assert job.launcher.wait(timeout=120) == 0, job.err.read_text()
    said = job.err.read_text()
    _, *stacks = re.split(r"rank [01] is process \d+, which is at:", said)
    assert len(stacks) == 2, said
    assert all("(most recent call first):" in stack and "tgdpo_megatron/train.py" in stack for stack in stacks), said
    assert (tmp_path / "run" / "checkpoints" / "iter-0000030" / "manifest.json").is_file()


def test_debugging_brings_back_what_libraries_say_and_keeps_a_log_of_each_rank(
    train: Callable[..., Said], tmp_path: Path
) -> None:
    said = train("pass", ranks=2, TGDPO_DEBUG="1")
    assert said.code == 0, said.err
    assert "UserWarning: " in said.err
    logs = {path.name: path.read_text() for path in (tmp_path / "run" / "logs").iterdir()}
    assert sorted(logs) == ["rank-0.log", "rank-1.log"]
    for rank in (0, 1):
        log = logs[f"rank-{rank}.log"]
        assert f"rank {rank} is process " in log and f"rank {1 - rank} is process " not in log
        assert "UserWarning: " in log, "what was said on stderr"
    assert " INFO megatron.core.distributed.distributed_data_parallel: " in logs["rank-0.log"]
    assert "dpo in " in logs["rank-0.log"] and "done: " in logs["rank-0.log"], "what was said on stdout"


def test_a_run_that_failed_while_debugging_can_be_started_again(train: Callable[..., Said], tmp_path: Path) -> None:
    """Its logs are no run. Without debugging nothing is logged, and libraries are silent."""
    assert train(A_BUG_IN_TOKENISING, TGDPO_DEBUG="1").code == 1
    log = tmp_path / "run" / "logs" / "rank-0.log"
    assert "[rank 0] AssertionError: a planted mistake" in log.read_text()
    before = log.read_text()
    said = train("pass")
    assert said.code == 0 and "Warning" not in said.err and "INFO" not in said.err, said.err
    assert log.read_text() == before


NOT_FINITE_GRADIENT = """
import torch

real = torch.nn.functional.logsigmoid

def with_infinite_slope(margin):
    return real(margin) + (0 * margin).sqrt()

torch.nn.functional.logsigmoid = with_infinite_slope
"""


def test_anomaly_detection_names_the_operation_whose_gradient_is_not_finite(train: Callable[..., Said]) -> None:
    """And, while debugging, the line of the forward pass that made it."""
    at_once = "train.max_skipped_steps=0"
    assert_refused(
        train(NOT_FINITE_GRADIENT, at_once), "the gradient of step 1 (rows ", " is not finite, because of row "
    )
    said = train(NOT_FINITE_GRADIENT, "train.resume=true", TGDPO_DEBUG="1", TGDPO_DETECT_ANOMALY="1")
    assert said.code == 1, said.err
    assert "Function 'MulBackward0' returned nan values" in said.errors[0]
    assert "Traceback of forward call that caused the error" in said.err and "in with_infinite_slope" in said.err
