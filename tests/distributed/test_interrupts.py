"""A training that is asked to stop finishes its step, saves, and goes on later as if it had never been stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = 30


def command(checkpoint: Path, pairs: Path, output: Path, ranks: int, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "recipes.train", "--recipe=dpo_tiny", f"--nproc-per-node={ranks}"),
        *(
            f"model.checkpoint={checkpoint}",
            f"data.train={pairs}",
            f"data.validation={pairs}",
            f"train.output={output}",
        ),
        *(f"train.train_iters={STEPS}", "train.global_batch_size=4", "train.micro_batch_size=1", "optimizer.lr=1e-3"),
        "train.report=false",
        *more,
    ]


def losses(output: Path) -> list[float]:
    steps = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [step["loss"] for step in steps if "loss" in step]


@pytest.mark.parametrize(("ranks", "asked", "code"), [(1, signal.SIGINT, 130), (2, signal.SIGUSR1, 75)])
def test_an_interrupted_run_saves_its_step_and_goes_on_bit_for_bit(
    ranks: int, asked: signal.Signals, code: int, checkpoint: Path, pairs_file: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    subprocess.run(command(checkpoint, pairs_file, whole, ranks), check=True, capture_output=True, env=environment)

    started = command(checkpoint, pairs_file, stopped, ranks)
    with subprocess.Popen(started, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as run:
        deadline = time.monotonic() + 120
        metrics = stopped / "metrics.jsonl"
        while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_text().count("\n") >= 4):
            time.sleep(0.02)
        run.send_signal(asked)
        said = run.communicate(timeout=120)
    assert run.returncode == code, said
    done = len(losses(stopped))
    assert 3 <= done < STEPS
    assert f"stopped as asked after step {done} of {STEPS}, which is saved" in said[1] and "Traceback" not in said[1]
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == [f"iter-{done:07d}"]

    again = command(checkpoint, pairs_file, stopped, ranks, "train.resume=true")
    subprocess.run(again, check=True, capture_output=True, env=environment)
    assert losses(stopped) == losses(whole)
    weights = [
        json.loads((run / f"checkpoints/iter-{STEPS:07d}/manifest.json").read_text())["weights"]
        for run in (whole, stopped)
    ]
    assert weights[0] == weights[1]
