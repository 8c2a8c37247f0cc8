"""Certificates: what they compare, whom they let through, and what happens to those that are not true."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.models import FAMILIES, make_model
from tgdpo_megatron import preflight
from tgdpo_megatron.checkpoint.certificate import NAME, Certificate, check_certificate, hand_on, read_certificate
from tgdpo_megatron.checkpoint.certify import certify
from tgdpo_megatron.checkpoint.convert import hf_to_megatron
from tgdpo_megatron.checkpoint.manifest import read_manifest
from tgdpo_megatron.config import Config, ModelConfig
from tgdpo_megatron.errors import UserError


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of the test's own."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def test_a_conversion_writes_a_certificate_of_what_was_read_and_written(checkpoint: Path, hf_model: Path) -> None:
    found, manifest = read_certificate(checkpoint), read_manifest(checkpoint)
    assert found.weights == manifest.weights and found.weights_bf16 == manifest.weights_bf16
    assert set(found.source) == {"config.json", "model.safetensors"}
    assert found.tokens > 0 and 0 <= found.largest_difference < 1e-5
    assert found.family == "llama" and set(found.versions) == {"torch", "transformers", "megatron-core"}
    check_certificate(checkpoint, manifest)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_sees_two_layers_in_each_others_place(family: str, tmp_path: Path) -> None:
    """Two layers' output matrices: the shapes fit, the sums of all bits are the same, and it is another model."""
    make_model(1, family, tied=True).save_pretrained(tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "checkpoint")
    shutil.copytree(tmp_path / "hf", tmp_path / "swapped")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    first, second = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 2))
    weights[first], weights[second] = weights[second], weights[first]
    save_file(weights, tmp_path / "swapped" / "model.safetensors", metadata={"format": "pt"})
    before = (tmp_path / "checkpoint" / NAME).read_text()
    with pytest.raises(UserError, match=r"log-probs differ from HuggingFace's by .* nats, more than rounding explains"):
        certify(tmp_path / "swapped", tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / NAME).read_text() == before


def test_the_two_models_are_compared_in_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    """fp32 weights that become bf16 on the way are rounded on both sides."""
    make_model(1, "qwen3", tied=False).save_pretrained(tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "checkpoint", dtype="bf16")
    found = read_certificate(tmp_path / "checkpoint")
    assert found.dtype == "bfloat16" and found.largest_difference < 1e-5


def test_memory_holds_one_module_at_a_time(tmp_path: Path) -> None:
    """Weights that were lent are taken back: after the comparison no parameter of either model is left."""
    from tgdpo_megatron.checkpoint import certify as module

    model = torch.nn.Sequential(torch.nn.Linear(4, 4, device="meta"), torch.nn.Linear(4, 4, device="meta"))
    held: list[int] = []

    def read(name: str) -> torch.Tensor:
        held.append(sum(not weight.is_meta for weight in model.parameters()))
        return torch.ones((4, 4) if name.endswith("weight") else 4)

    module._lend(model, read, lambda _: None)
    assert model(torch.ones(1, 4)).tolist() == [[4 * 5 + 1.0] * 4]
    assert held == [0, 1, 0, 1]
    assert all(weight.is_meta for weight in model.parameters())


def config(folder: Path, **more: bool) -> Config:
    return Config(model=ModelConfig(checkpoint=folder, **more))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda path: path.unlink(),
            "has no certificate, so nothing shows that it gives HuggingFace's log-probs; make",
        ),
        (lambda path: path.write_text("{}"), "not a certificate; make it again with python -m tools.certify"),
        (lambda path: path.write_text("["), "not a certificate"),
        (lambda path: rewrite(path, largest_difference=0.0), "the certificate was altered"),
        (lambda path: rewrite(path, weights="0" * 64), "the certificate was altered"),
        (lambda path: rewrite(path, seal=True, weights="0" * 64), "is of other weights than the checkpoint's"),
        (lambda path: rewrite(path, seal=True, largest_difference=0.5), "log-probs differ from HuggingFace's by 0.5"),
    ],
)
def test_a_checkpoint_without_a_true_certificate_is_refused_unless_none_is_required(
    edit: Callable[[Path], None], words: str, copy: Path
) -> None:
    edit(copy / NAME)
    with pytest.raises(UserError) as refused:
        preflight.check_models(config(copy))
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert preflight.check_models(config(copy, require_certificate=False)).policy == read_manifest(copy)


def rewrite(path: Path, *, seal: bool = False, **changes: object) -> None:
    content = {**json.loads(path.read_text()), **changes}
    if seal:
        content["seal"] = Certificate(**content).sealed().seal
    path.write_text(json.dumps(content))


def test_a_certificate_does_not_cover_another_config(copy: Path) -> None:
    path = copy / "hf" / "config.json"
    path.write_text(path.read_text().replace("}", " }", 1))
    with pytest.raises(UserError, match=r"is of another hf/config\.json"):
        preflight.check_models(config(copy))


def test_a_certificate_can_be_made_again(copy: Path, hf_model: Path) -> None:
    before = read_certificate(copy)
    (copy / NAME).unlink()
    certify(hf_model, copy)
    assert read_certificate(copy) == before


def test_a_run_hands_its_certificate_on_under_its_own_fingerprint(copy: Path, checkpoint: Path) -> None:
    from dataclasses import replace

    trained = replace(read_manifest(copy), weights="1" * 64, weights_bf16="2" * 64, iteration=3)
    hand_on(checkpoint, copy, trained)
    check_certificate(copy, trained)
    start = read_certificate(checkpoint)
    assert read_certificate(copy).trained_from == start.weights
    assert read_certificate(copy).source == start.source


def test_a_run_without_a_certificate_hands_on_none(copy: Path, tmp_path: Path) -> None:
    (copy / NAME).unlink()
    shutil.copytree(copy, tmp_path / "saved")
    hand_on(copy, tmp_path / "saved", read_manifest(copy))
    assert not (tmp_path / "saved" / NAME).exists()
