"""What a training run makes of its settings: the steps it takes, what it logs, what it keeps, what it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import PAIRS
from tests.support.jobs import flip_a_bit
from tests.support.program import run_ranks
from tgdpo_megatron.checkpoint.convert import megatron_to_hf
from tgdpo_megatron.data.prepare import load_prepared
from tgdpo_megatron.data.shared_prompts import tokens_read
from tgdpo_megatron.losses import CHOSEN, REJECTED
from tgdpo_megatron.platform.clock import ACTIVITIES
from tgdpo_megatron.train import EVALUATED_AT_ONCE

LR, MIN_LR, DECAY, SEED = 1e-3, 2e-4, 10.0, 7
RATES = [
    LR / 2,
    LR,
    MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * 1 / 3)) / 2,
    MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * 2 / 3)) / 2,
]
"""Of four steps, by hand: two of linear warm-up, then a cosine that would reach MIN_LR at the fifth."""


@dataclass(frozen=True)
class Runs:
    """What the jobs left behind."""

    folder: Path
    refusals: dict[str, str]

    def metrics(self, name: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def checkpoints(self, name: str) -> list[str]:
        return sorted(path.name for path in (self.folder / name / "checkpoints").glob("*"))


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Path,
    pairs_file: Path,
    write_pairs: Callable[..., Path],
) -> Runs:
    folder = tmp_path_factory.mktemp("train")
    many = write_pairs(folder / "many.jsonl", PAIRS * (EVALUATED_AT_ONCE // len(PAIRS) + 1))
    shutil.copytree(checkpoint, folder / "altered")
    flip_a_bit(folder / "altered")

    def job(
        output: str,
        *,
        start: Path = checkpoint,
        validation: Path | None = None,
        optimizer: dict[str, float] | None = None,
        **train: Any,
    ) -> dict[str, Any]:
        """One step on all pairs, unless said otherwise."""
        usual = {"train_iters": 1, "global_batch_size": 6, "micro_batch_tokens": 4096}
        return {
            "model": {"checkpoint": str(start)},
            "data": {"train": str(pairs_file), "validation": str(validation) if validation else None},
            "optimizer": {"lr_warmup_iters": 0} | (optimizer or {}),
            "train": usual | train | {"output": str(folder / output)},
        }

    # With both decay rates 0, Adam moves every weight that has a gradient by the learning rate.
    schedule = {"lr": LR, "min_lr": MIN_LR, "lr_warmup_iters": 2, "weight_decay": DECAY}
    schedule |= {"adam_beta1": 0.0, "adam_beta2": 0.0}
    overflowing = {"lr": 1e15}  # weights of 1e15 are finite, products of three of them are not
    still = {"optimizer": {"lr": 1e-20}, "validation": many, "log_interval": 2}  # no weight moves
    all_kept = {"save_interval": 1, "keep_last": 0}
    jobs = {
        "stepped": job("stepped", optimizer=schedule, train_iters=4, global_batch_size=1, seed=SEED, **all_kept),
        "bf16 after fp32": job("bf16", start=folder / "stepped/checkpoints/iter-0000004", precision="bf16"),
        "still": job("still", train_iters=5, **still),
        "often": job("often", train_iters=3, save_minutes=1e-9, keep_last=1),
        "often, two kept": job("often, two kept", train_iters=3, save_minutes=1e-9),
        "explodes": job("explodes", optimizer=overflowing),
        "explodes, validated": job("validated", optimizer=overflowing, validation=pairs_file),
        "altered start": job("altered start", start=folder / "altered"),
        "altered run": job("still", train_iters=6, resume=True, **still)
        | {"altered": str(folder / "still/checkpoints/iter-0000005")},
        "altered run again": job("still", train_iters=6, resume=True, **still),
        "finished": job("bf16", start=folder / "stepped/checkpoints/iter-0000004", precision="bf16", resume=True)
        | {"lost": str(folder / "bf16/report.html")},
        "disk full": job("full") | {"no_room_for": "manifest.json"},
    }
    said = run_ranks("tests.support.jobs", "train_each", 1, recipe="dpo_tiny", jobs=list(jobs.values()))
    return Runs(folder, dict(zip(jobs, said, strict=True)))


# ---------------------------------------------------------------- steps


@pytest.fixture(scope="module")
def weights(runs: Runs, hf_model: Path) -> list[dict[str, Tensor]]:
    """Before the first step, and after each."""
    for step in range(1, 5):
        megatron_to_hf(runs.folder / f"stepped/checkpoints/iter-{step:07d}", runs.folder / f"exported/{step}")
    folders = [hf_model, *(runs.folder / f"exported/{step}" for step in range(1, 5))]
    return [load_file(folder / "model.safetensors") for folder in folders]


def test_the_rate_of_each_step_is_its_warm_up_or_its_cosine(runs: Runs) -> None:
    assert [line["learning_rate"] for line in runs.metrics("stepped")] == pytest.approx(RATES, rel=1e-6)


def test_a_step_moves_weights_by_its_own_rate(weights: list[dict[str, Tensor]]) -> None:
    """Norms, which take no weight decay: by the rate itself, up to AdamW's epsilon beside a gradient."""
    moved = [
        float((after["model.norm.weight"] - before["model.norm.weight"]).abs().median())
        for before, after in zip(weights, weights[1:], strict=False)
    ]
    assert moved == pytest.approx(RATES, rel=1e-3)


