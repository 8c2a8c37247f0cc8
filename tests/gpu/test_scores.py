"""Scores from files, and scores of models that ride along, on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.gpu_where import on_gpu

LATER_STEPS = {"fp32": 1e-4, "bf16": 2e-2}
"""Gradients on a GPU are summed in an order of chance, and Adam magnifies what differs where they are near 0."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, make_hf_model: Callable[..., Path]) -> dict[str, str]:
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron

    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("reference", "guidance")):
        hf_to_megatron(make_hf_model(folder / f"{name}-hf", seed=seed), folder / name)
    return {"checkpoint": str(folder / "reference"), "guidance": str(folder / "guidance")}


def test_training_on_files_equals_training_beside_the_models(
    arithmetic: tuple[str, str], models: dict[str, str], pairs_file: Path, tmp_path: Path
) -> None:
    """A pair to a micro-batch in both programs: the same products of the same sizes, so that they round alike."""
    layers, precision = arithmetic
    train = {"train_iters": 3, "global_batch_size": 4, "micro_batch_size": 1, "precision": precision}
    common = {"model": models, "data": {"train": str(pairs_file)}, "optimizer": {"lr_warmup_iters": 0}}
    store = {"path": str(tmp_path / "scores")}
    jobs = [
        {**common, "scores": {"source": "cached", **store}, "train": {**train, "output": str(tmp_path / "cached")}},
        {**common, "train": {**train, "output": str(tmp_path / "live")}},
    ]
    scoring = [{**common, "scores": store, "train": train}]
    cached, live = on_gpu("score_and_train", layers=layers, recipe="tgdpo_tiny", scoring=scoring, jobs=jobs)
    names = ("loss", "tgdpo/margins", "tgdpo/weight_std", "rewards/margins")
    for name in names:
        assert cached[0][name] == pytest.approx(live[0][name], abs=1e-6), name
        for mine, theirs in zip(cached[1:], live[1:], strict=True):
            assert mine[name] == pytest.approx(theirs[name], abs=LATER_STEPS[precision]), name


def test_training_starts_at_ln_2_where_the_policy_is_the_reference(
    arithmetic: tuple[str, str], models: dict[str, str], pairs_file: Path, tmp_path: Path
) -> None:
    layers, precision = arithmetic
    job: dict[str, Any] = {
        "model": {"checkpoint": models["checkpoint"]},
        "data": {"train": str(pairs_file)},
        "optimizer": {"lr_warmup_iters": 0},
        "train": {
            "train_iters": 1,
            "global_batch_size": 6,
            "micro_batch_size": 3,
            "precision": precision,
            "output": str(tmp_path / "run"),
        },
    }
    ((first,),) = on_gpu("train_all", layers=layers, recipe="dpo_tiny", jobs=[job])
    assert first["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
