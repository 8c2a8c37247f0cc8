"""Methods end to end: scores made, read and trained on, with step 0 worked out by hand.

At step 0 the policy is the reference, so the store's own numbers are the policy's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.program import run_ranks
from tgdpo_megatron.scores.contrastive import DEFAULT

Metrics = list[dict[str, float]]

DIRECT = DEFAULT.with_name("direct.yaml")
FILLED = {"micro_batch_tokens": 64, "fixed_micro_batches": True}
"""More tokens than any pair here has, fewer than any response under a contrastive prompt."""


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Path,
    make_hf_model: Callable[..., Path],
    pairs_file: Path,
    tokenizer: Any,
) -> tuple[dict[str, Metrics], dict[str, Any]]:
    """Metrics of two steps of each method on all pairs, and the store's scores: name -> [pair][side]."""
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron
    from tgdpo_megatron.config import DataConfig
    from tgdpo_megatron.data.prepare import prepare_pairs
    from tgdpo_megatron.scores.store import load_scores

    folder = tmp_path_factory.mktemp("methods")
    hf_to_megatron(make_hf_model(folder / "guidance-hf", seed=1), folder / "guidance")
    data = prepare_pairs(DataConfig(max_length=256), pairs_file, tokenizer, folder / "pairs")
    rewards = folder / "rewards.jsonl"
    lengths = [[data.response_length(pair, side) for side in (0, 1)] for pair in range(len(data))]
    lines = [
        {"row": pair + 1, "chosen": [0.25 * pair] * both[0], "rejected": [-1.0] * both[1]}
        for pair, both in enumerate(lengths)
    ]
    rewards.write_text("".join(json.dumps(line) + "\n" for line in lines))

    store, cached = {"path": str(folder / "scores")}, {"source": "cached", "path": str(folder / "scores")}
    short = {"contrastive_prompts": str(DIRECT)}  # refine.yaml's does not fit 256 positions
    common = {
        "model": {"checkpoint": str(checkpoint)},
        "data": {"train": str(folder / "pairs"), "max_length": 256},
        "train": {"micro_batch_size": 1},
    }
    guided = common | {"model": common["model"] | {"guidance": str(folder / "guidance")}}
    file = {"type": "tgdpo", "token_rewards": "file", "beta_r": 0.5}
    runs: dict[str, dict[str, Any]] = {
        "dpo_reg": common | {"loss": {"type": "dpo_reg"}, "scores": cached | short},
        "tgdpo, file, cached": common | {"loss": file, "scores": cached | {"reward_file": str(rewards)}},
        "tgdpo, file, live": common | {"loss": file, "scores": {"reward_file": str(rewards)}},
        "sepo": common | {"loss": {"type": "sepo"}, "scores": cached},
        "sepo, live": guided | {"loss": {"type": "sepo"}},
        "simpo": common | {"loss": {"type": "simpo"}},
        "tdpo2": common | {"loss": {"type": "tdpo2"}},
    }
    train = {"train_iters": 2, "global_batch_size": 6, "micro_batch_size": 3}
    jobs = [
        run | {"optimizer": {"lr_warmup_iters": 0}, "train": train | {"output": str(folder / name)}}
        for name, run in runs.items()
    ]
    scoring = [
        common | {"loss": {"type": "dpo_reg"}, "scores": store | short, "train": FILLED},
        guided | {"loss": {"type": "sepo"}, "scores": store},
    ]
    metrics = run_ranks("tests.support.jobs", "score_and_train", 1, recipe="dpo_tiny", scoring=scoring, jobs=jobs)
    names = ("reference", "guidance", "better", "worse")
    scores = load_scores(folder / "scores" / "train", data, names)
    joined = {
        name: [[scores.join([pair], [side])[name].double().numpy() for side in (0, 1)] for pair in range(len(data))]
        for name in names
    }
    joined["reward"] = [[np.array(line["chosen"]), np.array(line["rejected"])] for line in lines]
    return dict(zip(runs, metrics, strict=True)), joined


