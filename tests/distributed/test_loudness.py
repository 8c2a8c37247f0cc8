"""What a training says by default, with --quiet and with --verbose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

Said = dict[str, tuple[str, str]]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, pairs_file: Path) -> Said:
    """Option -> stdout and stderr of two steps."""
    folder = tmp_path_factory.mktemp("loudness")
    found = {}
    for option in ("--quiet", "", "--verbose"):
        command = [
            *(sys.executable, "-m", "recipes.train", "--recipe=dpo_tiny", f"model.checkpoint={checkpoint}"),
            *(f"data.train={pairs_file}", f"data.validation={pairs_file}", f"train.output={folder / f'run{option}'}"),
            *("train.train_iters=2", "train.global_batch_size=4", "train.eval_interval=1", *option.split()),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[option] = (done.stdout, done.stderr)
    return found


def test_quiet_says_the_result_alone(said: Said) -> None:
    out, err = said["--quiet"]
    assert [line.split()[0] for line in out.splitlines()] == ["done:", "time", "held", "checkpoint", "report", "export"]
    assert "step/s" not in err


def test_the_default_adds_the_data_the_changed_settings_a_bar_and_held_out_lines(said: Said) -> None:
    out, err = said[""]
    assert "data.train: read as " in out and "step 1: held out: loss " in out
    assert "train_iters=2" in out and "weight_decay" not in out  # the latter has its default
    assert "2/2" in err, "the bar reaches its end"
    assert f"layers: local (megatron-core {version('megatron-core')}); optimizer: torch's AdamW" in out.splitlines()
    assert len(out.splitlines()) <= 30


def test_verbose_adds_every_setting_and_every_line_of_metrics(said: Said) -> None:
    out, _ = said["--verbose"]
    assert "weight_decay: 0.0" in out
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [line["iteration"] for line in lines] == [1, 2] and all("grad_norm" in line for line in lines)
