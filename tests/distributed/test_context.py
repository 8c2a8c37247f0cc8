"""Ranks that split sequences do what one process does: scoring, training, validation, answers, and going on.

The layouts, methods and families are compared with HuggingFace by `make parity`, step by step; here are whole programs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.program import run_ranks

CP2 = {"context_parallel_size": 2}
LOOKS_AT_PLACES: dict[str, Any] = {"initializer_range": 0.1}
"""With the usual 0.02, attention of random models hardly depends on where it looks."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, make_hf_model: Callable[..., Path]) -> dict[str, str]:
    """Llamas as reference and guidance, and a Gemma-3 whose windows of 8 tokens are shorter than its sequences."""
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron

    folder = tmp_path_factory.mktemp("models")
    made: dict[str, dict[str, Any]] = {
        "reference": {"seed": 0},
        "guidance": {"seed": 1},
        "gemma": {"family": "gemma3_text", "sliding_window": 8, "num_hidden_layers": 6},
    }
    for name, shape in made.items():
        hf_to_megatron(make_hf_model(folder / f"{name}-hf", **LOOKS_AT_PLACES, **shape), folder / name)
    return {name: str(folder / name) for name in made}


def test_scores_are_the_same_with_and_without_sharing_with_sequences_whole_and_split_over_two_ranks(
    models: dict[str, str], pairs_file: Path, tmp_path: Path
) -> None:
    """And are written once. The largest difference may be that of a log-prob from HuggingFace's, 1e-5 nats."""
    from tgdpo_megatron.data.prepare import load_prepared
    from tgdpo_megatron.scores.store import load_scores, read_shards

    def job(name: str, parallel: dict[str, Any], **train: Any) -> dict[str, Any]:
        return {
            "model": {"checkpoint": models["reference"], "guidance": models["guidance"]},
            "parallel": parallel,
            "data": {"train": str(pairs_file)},
            "scores": {"path": str(tmp_path / name)},
            "train": {"micro_batch_size": 2, **train},
        }

    jobs = [
        job("two ranks, shared", CP2),
        job("two ranks, apart", CP2, shared_prompts=False),
        job("two ranks, shared, packs", CP2, micro_batch_tokens=128, fixed_micro_batches=True),
        job("copies, shared", {}),
        job("copies, apart", {}, shared_prompts=False),
    ]
    run_ranks("tests.support.jobs", "score_all", 2, recipe="tgdpo_tiny", jobs=jobs)
    data = load_prepared(next((tmp_path / "copies, apart" / "data").glob("train-*")))
    names = ("reference", "guidance")
    everything = range(len(data)), (0, 1)
    expected = load_scores(tmp_path / "copies, apart" / "train", data, names).join(*everything)
    for place in (tmp_path / settings["scores"]["path"] for settings in jobs[:-1]):
        found = load_scores(place / "train", data, names).join(*everything)
        for name in names:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5, err_msg=f"{place.name}: {name}")
        keys = [key for key, _ in read_shards(place / "train")]
        assert len(keys) == len(set(keys)) == 2 * 2 * len(data)


