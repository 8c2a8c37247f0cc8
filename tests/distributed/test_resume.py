"""Continuing a run equals never having stopped it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.program import run_ranks


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, pairs_file: Path) -> dict[str, Any]:
    """Four steps at DP2 with the distributed optimizer; the same stopped after two and continued at DP2, and at TP2."""
    folder = tmp_path_factory.mktemp("resume")
    validation = folder / "validation.jsonl"
    validation.write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:5]))

    def job(name: str, steps: int, resume: bool = False, tensor: int = 1) -> dict[str, Any]:
        return {
            "model": {"checkpoint": str(checkpoint)},
            "parallel": {"tensor_model_parallel_size": tensor},
            "loss": {"type": "dpo"},
            "data": {"train": str(pairs_file), "validation": str(validation)},
            # A constant rate, so that stopping early does not change the schedule.
            "optimizer": {"lr": 1e-3, "min_lr": 1e-3, "lr_warmup_iters": 0},
            "train": {
                "output": str(folder / name),
                "train_iters": steps,
                "global_batch_size": 4,
                "micro_batch_size": 1,
                "resume": resume,
            },
        }

    jobs = [
        job("whole", 4),
        job("stopped", 2),
        job("stopped", 4, resume=True),
        job("reshaped", 2),
        job("reshaped", 4, resume=True, tensor=2),
    ]
    metrics = run_ranks("tests.distributed.jobs", "train_all", 2, recipe="dpo_tiny", jobs=jobs)
    names = ["whole", "first half", "continued", "first half", "reshaped"]
    return {"folder": folder, **dict(zip(names, metrics, strict=True))}


def test_continued_run_has_bit_equal_weights(runs: dict[str, Any]) -> None:
    manifests = [
        runs["folder"] / name / "checkpoints" / "iter-0000004" / "manifest.json" for name in ("whole", "stopped")
    ]
    whole, continued = (json.loads(path.read_text()) for path in manifests)
    assert whole["weights"] == continued["weights"]


def test_continued_run_has_the_same_metrics(runs: dict[str, Any]) -> None:
    for whole, continued in zip(runs["whole"], runs["continued"], strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "num_tokens", "rewards/margins"):
            assert whole[name] == continued[name], name


def test_run_continued_at_another_layout_has_the_same_loss(runs: dict[str, Any]) -> None:
    # fp32 sums in another order; two steps of Adam on top.
    found = [line["loss"] for line in runs["reshaped"]]
    assert found == pytest.approx([line["loss"] for line in runs["whole"]], abs=1e-4)


def test_evaluation_counts_every_pair_once_on_uneven_ranks(runs: dict[str, Any]) -> None:
    # Five pairs on two data-parallel ranks against one; a mean of rank means would differ by 1e-2 and more.
    uneven, one = runs["continued"][-1], runs["reshaped"][-1]
    assert uneven["eval/loss"] == pytest.approx(one["eval/loss"], abs=1e-4)