def test_dpo_reg_from_contrastive_scores_begins_at_its_formula(trained: Any) -> None:
    """ln 2 + α · σ(0) · Σ over both responses of −β r̂ ℓ, with r̂ = σ(better − worse) − ½; β 0.1, α 0.25."""
    metrics, scores = trained
    losses = []
    for better, worse, policy in zip(scores["better"], scores["worse"], scores["reference"], strict=True):
        rewards = [1 / (1 + np.exp(w - b)) - 0.5 for b, w in zip(better, worse, strict=True)]
        regulariser = sum(-0.1 * (r * logp).sum() for r, logp in zip(rewards, policy, strict=True))
        losses.append(math.log(2) + 0.25 * 0.5 * regulariser)
    assert metrics["dpo_reg"][0]["loss"] == pytest.approx(np.mean(losses), abs=1e-6)
    assert abs(np.mean(losses) - math.log(2)) > 1e-4, "the regulariser counts"


def test_scoring_takes_prompts_that_are_longer_than_trainings_fixed_micro_batches(trained: Any, tokenizer: Any) -> None:
    """Training refuses a pair that does not fit; a prompt that asks for better or worse is nobody's pair."""
    _, scores = trained
    asked = DIRECT.read_text().split("better: |-")[1].split("worse: |-")[0]
    assert len(tokenizer(asked)["input_ids"]) > FILLED["micro_batch_tokens"]
    for name in ("better", "worse"):
        lengths = [[len(side) for side in pair] for pair in scores[name]]
        assert lengths == [[len(side) for side in pair] for pair in scores["reference"]]


@pytest.mark.parametrize("name", ["tgdpo, file, cached", "tgdpo, file, live"])
def test_tgdpo_reads_its_rewards_from_a_file(name: str, trained: Any) -> None:
    metrics, scores = trained
    every = np.concatenate([tokens for pair in scores["reward"] for tokens in pair])
    assert metrics[name][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[name][0]["token_rewards/mean"] == pytest.approx(0.5 * every.mean(), abs=1e-6)


@pytest.mark.parametrize("both", [("tgdpo, file, cached", "tgdpo, file, live"), ("sepo", "sepo, live")], ids=str)
def test_live_and_cached_scores_train_alike(both: tuple[str, str], trained: Any) -> None:
    cached, live = (trained[0][name] for name in both)
    assert [line["loss"] for line in cached] == pytest.approx([line["loss"] for line in live], abs=1e-6)
    assert cached[1]["loss"] != cached[0]["loss"]


def test_sepo_begins_at_its_formula(trained: Any) -> None:
    """−ln σ(γ · (mean ℓ of the chosen's highest 30 % − mean ℓ of the rejected's lowest 30 %)); γ 2.1.

    30 % are rounded down, but to no less than one token.
    """
    metrics, scores = trained
    losses = []
    for reference, guidance in zip(scores["reference"], scores["guidance"], strict=True):
        means = []
        for logps, guide, sign in zip(reference, guidance, (-1, 1), strict=True):
            order = np.argsort(sign * (guide - logps), kind="stable")
            means.append(logps[order[: max(1, math.floor(0.3 * len(logps)))]].mean())
        losses.append(np.logaddexp(0, -2.1 * (means[0] - means[1])))
    assert metrics["sepo"][0]["loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_simpo_begins_at_its_formula_without_any_reference(trained: Any) -> None:
    """−ln σ(β (mean ℓ_w − mean ℓ_l) − γ); β 2.5, γ/β 0.55."""
    metrics, scores = trained
    margins = np.array([2.5 * (chosen.mean() - rejected.mean() - 0.55) for chosen, rejected in scores["reference"]])
    assert metrics["simpo"][0]["loss"] == pytest.approx(np.logaddexp(0, -margins).mean(), abs=1e-5)


def test_tdpo2_begins_at_ln_2(trained: Any) -> None:
    lines = trained[0]["tdpo2"]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and lines[0]["divergence/mean"] < 1e-6
    assert lines[1]["divergence/mean"] > 1e-7, "the policy has moved"