def test_a_step_shrinks_matrices_by_its_rate_times_the_decay(weights: list[dict[str, Tensor]], tokenizer: Any) -> None:
    """Seen in the embedding of a token that occurs nowhere: it has no gradient, so nothing else moves it."""
    unused = tokenizer.convert_tokens_to_ids("<|system|>")
    rows = [after["model.embed_tokens.weight"][unused] for after in weights]
    shrunk = [float((after / before).mean()) for before, after in zip(rows, rows[1:], strict=False)]
    assert shrunk == pytest.approx([1 - rate * DECAY for rate in RATES], rel=1e-5)


def test_the_seed_decides_which_pair_a_step_takes(runs: Runs, tokenizer: Any) -> None:
    """One pair a step: each is known by the tokens of its responses."""
    order = np.random.default_rng([SEED, 0]).permutation(len(PAIRS))[:4]
    tokens = [
        sum(len(tokenizer(row[side], add_special_tokens=False)["input_ids"]) + 1 for side in ("chosen", "rejected"))
        for row in PAIRS
    ]
    assert [line["num_tokens"] for line in runs.metrics("stepped")] == [tokens[pair] for pair in order]


def test_a_checkpoint_is_saved_when_the_time_is_over_and_the_newest_are_kept(runs: Runs) -> None:
    assert runs.checkpoints("often") == ["iter-0000003"]
    assert runs.checkpoints("often, two kept") == ["iter-0000002", "iter-0000003"]


# ---------------------------------------------------------------- what is logged


def test_metrics_are_logged_every_so_many_steps_and_after_the_last(runs: Runs) -> None:
    assert [line["iteration"] for line in runs.metrics("still")] == [0, 2, 4, 5]


def test_every_number_that_a_run_writes_is_explained(runs: Runs) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = "".join(re.findall(r"^\| (`.*?) \|", page, flags=re.MULTILINE))  # the first column of every table
    written = {
        name.removeprefix("eval/") for folder in ("stepped", "still") for line in runs.metrics(folder) for name in line
    }
    assert {"epoch", "loss", "perf/seconds"} <= written
    assert written - set(re.findall(r"`(.*?)`", rows)) == set()


def test_held_out_pairs_are_evaluated_before_the_first_step(runs: Runs) -> None:
    """There the policy is the reference, so every pair ties. No step is logged with them."""
    first = runs.metrics("still")[0]
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-6) and first["eval/rewards/accuracies"] == 0
    assert "loss" not in first


