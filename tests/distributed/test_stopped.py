"""What a run leaves that is stopped at a step where much is due, and one whose disk is full, on two ranks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.program import run_ranks

STEPS, STOP, EVALUATED, LOGGED = 8, 5, 5, 3


@dataclass(frozen=True)
class Runs:
    folder: Path
    said: dict[str, str]

    def metrics(self, name: str) -> list[dict[str, float]]:
        """Every line, without what depends on the clock."""
        lines = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]

    def checkpoints(self, name: str) -> list[str]:
        return sorted(path.name for path in (self.folder / name / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, pairs_file: Path) -> Runs:
    folder = tmp_path_factory.mktemp("stopped")

    def job(output: str, **train: Any) -> dict[str, Any]:
        usual = {"train_iters": STEPS, "eval_interval": EVALUATED, "log_interval": LOGGED, "report": False}
        return {
            "model": {"checkpoint": str(checkpoint)},
            "data": {"train": str(pairs_file), "validation": str(pairs_file)},
            "optimizer": {"lr": 1e-3},
            "train": usual | {"global_batch_size": 4, "micro_batch_size": 2, "output": str(folder / output)} | train,
        }

    jobs = {
        "whole": job("whole"),
        "evaluation due": job("evaluation due") | {"stop_after": STOP},
        "evaluation due, continued": job("evaluation due", resume=True),
        "nothing due": job("nothing due") | {"stop_after": STOP - 1},
        "nothing due, continued": job("nothing due", resume=True),
        "full": job("full", save_interval=2) | {"full_after": 3},
    }
    said = run_ranks("tests.support.stopped", "stop_and_fill", 2, jobs=list(jobs.values()))
    return Runs(folder, dict(zip(jobs, said, strict=True)))


@pytest.mark.parametrize(("name", "stop"), [("evaluation due", STOP), ("nothing due", STOP - 1)])
def test_a_run_that_is_stopped_and_goes_on_leaves_the_metrics_of_one_that_was_not(
    name: str, stop: int, runs: Runs
) -> None:
    assert runs.said[name].startswith(f"stopped as asked after step {stop} of {STEPS}")
    assert runs.said[f"{name}, continued"] == ""
    assert [line["iteration"] for line in runs.metrics("whole")] == [0, LOGGED, EVALUATED, 2 * LOGGED, STEPS]
    assert runs.metrics(name) == runs.metrics("whole")


def test_a_disk_without_room_for_a_line_ends_all_ranks_in_one_sentence_and_no_step_is_saved_without_its_line(
    runs: Runs,
) -> None:
    """The fourth line is refused before the fourth step would be saved."""
    folder = runs.folder / "full/checkpoints"
    assert runs.said["full"].startswith("/dev/full: this file of the run cannot be written (")
    assert runs.said["full"].endswith(
        f"No space left on device); look at the space left there, and at the permissions; "
        f"the last good checkpoint is {folder / 'iter-0000002'}."
    )
    assert runs.checkpoints("full") == ["iter-0000002"]
