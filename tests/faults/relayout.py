"""A run that goes on at another layout: the same pairs in the same order, and the same loss."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults.kills import LAYOUT, SAVE_INTERVAL, STEPS, World
from tests.faults.rows import Row
from tests.support.forked import Job

LIMIT = 1e-5
"""Largest difference of a step's loss to that of the uninterrupted run at TP2×PP2, nats; all in fp32."""
LAYOUTS = {
    "TP2×PP2": (4, LAYOUT),
    "TP1": (1, ("parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1")),
    "PP2×DP2": (4, ("parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=2")),
    "TP4": (4, ("parallel.tensor_model_parallel_size=4", "parallel.pipeline_model_parallel_size=1")),
}
FIRST = "TP2×PP2"


def relayout(world: World, whole: Path) -> Iterator[Row]:
    """From TP2×PP2 to every other layout, and back.

    Args:
        whole: The folder of the uninterrupted run at TP2×PP2 with cached scores.
    """
    for layout in LAYOUTS:
        if layout == FIRST:
            continue
        other = world.folder / f"whole-{layout}"
        _train(world, layout, other)
        yield _continued(world, FIRST, whole, layout, whole)
        yield _continued(world, layout, other, FIRST, whole)


def _train(world: World, layout: str, output: Path) -> None:
    size, parallel = LAYOUTS[layout]
    job = Job("recipes.train", [*world.command("cached", output), *parallel], output.with_suffix(".log"), size)
    assert job.end(patience=300) == [0] * size, job.said()


def _continued(world: World, before: str, started: Path, after: str, whole: Path) -> Row:
    """A run as if killed in the middle, continued at another layout."""
    output, began = world.folder / f"{before}-then-{after}", time.monotonic()
    shutil.copytree(started, output)
    for checkpoint in (output / "checkpoints").glob("iter-*"):
        if int(checkpoint.name.removeprefix("iter-")) > STEPS // 2 // SAVE_INTERVAL * SAVE_INTERVAL:
            shutil.rmtree(checkpoint)
    _train(world, after, output)
    losses, samples = ([_losses(run) for run in (whole, output)], [_samples(run) for run in (whole, output)])
    difference = max(abs(one - other) for one, other in zip(*losses, strict=True))
    said = f"largest difference of a loss {difference:.1e}, {'the same' if samples[0] == samples[1] else 'OTHER'} pairs"
    passed = samples[0] == samples[1] and difference <= LIMIT
    return Row("continued at another layout", f"{before} → {after}", passed, said, time.monotonic() - began)


def _losses(output: Path) -> list[float]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def _samples(output: Path) -> list[list[int]]:
    """The pairs of each step, in their order."""
    lines = (output / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["pairs"] for line in lines]