def test_an_evaluation_counts_all_its_pairs_however_many(runs: Runs) -> None:
    """The six pairs of a step, repeated: their mean is the step's, because no weight moves."""
    last = runs.metrics("still")[-1]
    assert last["eval/logps/chosen"] == pytest.approx(last["logps/chosen"], rel=1e-5)


def test_every_line_tells_the_speed_of_its_step_and_divides_its_time(runs: Runs) -> None:
    """Each step takes all pairs, whose prompts are read once, and each frozen model is live."""
    (prepared,) = (runs.folder / "still/data").glob("train-*")
    data = load_prepared(prepared)
    tokens = tokens_read(data, np.arange(len(data)), (CHOSEN, REJECTED), shared_prompts=True).sum()
    for line in runs.metrics("still")[1:]:
        assert line["perf/tokens_per_second"] * line["perf/seconds_per_step"] == pytest.approx(tokens)
        assert line["perf/frozen_tflops_per_rank"] == pytest.approx(line["perf/tflops_per_rank"] / 3)
        assert sum(line[f"perf/share_{activity}"] for activity in ACTIVITIES) == pytest.approx(1)
        assert min(line["perf/share_policy"], line["perf/share_frozen"]) > 0 and "perf/mfu" not in line


def test_a_checkpoint_is_time_for_saving_in_the_next_line(runs: Runs) -> None:
    first, *others = runs.metrics("stepped")
    assert first["perf/share_saving"] == 0 and all(line["perf/share_saving"] > 0 for line in others)


# ---------------------------------------------------------------- what is kept


def test_a_bf16_run_starts_from_the_checkpoint_of_an_fp32_run(runs: Runs) -> None:
    assert runs.refusals["bf16 after fp32"] == ""
    assert runs.checkpoints("bf16") == ["iter-0000001"]


@pytest.mark.parametrize(
    ("name", "output", "what"),
    [
        ("explodes", "explodes", "the loss after step 1 (rows "),
        ("explodes, validated", "validated", "the validation loss after step 1 is "),
    ],
)
def test_weights_under_which_a_loss_is_not_finite_are_not_kept(name: str, output: str, what: str, runs: Runs) -> None:
    assert runs.refusals[name].startswith(what)
    assert runs.refusals[name].endswith("is not finite; no checkpoint was saved.")
    assert runs.checkpoints(output) == []


def test_a_checkpoint_whose_manifest_cannot_be_written_is_none_and_leaves_nothing(runs: Runs) -> None:
    assert "No space left on device" in runs.refusals["disk full"]
    assert runs.refusals["disk full"].endswith("; no checkpoint was saved.")
    assert runs.checkpoints("full") == []


def test_a_finished_run_that_is_started_again_ends_well_changes_nothing_and_makes_the_report_that_was_lost(
    runs: Runs,
) -> None:
    assert runs.refusals["finished"] == ""
    assert (runs.folder / "bf16/report.html").is_file()
    assert runs.checkpoints("bf16") == ["iter-0000001"]
    assert [line["iteration"] for line in runs.metrics("bf16")] == [1]


def test_one_flipped_bit_of_a_checkpoint_that_a_run_starts_from_is_refused(runs: Runs) -> None:
    assert runs.refusals["altered start"].endswith(
        "the weights are not those that the manifest names; the checkpoint was altered."
    )


def test_one_flipped_bit_of_the_only_checkpoint_that_a_run_could_go_on_from_is_refused(runs: Runs) -> None:
    """It is moved out of the way, and stays. The same command given again does not start the run anew."""
    for start in ("altered run", "altered run again"):
        assert "no whole checkpoint is left to go on from" in runs.refusals[start]
    assert runs.checkpoints("still") == ["iter-0000005.damaged"]
