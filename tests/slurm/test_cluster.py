"""The commands of docs/cluster.md on a real Slurm: the chain, a requeue, a lost node, a failure, a sweep."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Slurm, submitted

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "cluster.md"
STEPS = 8


def blocks(section: str) -> list[str]:
    """The commands of a section of the page."""
    text = PAGE.read_text(encoding="utf-8")
    part = text[text.index(f"\n## {section}\n") + 1 :]
    return re.findall(r"^```\n(.*?)^```", part[: part.index("\n## ")], flags=re.MULTILINE | re.DOTALL)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without what is measured by a clock."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def weights(run: Path, step: int = STEPS) -> str:
    """The fingerprint of the weights of a checkpoint."""
    return json.loads((run / "checkpoints" / f"iter-{step:07d}" / "manifest.json").read_text())["weights"]


@pytest.fixture(scope="module")
def chain(slurm: Slurm) -> dict[str, str]:
    """Stage -> job of the first section's chain, once all have ended. Later commands know its $SMALL."""
    (commands,) = blocks("First a small model on two nodes")
    printed = slurm.run(commands + "declare -p SMALL > small.sh\n")
    assert printed.count("sbatch --parsable") == 5  # of the dry run
    jobs = submitted(printed)
    for job in jobs.values():
        slurm.wait_for_end(job)
    return jobs


def small(slurm: Slurm, commands: str) -> str:
    """Run commands that use the page's $SMALL."""
    return slurm.run(f"source small.sh\n{commands}")


def train(slurm: Slurm, name: str) -> str:
    """Submit the page's second training under another name; returns its job id."""
    submit = blocks("Stopping, and going on")[0].replace("again", name)
    return re.findall(r"Submitted batch job (\d+)", small(slurm, submit))[0]


def wait_for_steps(slurm: Slurm, run: Path, steps: int) -> None:
    slurm.wait_until(lambda: len(metrics(run)) >= steps, 600, f"{steps} steps in {run.name}")


def test_the_chain_runs_stage_after_stage_to_its_end(slurm: Slurm, chain: dict[str, str]) -> None:
    assert list(chain) == ["prepare", "convert", "score", "train", "export"]
    shown = [slurm.job(job) for job in chain.values()]
    assert [job["JobState"] for job in shown] == ["COMPLETED"] * 5
    for before, after in zip(shown, shown[1:], strict=False):
        assert before["EndTime"] <= after["StartTime"]


def test_one_run_spans_both_nodes(slurm: Slurm, chain: dict[str, str]) -> None:
    shown = slurm.job(chain["train"])
    assert (shown["NodeList"], shown["NumTasks"], shown["TresPerNode"]) == ("node[1-2]", "2", "gres:gpu:2")
    log = (slurm.folder / "runs" / "small" / "logs" / f"train-{chain['train']}.log").read_text()
    assert "tensor_model_parallel_size=2, pipeline_model_parallel_size=2" in log  # four ranks, two on each node


def test_the_chain_exports_the_trained_model(slurm: Slurm, chain: dict[str, str]) -> None:
    from transformers import AutoModelForCausalLM

    start, trained = (
        AutoModelForCausalLM.from_pretrained(slurm.folder / "runs" / name, local_files_only=True)
        for name in ("start-hf", "small/hf")
    )
    pairs = zip(start.parameters(), trained.parameters(), strict=True)
    assert all(not before.equal(after) for before, after in pairs)


def test_a_warned_run_saves_is_queued_again_and_equals_one_that_was_never_stopped(
    slurm: Slurm, chain: dict[str, str]
) -> None:
    whole, run = slurm.folder / "runs" / "small" / "policy", slurm.folder / "runs" / "again"
    job = train(slurm, "again")
    wait_for_steps(slurm, run, 2)
    slurm.run(blocks("Stopping, and going on")[1])
    ended = slurm.wait_for_end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    log = (slurm.folder / "runs" / "again.log").read_text()
    assert "stopped as asked" in log and "going on from" in log
    assert metrics(run) == metrics(whole) and len(metrics(run)) == STEPS
    assert weights(run) == weights(whole)


