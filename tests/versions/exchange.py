"""Checkpoints that one version writes and another goes on from.

python -m tests.versions.exchange write FOLDER NAME
python -m tests.versions.exchange read FOLDER NAME WRITER...      prints what was found as JSON

Each writer trains four steps on two ranks with the distributed optimizer and saves after two. A reader goes on from
there, and should find what the writer itself found in the last two steps.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.support.program import run_ranks

RANKS, STEPS, SAVED = 2, 4, 2
COMPARED = ("loss", "grad_norm", "rewards/margins")


def write(folder: Path, name: str) -> None:
    """Train and save. The first writer makes the start, which all others read."""
    if not (folder / "start").exists():
        _make_start(folder)
    run_ranks("tests.support.jobs", "train_all", RANKS, recipe="dpo_tiny", jobs=[_job(folder, name)])


def read(folder: Path, name: str, writers: list[str]) -> dict[str, float]:
    """Writer -> largest difference of a number of the last two steps from the writer's own, relative.

    Raises:
        AssertionError: Megatron itself does not see in a checkpoint what this project wrote.
    """
    jobs = []
    for writer in writers:
        _check_megatrons_view(_saved(folder / writer, SAVED))
        own = folder / f"{writer} read by {name}"
        shutil.copytree(folder / writer, own)
        shutil.rmtree(_saved(own, STEPS))
        jobs.append(_job(folder, own.name, resume=True))
    found = run_ranks("tests.support.jobs", "train_all", RANKS, recipe="dpo_tiny", jobs=jobs)
    return {
        writer: _difference(_metrics(folder / writer), metrics) for writer, metrics in zip(writers, found, strict=True)
    }


def _make_start(folder: Path) -> None:
    from tests.conftest import PAIRS
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron
    from tools.make_tiny_model import make_model, train_tokenizer

    tokenizer = train_tokenizer([text for row in PAIRS for text in row.values()] * 2, vocab_size=330)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 256}
    make_model(folder / "hf", tokenizer, **sizes)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    hf_to_megatron(folder / "hf", folder / "start")


def _job(folder: Path, name: str, resume: bool = False) -> dict[str, Any]:
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
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["iteration"]]


def _difference(theirs: list[dict[str, float]], ours: list[dict[str, float]]) -> float:
    assert len(theirs) == len(ours) == STEPS
    return max(
        abs(found[key] - wanted[key]) / max(1.0, abs(wanted[key]))
        for wanted, found in list(zip(theirs, ours, strict=True))[SAVED:]
        for key in COMPARED
    )


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
