"""Checkpoints of Megatron-Bridge, Megatron-LM and NeMo 2, as Megatron-Core saves and loads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.models import make_model
from tests.support.other_programs import settings_of, write_settings
from tests.support.program import run_ranks
from tgdpo_megatron.checkpoint.foreign.folder import BRIDGE, LM, NEMO, find_foreign
from tgdpo_megatron.checkpoint.foreign.reading import foreign_to_hf
from tgdpo_megatron.checkpoint.foreign.writing import hf_to_bridge
from tgdpo_megatron.errors import UserError

WEIGHTS = {BRIDGE: "iter_0000003", LM: "iter_0000003", NEMO: "weights"}
CASES = {
    "llama-of-Megatron-Bridge": ("llama", False, BRIDGE, {}),
    "gemma2-of-Megatron-Bridge": ("gemma2", True, BRIDGE, {}),
    "qwen2-of-Megatron-LM": ("qwen2", False, LM, {}),
    "qwen3-of-NeMo-2": ("qwen3", True, NEMO, {"prefix": "module."}),
    "llama-with-a-key-for-each-layer": ("llama", True, LM, {"stacked": False}),
    "qwen3-with-norms-of-their-own": ("qwen3", False, BRIDGE, {"fused_norms": False}),
}
"""family, whether embeddings are tied, program, what is particular of its form."""
SURPLUS = {"qwen3-with-more-tokens": ("qwen3", False, BRIDGE, {"padded": 600})}
"""Twice as many rows as the vocabulary has tokens: more than padding."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each case HF/ and FOREIGN/, saved from two tensor-parallel ranks."""
    root = tmp_path_factory.mktemp("saved")
    jobs = []
    for place, (name, (family, tied, program, form)) in enumerate({**CASES, **SURPLUS}.items()):
        hf, folder = root / name / "hf", root / name / "foreign"
        make_model(place, family, tied).to(torch.bfloat16 if place % 2 else torch.float32).save_pretrained(hf)
        config = json.loads((hf / "config.json").read_text())
        if program != LM:
            write_settings(folder, program, settings_of(config))
        else:
            folder.mkdir()
            (folder / "latest_checkpointed_iteration.txt").write_text("3")
        jobs.append({"hf": str(hf), "weights": str(folder / WEIGHTS[program]), "form": form, "args": program == LM})
    run_ranks("tests.support.other_programs", "save", 2, jobs=jobs)
    return root


@pytest.mark.parametrize("name", CASES)
def test_its_weights_become_the_huggingface_model_that_they_were_made_of(
    name: str, saved: Path, tmp_path: Path
) -> None:
    """Bit for bit, the padding of the vocabulary left out."""
    foreign = find_foreign(saved / name / "foreign")
    assert foreign is not None and foreign.program == CASES[name][2]
    foreign_to_hf(foreign, tmp_path / "hf", saved / name / "hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (saved / name / "hf", tmp_path / "hf"))
    assert before.keys() == after.keys()
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype and torch.equal(before[tensor], after[tensor]), tensor


def test_rows_that_padding_does_not_explain_are_refused(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nothing is stated: 128 for each of the two ranks, whose blocks show them."""
    root = saved / "qwen3-with-more-tokens"
    foreign = find_foreign(root / "foreign")
    assert foreign is not None
    with pytest.raises(
        UserError, match=r"has 600 rows, but \S+ describes 300, and padding would be fewer than 256 more"
    ):
        foreign_to_hf(foreign, tmp_path / "hf", root / "hf")
    config = json.loads((root / "hf" / "config.json").read_text())
    write_settings(root / "foreign", BRIDGE, settings_of(config, make_vocab_size_divisible_by=200))
    foreign_to_hf(foreign, tmp_path / "hf", root / "hf")
    assert "of 600 rows of the vocabulary the last 300 are left out as padding" in capsys.readouterr().err


def test_megatron_cores_loader_finds_every_tensor_where_the_programs_models_look_for_it(
    saved: Path, tmp_path: Path
) -> None:
    for name in ("llama-of-Megatron-Bridge", "gemma2-of-Megatron-Bridge"):
        hf = saved / name / "hf"
        hf_to_bridge(hf, tmp_path / name)
        assert (tmp_path / name / "latest_checkpointed_iteration.txt").read_text() == "release"
        found = run_ranks(
            "tests.support.other_programs", "loads", 2, hf=str(hf), weights=str(tmp_path / name / "release")
        )
        assert found["differing"] == []
        assert {"num_layers", "tensor_model_parallel_size", "no_save_optim"} <= set(found["args"])
