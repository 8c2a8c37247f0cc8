"""Steps that are skipped, the pairs of every step, and random numbers, in a run that is continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.program import run_ranks

STEPS, BATCH, BAD = 14, 4, 2


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_continued_run_skips_draws_and_takes_the_pairs_of_the_run_that_was_never_stopped(
    checkpoint: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Its loss draws random numbers and is not finite for the third pair. Six pairs, four to a step, on two ranks.

    A checkpoint is saved after every step, the skipped ones too.
    """
    whole, again = tmp_path / "whole", tmp_path / "again"
    job = {
        "model": {"checkpoint": str(checkpoint)},
        "data": {"train": str(pairs_file)},
        "optimizer": {"lr": 1e-3},
        "train": {
            **{
                "train_iters": STEPS,
                "global_batch_size": BATCH,
                "micro_batch_size": 1,
                "save_interval": 1,
                "keep_last": 0,
            },
            **{"max_skipped_steps": STEPS, "report": False, "save_minutes": 0},
        },
    }
    run_ranks(
        *("tests.support.odd_losses", "train_and_continue", 2),
        **{"job": job, "whole": str(whole), "again": str(again), "kept": "iter-0000012", "bad": BAD},
    )
    samples = [row for step in lines(whole / "samples.jsonl") for row in step["pairs"]]
    assert len(samples) == STEPS * BATCH
    epochs = [samples[start : start + 6] for start in range(0, STEPS * BATCH - 5, 6)]
    assert all(sorted(epoch) == [1, 2, 3, 4, 5, 6] for epoch in epochs), "each pair once in each epoch"

    with_bad = [step["iteration"] for step in lines(whole / "samples.jsonl") if BAD + 1 in step["pairs"]]
    skipped = lines(whole / "skipped.jsonl")
    assert [step["iteration"] for step in skipped] == with_bad and 2 < len(with_bad) < STEPS
    assert any(step + 1 in with_bad for step in with_bad), "a step that is skipped is saved before another such step"
    saved = sorted(path.name for path in (whole / "checkpoints").glob("iter-*"))
    assert saved == [f"iter-{step:07d}" for step in range(1, STEPS + 1)]
    assert all(step["causes"] == [BAD + 1] and step["what"] == "loss" for step in skipped)
    logged = [line for line in lines(whole / "metrics.jsonl") if "loss" in line]
    assert sorted([*with_bad, *(line["iteration"] for line in logged)]) == list(range(1, STEPS + 1))
    assert logged[-1]["skipped_steps"] == len([step for step in with_bad if step <= logged[-1]["iteration"]])

    for name in ("samples.jsonl", "skipped.jsonl"):
        assert (again / name).read_text() == (whole / name).read_text(), name
    first, second = ([line["loss"] for line in lines(run / "metrics.jsonl")] for run in (whole, again))
    assert first == second, "the same random numbers were drawn"
    manifests = [run / f"checkpoints/iter-{STEPS:07d}/manifest.json" for run in (whole, again)]
    first, second = (json.loads(manifest.read_text())["weights"] for manifest in manifests)
    assert first == second
