"""Checkpoints of a training: written while it goes on, kept by rule, and never taken for whole where they are not."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.program import run_ranks
from tests.support.saves import DAMAGES, OLD
from tgdpo_megatron.checkpoint.index import read_index
from tgdpo_megatron.checkpoint.sums import read_sums

WHOLE, BEFORE, DAMAGED = "iter-0000004", "iter-0000002", "iter-0000004.damaged"


@dataclass(frozen=True)
class Runs:
    """What the jobs left behind."""

    folder: Path
    said: dict[str, str]
    damaged: dict[str, list[Any]]

    def checkpoints(self, name: str) -> list[str]:
        return sorted(path.name for path in (self.folder / name / "checkpoints").iterdir())

    def held_out(self, name: str) -> dict[int, float]:
        lines = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        return {line["iteration"]: line["eval/loss"] for line in lines if line["iteration"]}


def _exchanged(row: dict[str, Any]) -> dict[str, Any]:
    return {"chosen": row["rejected"], "rejected": row["chosen"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, pairs_file: Path) -> Runs:
    """Two data-parallel ranks, which own half of the optimizer's state each."""
    folder = tmp_path_factory.mktemp("saves")

    def job(output: str, *, beta: float = 0.1, optimizer: Any = None, **train: Any) -> dict[str, Any]:
        usual = {"train_iters": 4, "save_interval": 2, "global_batch_size": 4, "micro_batch_size": 1}
        return {
            "model": {"checkpoint": str(checkpoint)},
            "loss": {"type": "dpo", "beta": beta},
            "data": {"train": str(pairs_file), "validation": str(pairs_file)},
            "optimizer": {"lr": 1e-3, "lr_warmup_iters": 0} | (optimizer or {}),
            "train": usual | {"report": False} | train | {"output": str(folder / output)},
        }

    best = {"keep_best": "eval/loss", "keep_last": 1, "save_interval": 1, "eval_interval": 1}
    # Held-out pairs are those of training with their answers exchanged: every step makes their loss worse.
    exchanged = folder / "exchanged.jsonl"
    rows = map(json.loads, pairs_file.read_text().splitlines())
    exchanged.write_text("".join(json.dumps(row | _exchanged(row)) + "\n" for row in rows))
    undistributed = {"optimizer": {"use_distributed_optimizer": False}}
    go_on = {"resume": True, "train_iters": 6}
    jobs = {
        "blocking": job("blocking", async_save=False),
        "background": job("background") | {"slow": 0.02},
        "best": job("best", **best) | {"data": {"train": str(pairs_file), "validation": str(exchanged)}},
        "full": job("full") | {"full_after": 30, "slow": 0.01},
        "weights only": job("weights only", save_optimizer=False),
        "weights only, resumed": job("weights only", save_optimizer=False, **go_on),
        "weights only, stopped": job("stopped", save_optimizer=False, exit_after_minutes=1e-4),
        "weights only, stopped, resumed": job("stopped", save_optimizer=False, resume=True),
        "undistributed": job("undistributed", **undistributed),
        "undistributed, killed": job("undistributed, killed", resume=True, **undistributed)
        | {"killed": str(folder / "undistributed")},
        "changed": job("blocking", beta=0.2, **go_on),
    }
    said, damaged = run_ranks(
        "tests.support.saves",
        "disks_and_damages",
        2,
        jobs=list(jobs.values()),
        run=str(folder / "blocking"),
        folder=str(folder / "damaged"),
    )
    return Runs(folder, dict(zip(jobs, said, strict=True)), damaged)


def test_what_is_written_in_the_background_is_the_state_at_its_step_bit_for_bit(runs: Runs) -> None:
    """The disk is so slow that the next step is done before all is written."""
    for step in (BEFORE, WHOLE):
        folders = [runs.folder / name / "checkpoints" / step for name in ("blocking", "background")]
        sums = [read_sums(folder) for folder in folders]
        for found in sums:
            del found["config.yaml"]  # of another output
            del found["weights/.metadata"]  # a pickle: equal content, in bytes that may differ
        assert sums[0] == sums[1] and "weights/__1_0.distcp" in sums[0]
        indexes = [read_index(folder / "weights") for folder in folders]
        assert indexes[0] == indexes[1]


def test_the_newest_checkpoints_are_kept_and_the_best(runs: Runs) -> None:
    losses = runs.held_out("best")
    best = min(losses, key=lambda step: losses[step])
    assert best == 1, "the last is not the best, so that keeping it is a choice"
    assert runs.checkpoints("best") == ["best", f"iter-{best:07d}", "iter-0000004"]
    assert (runs.folder / "best/checkpoints/best").resolve().name == f"iter-{best:07d}"


