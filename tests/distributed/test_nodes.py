"""One job of several nodes: a launcher for each, here all on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.ports import free_port

pytestmark = pytest.mark.long

STEPS = 12


def on_node(node: int, port: int, settings: Sequence[str]) -> subprocess.Popen[str]:
    """Start the launcher of one of two nodes."""
    options = ["--nnodes=2", f"--node-rank={node}", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
    return subprocess.Popen(
        [sys.executable, "-m", "recipes.train", "--recipe=dpo_tiny", "--nproc-per-node=2", *options, *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(output: Path) -> list[float]:
    steps = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [step["loss"] for step in steps if "loss" in step]


def test_two_nodes_train_as_one_and_a_signal_to_either_stops_and_saves_the_whole_job(
    checkpoint: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """TP2 × PP2, with a stage on each node."""

    def settings(output: Path, *more: str) -> list[str]:
        return [
            *(f"model.checkpoint={checkpoint}", f"data.train={pairs_file}", f"train.output={output}"),
            *("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"),
            *(f"train.train_iters={STEPS}", "train.global_batch_size=4", "train.report=false", *more),
        ]

    one, two = tmp_path / "one", tmp_path / "two"
    alone = [sys.executable, "-m", "recipes.train", "--recipe=dpo_tiny", "--nproc-per-node=4", *settings(one)]
    subprocess.run(alone, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    port = free_port()
    launchers = [on_node(node, port, settings(two)) for node in (1, 0)]
    deadline, metrics = time.monotonic() + 120, two / "metrics.jsonl"
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.02)
    launchers[0].send_signal(signal.SIGTERM)
    (_, of_second), (_, of_first) = (launcher.communicate(timeout=60) for launcher in launchers)
    assert [launcher.returncode for launcher in launchers] == [75, 75], of_first + of_second
    done = len(losses(two))
    assert 3 <= done < STEPS
    assert f"stopped as asked after step {done} of {STEPS}, which is saved" in of_first
    assert of_second == ""

    launchers = [on_node(node, port, settings(two, "train.resume=true")) for node in (0, 1)]
    said = [launcher.communicate(timeout=120)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    assert losses(two) == losses(one)
