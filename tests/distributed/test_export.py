"""A checkpoint trained at TP2×PP2 is the same model in HuggingFace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.program import run_ranks
from tgdpo_megatron.checkpoint.index import read_index

IDS = [1, 40, 7, 250, 12, 99, 3]
LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def models(
    request: Any, tmp_path_factory: pytest.TempPathFactory, make_hf_model: Callable[..., Path], pairs_file: Path
) -> dict[str, Path]:
    """A start in HuggingFace's and Megatron's form, and the same after two steps of DPO."""
    from tgdpo_megatron.checkpoint import convert
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf

    folder = tmp_path_factory.mktemp("export")
    start = make_hf_model(folder / "start-hf", tie_word_embeddings=request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "BLOCK_BYTES", 5000)  # every rank then reads its part of a tensor from several blocks
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
    megatron_to_hf(trained, folder / "trained-hf", processes=2)
    return {"folder": folder, "start": start, "trained": folder / "trained-hf", "checkpoint": trained}


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


def test_an_export_has_neither_padding_nor_a_second_copy_of_tied_embeddings(models: dict[str, Path]) -> None:
    """Megatron pads the vocabulary of a run to a multiple of its ranks; the exported files are as the start's."""
    start, trained = (load_file(models[name] / "model.safetensors") for name in ("start", "trained"))
    assert {name: tensor.shape for name, tensor in trained.items()} == {
        name: tensor.shape for name, tensor in start.items()
    }
    stored = read_index(models["checkpoint"] / "weights")
    assert stored["embedding.word_embeddings.weight"].shape[0] > len(trained["model.embed_tokens.weight"])


def test_an_export_never_reads_the_optimizers_state(models: dict[str, Path], tmp_path: Path) -> None:
    """Every byte of it is destroyed first."""
    import shutil

    from tgdpo_megatron.checkpoint.convert import megatron_to_hf

    shutil.copytree(models["checkpoint"], tmp_path / "damaged")
    weights = tmp_path / "damaged" / "weights"
    destroyed = 0
    for key, tensor in read_index(weights).items():
        for block in tensor.blocks if key.startswith("optimizer.") else ():
            with (weights / block.file).open("r+b") as file:
                file.seek(block.start)
                file.write(b"x" * block.length)
            destroyed += 1
    assert destroyed
    megatron_to_hf(tmp_path / "damaged", tmp_path / "hf")
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", models["trained"]))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_export_that_cannot_be_written_is_a_warning_that_says_how_to_make_it_later(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on: its checkpoint is whole."""
    from tgdpo_megatron.train import _export

    (tmp_path / "hf").write_text("a file where the folder of exports should be")
    _export(checkpoint, tmp_path)
    said = capsys.readouterr().err
    assert said.startswith("warning: not exported (") and said.count("\n") == 1
    assert f"python -m tools.convert_megatron_to_hf {checkpoint} {tmp_path / 'hf' / checkpoint.name}" in said