def test_a_disk_that_is_full_for_one_rank_ends_all_in_one_sentence_and_keeps_the_checkpoint_before(runs: Runs) -> None:
    """The first save has room, the second has not."""
    folder = runs.folder / "full/checkpoints"
    assert runs.said["full"].startswith(f"{folder / WHOLE}: the checkpoint cannot be written (")
    assert runs.said["full"].endswith(f"; the last good checkpoint is {folder / BEFORE}.")
    assert runs.checkpoints("full") == [BEFORE]


def test_a_run_without_the_distributed_optimizer_goes_on_bit_for_bit(runs: Runs) -> None:
    """What the kill left behind is gone. Weights and optimizer state of four steps are those of the whole run."""
    assert runs.checkpoints("undistributed, killed") == [BEFORE, WHOLE]
    names = ("undistributed", "undistributed, killed")
    sums = [read_sums(runs.folder / name / "checkpoints" / WHOLE) for name in names]
    of_ranks = [{name: found[name] for name in found if name.endswith(".distcp")} for found in sums]
    assert of_ranks[0] == of_ranks[1]


def test_weights_alone_take_a_quarter_of_the_disk_and_are_no_start_of_a_continued_run(runs: Runs) -> None:
    sizes = [
        sum(path.stat().st_size for path in (runs.folder / name / "checkpoints" / WHOLE).rglob("*.distcp"))
        for name in ("weights only", "blocking")
    ]
    assert 0.2 < sizes[0] / sizes[1] < 0.3
    assert (
        "holds weights alone (train.save_optimizer=false), so the run cannot go on"
        in runs.said["weights only, resumed"]
    )


def test_a_run_that_saves_weights_alone_and_is_stopped_goes_on(runs: Runs) -> None:
    """Its last checkpoint has the optimizer's state all the same, for it is told to go on with."""
    assert runs.said["weights only, stopped"].startswith("stopped as asked after step 1 of 4, which is saved")
    assert runs.said["weights only, stopped, resumed"] == ""
    files = [f"checkpoints/{WHOLE}/weights/__{rank}_0.distcp" for rank in (0, 1)]
    straight, stopped = (
        [(runs.folder / name / file).read_bytes() for file in files] for name in ("weights only", "stopped")
    )
    assert straight == stopped


def test_moments_that_adam_has_not_made_yet_are_saved_as_zeros(checkpoint: Path) -> None:
    """As where every step so far was skipped, with Transformer Engine's Adam."""
    found = run_ranks("tests.support.saves", "without_moments", 1, folder=str(checkpoint))
    assert found and all(saved == whole and largest == 0 for saved, whole, largest in found)


def test_no_collective_waits_for_a_slow_disk(tmp_path: Path) -> None:
    """One that waits too long ends the job, and with it the last checkpoint of a run."""
    found = run_ranks("tests.support.saves", "save_slowly", 2, folder=str(tmp_path / "c"), seconds=3, patience=60)
    longest, said = found
    assert said == ["", ""] and longest < 1.5
    assert read_index(tmp_path / "c" / "weights")["row"].shape == (2, 4)


def test_a_write_that_never_returns_ends_all_ranks_with_the_name_of_the_one_that_writes(tmp_path: Path) -> None:
    found = run_ranks("tests.support.saves", "save_slowly", 2, folder=str(tmp_path / "c"), seconds=8, patience=1)
    _, (first, second) = found
    assert first == second and "rank 1 has written nothing of this checkpoint for " in first
    assert not (tmp_path / "c").exists()


def test_a_rank_that_fails_while_a_checkpoint_becomes_current_takes_nothing_out_of_it(tmp_path: Path) -> None:
    found = run_ranks("tests.support.saves", "fail_at_the_end", 1, folder=str(tmp_path / "c"))
    assert found == ["another rank ended", ""]


def test_a_run_that_is_continued_with_another_method_is_refused(runs: Runs) -> None:
    assert "the run has loss.beta=0.1, not 0.2" in runs.said["changed"]
    assert "train.resume_with_changes=true" in runs.said["changed"]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_moved_aside_and_the_one_before_is_taken(name: str, runs: Runs) -> None:
    start, said, there = runs.damaged[name]
    _, words = DAMAGES[name]
    if name == "a copy of it under another step":
        assert (start, there) == (WHOLE, [BEFORE, WHOLE, "iter-9999999.damaged"])
    else:
        assert (start, there) == (BEFORE, [BEFORE, DAMAGED])
    assert said.count("\n") == 1 and f"is damaged ({words}" in said


def test_a_checkpoint_of_an_earlier_version_is_taken_without_checksums(runs: Runs) -> None:
    assert runs.damaged[OLD] == [WHOLE, "", [BEFORE, WHOLE]]


def test_sha256sum_finds_nothing_wrong_with_a_checkpoint(runs: Runs) -> None:
    """Another program computes the sums, of every file."""
    import subprocess

    program = shutil.which("sha256sum")
    if program is None:
        pytest.skip("sha256sum is not installed")
    folder = runs.folder / "blocking/checkpoints" / WHOLE
    done = subprocess.run([program, "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files - {"SHA256SUMS"} == set(read_sums(folder))