def test_a_run_that_lost_a_node_is_queued_again_and_goes_on_from_its_last_checkpoint(
    slurm: Slurm, chain: dict[str, str]
) -> None:
    whole, run = slurm.folder / "runs" / "small" / "policy", slurm.folder / "runs" / "lost"
    job = train(slurm, "lost")
    wait_for_steps(slurm, run, 3)
    slurm.run("scontrol update nodename=node2 state=down reason=test")
    slurm.wait_until(lambda: slurm.job(job)["JobState"] == "PENDING", 120, "second place in the queue")
    slurm.wait_until(lambda: not processes_of(run), 120, "end of the first run's ranks")
    slurm.run("scontrol update nodename=node2 state=resume")
    ended = slurm.wait_for_end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert "going on from" in (slurm.folder / "runs" / "lost.log").read_text()
    assert metrics(run) == metrics(whole)
    assert weights(run) == weights(whole)


def processes_of(run: Path) -> list[str]:
    """Processes of this machine whose command names the folder of a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"train.output=runs/{run.name}".encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # it ended in between
            continue
    return found


def test_a_run_shows_its_stacks_when_it_is_asked_and_stays_cancelled_when_it_is_cancelled(
    slurm: Slurm, chain: dict[str, str]
) -> None:
    job, log = train(slurm, "cancelled"), slurm.folder / "runs" / "cancelled.log"
    wait_for_steps(slurm, slurm.folder / "runs" / "cancelled", 1)
    slurm.run(f"scancel --signal=USR2 {job}")
    slurm.wait_until(lambda: all(f"rank {rank} is process" in log.read_text() for rank in range(4)), 60, "stacks")
    slurm.run(f"scancel {job}")
    ended = slurm.wait_for_end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


def test_a_stage_that_fails_cancels_the_rest_and_says_why(slurm: Slurm, chain: dict[str, str]) -> None:
    """No pair fits 16 tokens, which is known once the pairs are tokenised."""
    jobs = submitted(
        small(slurm, "python -m tools.submit $SMALL train.output=runs/bad train.micro_batch_tokens=16 --from score")
    )
    assert list(jobs) == ["score", "train", "export"]
    ended = {stage: slurm.wait_for_end(job) for stage, job in jobs.items()}
    assert (ended["score"]["JobState"], ended["score"]["ExitCode"]) == ("FAILED", "2:0")
    assert [ended[stage]["JobState"] for stage in ("train", "export")] == ["CANCELLED", "CANCELLED"]
    log = (slurm.folder / "runs" / "bad" / "logs" / f"score-{jobs['score']}.log").read_text()
    assert "does not fit train.micro_batch_tokens=16" in log and "Traceback" not in log


def test_a_script_without_the_nodes_of_the_settings_is_refused(slurm: Slurm, chain: dict[str, str]) -> None:
    command = "sbatch --gpus-per-node=2 --output=runs/alone.log slurm/train.sbatch $SMALL train.output=runs/alone"
    job = re.findall(r"Submitted batch job (\d+)", small(slurm, command))[0]
    assert slurm.wait_for_end(job)["ExitCode"] == "2:0"
    said = (slurm.folder / "runs" / "alone.log").read_text()
    assert "cluster.nodes=2, but this job is started on 1" in said
    assert not (slurm.folder / "runs" / "alone").exists()


def test_a_sweep_trains_once_for_each_pair_of_values_from_the_same_scores(slurm: Slurm, chain: dict[str, str]) -> None:
    scores = slurm.folder / "runs" / "small" / "scores"
    before = {path: path.stat().st_mtime_ns for path in scores.rglob("*")}
    command, compare, export = blocks("Sweeps over α and β")
    jobs = submitted(small(slurm, command))
    assert list(jobs) == ["sweep"]
    for task in (0, 1):
        assert slurm.wait_for_end(f"{jobs['sweep']}_{task}")["JobState"] == "COMPLETED"
    runs = [slurm.folder / "runs" / "small" / "sweep" / f"alpha-{alpha}-beta-0.1" for alpha in ("0.5", "1")]
    assert len({weights(run) for run in runs}) == 2
    assert {path: path.stat().st_mtime_ns for path in scores.rglob("*")} == before
    assert slurm.run(compare).count("/alpha-") == 2
    slurm.run(export)
    assert (slurm.folder / "runs" / "small" / "best-hf" / "config.json").is_file()
