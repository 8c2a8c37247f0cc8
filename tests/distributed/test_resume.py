"""Continuing a run equals never having stopped it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.program import run_ranks


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def runs(request: Any, tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, pairs_file: Path) -> dict[str, Any]:
    """Four steps at DP2 with the distributed optimizer; the same as if killed after two, continued at DP2 and TP2."""
    folder = tmp_path_factory.mktemp("resume")
    validation = folder / "validation.jsonl"
    validation.write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:5]))

    def job(name: str, resume: bool = False, tensor: int = 1) -> dict[str, Any]:
        return {
            "model": {"checkpoint": str(checkpoint)},
            "parallel": {"tensor_model_parallel_size": tensor},
            "loss": {"type": "dpo"},
            "data": {"train": str(pairs_file), "validation": str(validation)},
            "optimizer": {"lr": 1e-3, "lr_warmup_iters": 1},
            "train": {
                "output": str(folder / name),
                "train_iters": 4,
                "save_interval": 2,
                "global_batch_size": 4,
                "micro_batch_size": 1,
                "precision": request.param,
                "resume": resume,
            },
        }

    whole = run_ranks("tests.support.jobs", "train_all", 2, recipe="dpo_tiny", jobs=[job("whole")])
    for name in ("continued", "of another Adam", "reshaped"):
        shutil.copytree(folder / "whole", folder / name)
        shutil.rmtree(folder / name / "checkpoints" / "iter-0000004")
    _as_fused_adam_saves(folder / "of another Adam" / "checkpoints" / "iter-0000002")
    jobs = [
        job("continued", resume=True),
        job("of another Adam", resume=True),
        job("reshaped", resume=True, tensor=2),
    ]
    continued = run_ranks("tests.support.jobs", "train_all", 2, recipe="dpo_tiny", jobs=jobs)
    metrics = dict(zip(["whole", "continued", "of another Adam", "reshaped"], [*whole, *continued], strict=True))
    return {"folder": folder, "precision": request.param, **metrics}


def _as_fused_adam_saves(saved: Path) -> None:
    """Leave the options that Transformer Engine's FusedAdam has, and nothing that torch's alone knows."""
    import torch

    from tgdpo_megatron.checkpoint.sums import write_sums

    path = saved / "weights" / "common.pt"
    state = torch.load(path, weights_only=False)  # our own run's
    for group in state["optimizer"]["optimizer"]["param_groups"]:
        for option in ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"):
            group.pop(option, None)
        group |= {"bias_correction": True, "step": int(group["step"])}
    torch.save(state, path)
    write_sums(saved, {})  # a run that trained with it would have named the file's sum


@pytest.mark.parametrize("name", ["continued", "of another Adam"])
def test_continued_run_has_bit_equal_weights(runs: dict[str, Any], name: str) -> None:
    paths = [runs["folder"] / run / "checkpoints/iter-0000004/manifest.json" for run in ("whole", name)]
    whole, continued = (json.loads(path.read_text()) for path in paths)
    assert whole["weights"] == continued["weights"]


def test_continued_run_has_the_same_metrics(runs: dict[str, Any]) -> None:
    assert len(runs["continued"]) == len(runs["whole"]) == 4
    for whole, continued in zip(runs["whole"], runs["continued"], strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "num_tokens", "rewards/margins"):
            assert whole[name] == continued[name], name


def test_run_continued_at_another_layout_has_the_same_loss(runs: dict[str, Any]) -> None:
    # fp32: sums in another order, magnified by two steps of Adam. bf16: matrix products of other shapes round
    # to 8 bits; log-probs of about -100 nats a response then differ by tenths, of which beta takes a tenth.
    tolerance = 1e-4 if runs["precision"] == "fp32" else 5e-2
    found = [line["loss"] for line in runs["reshaped"]]
    assert found == pytest.approx([line["loss"] for line in runs["whole"]], abs=tolerance)


def test_tokens_of_a_step_are_counted_once_at_any_layout(runs: dict[str, Any]) -> None:
    """Two data-parallel ranks add their halves up; of two tensor-parallel ranks one counts for both."""
    assert [line["num_tokens"] for line in runs["reshaped"]] == [line["num_tokens"] for line in runs["whole"]]


def test_evaluation_counts_every_pair_once_on_uneven_ranks(runs: dict[str, Any]) -> None:
    # Five pairs on two data-parallel ranks against one; a mean of rank means would differ by 1e-2 and more in fp32.
    tolerance = 1e-4 if runs["precision"] == "fp32" else 5e-2
    uneven, one = runs["continued"][-1], runs["reshaped"][-1]
    assert uneven["eval/loss"] == pytest.approx(one["eval/loss"], abs=tolerance)
