"""A checkpoint trained at TP2×PP2 is the same model in HuggingFace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.program import run_ranks

IDS = [1, 40, 7, 250, 12, 99, 3]
LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def models(
    request: Any, tmp_path_factory: pytest.TempPathFactory, make_hf_model: Callable[..., Path], pairs_file: Path
) -> dict[str, Path]:
    """A start in HuggingFace's and Megatron's form, and the same after two steps of DPO."""
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf

    folder = tmp_path_factory.mktemp("export")
    start = make_hf_model(folder / "start-hf", tie_word_embeddings=request.param)
    hf_to_megatron(start, folder / "start")
    job = {
        "model": {"checkpoint": str(folder / "start")},
        "parallel": {**LAYOUT, "sequence_parallel": True},
        "loss": {"type": "dpo"},
        "data": {"train": str(pairs_file)},
        "optimizer": {"lr": 1e-3, "lr_warmup_iters": 0},
        "train": {"output": str(folder / "run"), "train_iters": 2, "global_batch_size": 4, "micro_batch_size": 2},
    }
    trained = folder / "run" / "checkpoints" / "iter-0000002"
    looks = [
        {"folder": str(place), "ids": IDS, "parallel": LAYOUT, "output": str(folder / f"{name}.pt")}
        for name, place in (("start", folder / "start"), ("trained", trained))
    ]
    run_ranks("tests.support.jobs", "train_and_look", 4, recipe="dpo_tiny", job=job, looks=looks)
    megatron_to_hf(trained, folder / "trained-hf")
    return {"folder": folder, "start": start, "trained": folder / "trained-hf"}


@pytest.mark.parametrize("which", ["start", "trained"])
def test_huggingface_and_megatron_give_the_same_distribution(models: dict[str, Path], which: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models[which])
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([IDS])).logits[0], dim=-1)
    found = torch.load(models["folder"] / f"{which}.pt")
    assert float((found - expected).abs().max()) < 1e-5


def test_training_changed_the_model(models: dict[str, Path]) -> None:
    start, trained = (torch.load(models["folder"] / f"{name}.pt") for name in ("start", "trained"))
    assert float((start - trained).abs().max()) > 1e-3
