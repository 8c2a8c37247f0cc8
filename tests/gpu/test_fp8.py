"""Training with the policy's layers in FP8."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.gpu_where import HAVE_TRANSFORMER_ENGINE, REHEARSAL, TRANSFORMER_ENGINE, on_gpu
from tgdpo_megatron.config.constants import FP8_FORMATS

STEPS = 20
RECIPES = ("tensorwise", "delayed", "blockwise")
CLOSE = 0.02
"""Largest difference of a step's loss from bf16's. With FP8 emulated on a CPU (bench/fp8/emulation.py) the same run was
off by 0.003 at most; a GPU also adds up FP8 products with fewer bits."""


@pytest.fixture(scope="module", autouse=True)
def fp8_is_there() -> None:
    if REHEARSAL:
        return
    if not HAVE_TRANSFORMER_ENGINE:
        pytest.skip("Transformer Engine is not installed")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the GPU has no FP8 for all recipes")


def fp8(recipe: str) -> dict[str, Any]:
    return {} if REHEARSAL else {"fp8": FP8_FORMATS[recipe], "fp8_recipe": recipe}


def job(folder: Path, pairs: Path, models: dict[str, str], **train: Any) -> dict[str, Any]:
    return {
        "model": models,
        "data": {"train": str(pairs)},
        "optimizer": {"lr": 1e-3, "lr_warmup_iters": 2},
        "train": {
            "output": str(folder),
            "train_iters": STEPS,
            "global_batch_size": 6,
            "micro_batch_size": 1,
            "precision": "bf16",
            **train,
        },
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, make_hf_model: Callable[..., Path]) -> dict[str, str]:
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron

    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("reference", "guidance")):
        hf_to_megatron(make_hf_model(folder / f"{name}-hf", seed=seed), folder / name)
    return {"checkpoint": str(folder / "reference"), "guidance": str(folder / "guidance")}


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, models: dict[str, str], pairs_file: Path
) -> tuple[dict[str, list[dict[str, float]]], Path]:
    """Metrics of a TGDPO run with live frozen models in bf16, and in each recipe; the folder of the runs."""
    folder = tmp_path_factory.mktemp("fp8")
    runs = {"bf16": {}, **{recipe: fp8(recipe) for recipe in RECIPES}}
    jobs = [job(folder / name, pairs_file, models, **train) for name, train in runs.items()]
    found = on_gpu("train_all", layers=TRANSFORMER_ENGINE, recipe="tgdpo_tiny", jobs=jobs)
    return dict(zip(runs, found, strict=True)), folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_twenty_steps_are_finite_learn_and_stay_close_to_bf16(recipe: str, trained: Any) -> None:
    metrics, _ = trained
    losses, expected = ([line["loss"] for line in metrics[name]] for name in (recipe, "bf16"))
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 0.1 and expected[-1] < expected[0] - 0.1
    assert losses == pytest.approx(expected, abs=CLOSE)
    assert REHEARSAL or losses != expected, "FP8 changed nothing: was it on?"


@pytest.mark.parametrize("recipe", RECIPES)
def test_padding_to_multiples_of_16_is_counted(recipe: str, trained: Any) -> None:
    """A pair to a micro-batch and all pairs to a step: the padding is that of each pair's two sequences together."""
    from tgdpo_megatron.data.prepare import load_prepared

    metrics, folder = trained
    data = load_prepared(next((folder / recipe / "data").iterdir()))
    tokens = [sum(len(data.sequence(pair, side)) - 1 for side in (0, 1)) for pair in range(len(data))]
    padding = sum(-number % 16 for number in tokens)
    assert padding > 0 and len(data) == 6
    assert REHEARSAL or {line["num_padding_tokens"] for line in metrics[recipe]} == {padding}
    assert {line["num_padding_tokens"] for line in metrics["bf16"]} == {0}


def test_frozen_models_beside_an_fp8_policy_compute_in_bf16(models: dict[str, str]) -> None:
    """Bit for bit what they give beside a bf16 policy, in the same pack; the policy itself differs."""
    policies = [{}, *map(fp8, RECIPES)]
    bf16, *others = on_gpu(
        "live_log_probs", layers=TRANSFORMER_ENGINE, module="tests.support.gpu_jobs", models=models, policies=policies
    )
    for policy, *frozen in others:
        assert frozen == bf16[1:]
        assert REHEARSAL or policy != bf16[0]
    assert bf16[0] == bf16[1] != bf16[2], "the policy is the reference, and not the guidance"


def test_scores_are_bit_equal_whether_training_is_to_be_in_fp8_or_not(
    models: dict[str, str], pairs_file: Path, tmp_path: Path
) -> None:
    from tgdpo_megatron.data.prepare import load_prepared
    from tgdpo_megatron.scores.store import load_scores

    jobs = []
    for name, train in {"bf16": {}, "fp8": fp8("tensorwise")}.items():
        changes = job(tmp_path / "unused", pairs_file, models, **train)
        jobs.append(changes | {"scores": {"path": str(tmp_path / name)}})
    on_gpu("score_all", layers=TRANSFORMER_ENGINE, recipe="tgdpo_tiny", jobs=jobs)
    data = load_prepared(next((tmp_path / "bf16" / "data").iterdir()))
    bf16, in_fp8 = (load_scores(tmp_path / name / "train", data, ["reference", "guidance"]) for name in ("bf16", "fp8"))
    for name in ("reference", "guidance"):
        assert len(bf16.values[name]) and np.array_equal(bf16.values[name], in_fp8.values[name])
