"""A training that lays out its next step ahead computes, bit for bit, what one computes that does not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.support.program import run_ranks
from tgdpo_megatron.checkpoint.manifest import read_manifest

STEPS = 6
COMPARED = ("loss", "grad_norm", "learning_rate", "num_tokens", "rewards/margins", "logps/chosen", "eval/loss")


def job(checkpoint: Path, pairs: Path, output: Path, **train: Any) -> dict[str, Any]:
    """Six pairs, four to a step, so that steps cross epochs; held-out pairs and a checkpoint after every other step."""
    return {
        "model": {"checkpoint": str(checkpoint)},
        "data": {"train": str(pairs), "validation": str(pairs)},
        "optimizer": {"lr": 1e-3},
        "train": {
            **{"output": str(output), "train_iters": STEPS, "global_batch_size": 4, "micro_batch_tokens": 256},
            **{"eval_interval": 2, "save_interval": 2, "keep_last": 0, "report": False, **train},
        },
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, pairs_file: Path) -> dict[str, Any]:
    """A run that lays out ahead, one that does not, and one that goes on from the first's third step on."""
    folder = tmp_path_factory.mktemp("ahead")
    found = {}
    for name, ahead in (("ahead", True), ("in turn", False)):
        made = job(checkpoint, pairs_file, folder / name)
        (found[name],) = run_ranks("tests.support.laid_out", "record", 2, jobs=[made], ahead=ahead)
        found[name]["folder"] = folder / name
    stopped = job(checkpoint, pairs_file, folder / "continued", train_iters=3)
    stopped["optimizer"]["lr_decay_style"] = "constant"
    whole = copy.deepcopy(stopped)
    whole["train"] |= {"train_iters": STEPS, "resume": True, "resume_with_changes": True}
    found["continued"] = run_ranks("tests.support.laid_out", "record", 2, jobs=[stopped, whole])[1]
    return found


def test_numbers_and_weights_are_the_same_bit_for_bit(runs: dict[str, Any]) -> None:
    numbers = {
        name: [[step.get(metric) for metric in COMPARED] for step in runs[name]["logged"]]
        for name in ("ahead", "in turn")
    }
    assert len(numbers["ahead"]) == STEPS and numbers["ahead"] == numbers["in turn"]
    assert all(step[0] is not None for step in numbers["ahead"])
    for step in (2, 4, 6):
        first, second = (read_manifest(runs[name]["folder"] / f"checkpoints/iter-{step:07d}") for name in numbers)
        assert first.weights == second.weights


def test_all_steps_but_the_first_are_laid_out_by_the_thread(runs: dict[str, Any]) -> None:
    assert runs["ahead"]["laid out"] == [[0, "MainThread"], *([step, "ahead"] for step in range(1, STEPS))]
    assert runs["in turn"]["laid out"] == [[step, "MainThread"] for step in range(STEPS)]


def test_a_run_that_goes_on_lays_out_the_steps_that_are_left(runs: dict[str, Any]) -> None:
    assert runs["continued"]["laid out"] == [[3, "MainThread"], [4, "ahead"], [5, "ahead"]]


def test_no_thread_is_left_after_a_run(runs: dict[str, Any]) -> None:
    assert [run["threads left"] for run in runs.values()] == [[], [], []]