def test_training_on_cached_scores_equals_training_beside_the_models_on_two_ranks(
    models: dict[str, str], pairs_file: Path, tmp_path: Path
) -> None:
    """The scores are made on the same two ranks, from prompts that are shared as well."""
    common = {
        "model": {"checkpoint": models["reference"], "guidance": models["guidance"]},
        "parallel": CP2,
        "data": {"train": str(pairs_file)},
        "optimizer": {"lr": 1e-3, "lr_warmup_iters": 0},
    }
    train = {"train_iters": 3, "global_batch_size": 4, "micro_batch_size": 2}
    store = {"path": str(tmp_path / "scores")}
    jobs = [
        {**common, "scores": {"source": "cached", **store}, "train": {**train, "output": str(tmp_path / "cached")}},
        {**common, "train": {**train, "output": str(tmp_path / "live")}},
    ]
    cached, live = run_ranks(
        "tests.support.jobs",
        "score_and_train",
        2,
        recipe="tgdpo_tiny",
        scoring=[{**common, "scores": store, "train": train}],
        jobs=jobs,
    )
    for name in ("loss", "tgdpo/margins", "tgdpo/weight_std", "rewards/margins"):
        assert [line[name] for line in cached] == pytest.approx([line[name] for line in live], abs=1e-6), name
    assert live[2]["loss"] != live[1]["loss"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str], pairs_file: Path) -> dict[str, Any]:
    """Four steps of two models in one process and on two ranks that split sequences; and runs that began so, and go
    on from step 2 as they were and at TP2."""
    folder = tmp_path_factory.mktemp("context")
    validation = folder / "validation.jsonl"
    validation.write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:5]))

    def job(name: str, model: str, parallel: dict[str, Any], **train: Any) -> dict[str, Any]:
        return {
            "model": {"checkpoint": models[model]},
            "parallel": parallel,
            "loss": {"type": "dpo"},
            "data": {"train": str(pairs_file), "validation": str(validation)},
            "optimizer": {"lr": 1e-3, "lr_warmup_iters": 1},
            "train": {
                "output": str(folder / name),
                "train_iters": 4,
                "save_interval": 2,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                **train,
            },
            "report": {"samples": 2, "max_new_tokens": 6},
        }

    train_all = ("tests.support.jobs", "train_all")
    alone = run_ranks(
        *train_all, 1, recipe="dpo_tiny", jobs=[job("alone", "reference", {}), job("gemma alone", "gemma", {})]
    )
    jobs = [job("split", "reference", CP2), job("gemma split", "gemma", CP2)]
    both = run_ranks(*train_all, 2, recipe="dpo_tiny", jobs=jobs)
    layouts = {"continued": CP2, "reshaped": {"tensor_model_parallel_size": 2}}
    for name in layouts:
        shutil.copytree(folder / "split", folder / name)
        shutil.rmtree(folder / name / "checkpoints" / "iter-0000004")
    jobs = [job(name, "reference", layout, resume=True) for name, layout in layouts.items()]
    resumed = run_ranks(*train_all, 2, recipe="dpo_tiny", jobs=jobs)
    names = ("alone", "gemma alone", "split", "gemma split", *layouts)
    return {"folder": folder, **dict(zip(names, [*alone, *both, *resumed], strict=True))}


PAIRS_OF_RUNS = [("alone", "split"), ("alone", "reshaped"), ("gemma alone", "gemma split")]


@pytest.mark.parametrize("both", PAIRS_OF_RUNS, ids=str)
def test_ranks_that_split_sequences_train_and_evaluate_as_one_process_does(
    both: tuple[str, str], runs: dict[str, Any]
) -> None:
    """Sums in another order, magnified by steps of Adam: the limit of a run that is continued at another layout. A
    gradient's norm is that of weights which differ so, and is given ten times as much."""
    one, other = (runs[name] for name in both)
    assert len(one) == len(other) == 4
    for expected, found in zip(one, other, strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen", "eval/loss", "eval/logps/rejected"):
            if name in expected:
                assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        for name in ("num_tokens", "learning_rate", "rewards/accuracies"):
            assert found[name] == expected[name], name
    assert "eval/loss" in one[-1] and one[3]["loss"] != one[0]["loss"]


@pytest.mark.parametrize("both", PAIRS_OF_RUNS, ids=str)
def test_ranks_that_split_sequences_give_the_answers_that_one_process_gives(
    both: tuple[str, str], runs: dict[str, Any]
) -> None:
    one, other = (json.loads((runs["folder"] / name / "answers.json").read_text()) for name in both)
    assert one == other and len(one) == 2


def test_a_run_that_is_continued_on_ranks_that_split_sequences_has_the_weights_of_one_that_never_stopped(
    runs: dict[str, Any],
) -> None:
    """Bit for bit."""
    paths = [runs["folder"] / name / "checkpoints/iter-0000004/manifest.json" for name in ("split", "continued")]
    whole, continued = (json.loads(path.read_text()) for path in paths)
    assert whole["weights"] == continued["weights"]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in runs["continued"]] == [line[name] for line in runs["split"]], name
