"""Checkpoints that one version writes and another goes on from.

python -m tests.versions.exchange write FOLDER NAME
python -m tests.versions.exchange read FOLDER NAME WRITER...      prints what was found as JSON

At each layout, a writer trains four steps with the distributed optimizer and saves after two. A reader goes on from
there, and should find what the writer itself found in the last two steps.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.support.program import run_ranks

STEPS, SAVED = 4, 2
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "DP2": (2, {}),
    "TP2PP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
"""Name -> ranks and settings."""
COMPARED = ("loss", "grad_norm", "rewards/margins")
METRICS = "metrics.jsonl"


def write(folder: Path, name: str) -> None:
    """Train and save. The first writer makes the start, which all others read."""
    if not (folder / "start").exists():
        _make_start(folder)
    for layout in LAYOUTS:
        _train(folder, layout, [f"{name} at {layout}"])


def read(folder: Path, name: str, writers: list[str]) -> dict[str, float]:
    """Run of a writer -> largest difference of a number of the last two steps from the writer's own, relative.

    Raises:
        AssertionError: Megatron itself does not see in a checkpoint what this project wrote; or a run did not go on
            from it.
    """
    differences = {}
    for layout in LAYOUTS:
        written = [f"{writer} at {layout}" for writer in writers]
        for run in written:
            _check_megatrons_view(_saved(folder / run, SAVED))
            own = folder / f"{run} read by {name}"
            shutil.copytree(folder / run, own)
            shutil.rmtree(_saved(own, STEPS))
            (own / METRICS).unlink()  # what is there afterwards is the reader's
        found = _train(folder, layout, [f"{run} read by {name}" for run in written], resume=True)
        for run, metrics in zip(written, found, strict=True):
            differences[run] = difference(_metrics(folder / run), metrics)
    return differences


def difference(theirs: list[dict[str, float]], ours: list[dict[str, float]]) -> float:
    """The largest between two runs' last steps, relative where a number is above 1.

    Raises:
        AssertionError: The second run did not do just the steps after the checkpoint: it may have started anew.
    """
    steps = list(range(1, STEPS + 1))
    assert [line["iteration"] for line in theirs] == steps
    assert [line["iteration"] for line in ours] == steps[SAVED:], "it did not go on from the checkpoint"
    return max(
        abs(found[key] - wanted[key]) / max(1.0, abs(wanted[key]))
        for wanted, found in zip(theirs[SAVED:], ours, strict=True)
        for key in COMPARED
    )


def _train(folder: Path, layout: str, runs: list[str], resume: bool = False) -> list[list[dict[str, float]]]:
    """Train each run at a layout; their metrics."""
    ranks, parallel = LAYOUTS[layout]
    jobs = [_job(folder, run, resume) | {"parallel": parallel} for run in runs]
    return run_ranks("tests.support.jobs", "train_all", ranks, recipe="dpo_tiny", jobs=jobs)


def _make_start(folder: Path) -> None:
    from tests.conftest import PAIRS
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron
    from tools.make_tiny_model import make_model, train_tokenizer

    tokenizer = train_tokenizer([text for row in PAIRS for text in row.values()] * 2, vocab_size=330)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 256}
    make_model(folder / "hf", tokenizer, **sizes)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    hf_to_megatron(folder / "hf", folder / "start")


def _job(folder: Path, name: str, resume: bool) -> dict[str, Any]:
    return {
        "model": {"checkpoint": str(folder / "start")},
        "loss": {"type": "dpo"},
        "data": {"train": str(folder / "pairs.jsonl")},
        "optimizer": {"lr": 1e-3, "lr_warmup_iters": 1, "use_distributed_optimizer": True},
        "train": {
            "output": str(folder / name),
            "train_iters": STEPS,
            "save_interval": SAVED,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "resume": resume,
        },
    }


def _saved(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"iter-{step:07}"


def _metrics(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / METRICS).read_text().splitlines())
    return [line for line in lines if line["iteration"]]


def _check_megatrons_view(checkpoint: Path) -> None:
    """That Megatron's own loader finds the tensors and the plain data."""
    from megatron.core import dist_checkpointing

    from tgdpo_megatron.checkpoint.index import read_index

    weights = checkpoint / "weights"
    common = dist_checkpointing.load_common_state_dict(str(weights))
    assert common["iteration"] == SAVED, common.get("iteration")
    tensors = dist_checkpointing.load_tensors_metadata(str(weights))
    assert {key: tuple(one.global_shape) for key, one in tensors.items()} == {
        key: stored.shape for key, stored in read_index(weights).items()
    }


if __name__ == "__main__":
    what, where, own, *others = sys.argv[1:]
    if what == "write":
        write(Path(where), own)
    else:
        print(json.dumps(read(Path(where), own, others)))
