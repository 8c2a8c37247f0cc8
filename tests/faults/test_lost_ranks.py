"""Ranks and launchers that are killed or stand still: the job ends soon, in one sentence, and nothing is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.distributed.test_nodes import free_port
from tests.faults.test_bad_inputs import settings, wait_for
from tests.faults.test_mistakes import SLOW_TOKENISING, TWO_RANKS, Job, started
from tests.support.planted import planted
from tgdpo_megatron.run_lock import RunLock

SOON = 90
"""Seconds; a busy machine needs longer than an idle one, where it is 5, or 12 where a rank is waited for."""
STUCK_IN_A_LATER_STEP = """
if os.environ["RANK"] == "1":
    import time
    from torch.nn import functional

    real, calls = functional.logsigmoid, []

    def reads_what_never_comes(margin):
        calls.append(margin)
        if len(calls) == 7:  # two micro-batches to a step
            time.sleep(600)
        return real(margin)

    functional.logsigmoid = reads_what_never_comes
"""


@pytest.fixture
def long_run(checkpoint: Path, pairs_file: Path, tmp_path: Path) -> list[str]:
    """The command line of a training on two ranks that takes long."""
    endless = ["train.train_iters=100000", "train.rank_timeout_minutes=0.15", "train.report=false"]
    return [*settings(checkpoint, pairs_file, tmp_path / "run"), *TWO_RANKS, *endless]


def trains(folder: Path) -> Callable[[], bool]:
    """Whether a run has done some steps."""
    samples = folder / "run" / "samples.jsonl"
    return lambda: samples.is_file() and samples.read_text().count("\n") >= 4


def errors(job: Job) -> list[str]:
    return [line for line in job.err.read_text().splitlines() if line.startswith("error: ")]


def test_a_rank_that_is_killed_ends_the_job_in_one_sentence_that_says_where_it_was(
    long_run: list[str], tmp_path: Path
) -> None:
    with started(*long_run, folder=tmp_path) as job:
        wait_for(trains(tmp_path), seconds=120, job=job.launcher)
        job.rank(1).kill()
        assert job.launcher.wait(timeout=SOON) == 1
    (error,) = errors(job)
    assert error.startswith("error: rank 1 was ended by SIGKILL; all ranks were stopped.")
    assert re.search(r"It was last at: step \d+, [a-z ,]+\.", error), error
    assert "Traceback" not in job.err.read_text()


def test_a_rank_that_is_stopped_is_named_with_its_host_and_where_it_was(long_run: list[str], tmp_path: Path) -> None:
    """The first, which the others cannot ask any more."""
    with started(*long_run, folder=tmp_path) as job:
        wait_for(trains(tmp_path), seconds=120, job=job.launcher)
        time.sleep(3)  # twice the time between two signs
        job.rank(0).suspend()
        assert job.launcher.wait(timeout=SOON) == 1
    (error,) = errors(job)
    where = r"error: rank 0 \(on \S+\) has given no sign of life for \d+ s; last seen at: step \d+, "
    assert re.match(where, error), error


def test_a_rank_that_lives_but_does_not_move_is_named_and_not_those_that_wait_for_it(
    checkpoint: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Two data-parallel ranks, the second of which waits outside any collective."""
    plant = planted(tmp_path, STUCK_IN_A_LATER_STEP, launched=True)
    changes = [
        "--nproc-per-node=2",
        "train.train_iters=8",
        "train.rank_timeout_minutes=0.15",
        "train.micro_batch_size=1",
    ]
    arguments = [*settings(checkpoint, pairs_file, tmp_path / "run"), *changes]
    with started(*arguments, folder=tmp_path, **plant) as job:
        code = job.launcher.wait(timeout=90)
    (error,) = errors(job)
    assert code == 1
    found = re.match(
        r"error: no rank has moved for \d+ s; the others wait for rank 1 \(on \S+\), which is at: (.*)", error
    )
    assert (
        found and re.match(r"step [34], forward and backward \(", found[1]) and "reads_what_never_comes" in found[1]
    ), error


def test_ranks_end_with_a_launcher_that_is_killed_and_leave_the_folder_free(
    long_run: list[str], tmp_path: Path
) -> None:
    with started(*long_run, folder=tmp_path) as job:
        wait_for(trains(tmp_path), seconds=120, job=job.launcher)
        ranks = [job.rank(number) for number in (0, 1)]
        job.launcher.kill()
        gone, alive = psutil.wait_procs(ranks, timeout=5)
        assert not alive
        job.launcher.wait()
        RunLock(tmp_path / "run").take()
    assert not errors(job)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_program_of_one_rank_that_is_asked_to_end_says_so_and_asks_for_another_start(
    number: signal.Signals, checkpoint: Path, pairs_file: Path, tmp_path: Path
) -> None:
    plant = planted(tmp_path, SLOW_TOKENISING, launched=False)
    with started(*settings(checkpoint, pairs_file, tmp_path / "run"), folder=tmp_path, **plant) as job:
        wait_for(lambda: "tokenising" in job.out.read_text(), seconds=120, job=job.launcher)
        job.launcher.send_signal(number)
        assert job.launcher.wait(timeout=SOON) == 75
    assert f"stopped by {number.name} before the work was done; give the same command again" in job.err.read_text()
    assert "Traceback" not in job.err.read_text() and not errors(job)


ON_A_NODE = """
import sys
from tgdpo_megatron.platform.launcher import launch
from tgdpo_megatron.platform.nodes import Nodes

nodes = Nodes(2, int(sys.argv[1]), "127.0.0.1", int(sys.argv[2]))
rank = ["-n1", "-r1", "import time; print('begun', flush=True); time.sleep(60)"]
sys.exit(launch("timeit", rank, processes=1, nodes=nodes, timeout_minutes=2, silence_minutes=0.08))
"""
"""A launcher whose rank, a program of Python's own, sleeps for a minute."""


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_first_node_that_is_lost_is_named_by_the_others_which_end(number: signal.Signals) -> None:
    port = str(free_port())
    launchers = [
        psutil.Popen(
            [sys.executable, "-c", ON_A_NODE, str(node), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for node in (0, 1)
    ]
    assert [launcher.stdout.readline() for launcher in launchers] == ["begun\n", "begun\n"]
    ranks = [child for launcher in launchers for child in launcher.children()]
    time.sleep(2)  # twice the time between two words
    launchers[0].send_signal(number)
    _, said = launchers[1].communicate(timeout=45)
    ranks[0].kill()  # a training's would have ended with its launcher
    launchers[0].kill()
    launchers[0].communicate()
    assert launchers[1].returncode == 75  # on another node the job can go on
    (error,) = (line for line in said.splitlines() if line.startswith("error: "))
    how = r"has not answered at \S+ for \d+ s" if number == signal.SIGSTOP else r"does not answer at \S+ any more"
    assert re.match(rf"error: the launcher of node 0 \(\S+\) {how}; all ranks of this node were stopped\.", error), said
    assert not psutil.pid_exists(ranks[1].pid)
