"""Certificates: what they compare, whom they let through, and what happens to those that are not true."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.models import FAMILIES, make_model
from tgdpo_megatron import preflight
from tgdpo_megatron.checkpoint import certify as certify_module
from tgdpo_megatron.checkpoint.certificate import (
    NAME,
    Certificate,
    check_certificate,
    hand_on,
    limit_for,
    read_certificate,
)
from tgdpo_megatron.checkpoint.certify import certify
from tgdpo_megatron.checkpoint.convert import hf_to_megatron
from tgdpo_megatron.checkpoint.index import read_index
from tgdpo_megatron.checkpoint.lending import lend
from tgdpo_megatron.checkpoint.manifest import WEIGHTS, describe, read_manifest
from tgdpo_megatron.config import Config, ModelConfig
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.families import family_of


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
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, device="meta"), torch.nn.Linear(4, 4, device="meta"))
    held: list[int] = []

    def read(name: str) -> torch.Tensor:
        held.append(sum(not weight.is_meta for weight in model.parameters()))
        return torch.ones((4, 4) if name.endswith("weight") else 4)

    lend(model, read, lambda _: None)
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
        (lambda path: path.write_text("{}"), "not a certificate; make one with python -m tools.certify"),
        (lambda path: path.write_text("["), "not a certificate"),
        (lambda path: rewrite(path, largest_difference=0.0), "the certificate was altered"),
        (lambda path: rewrite(path, weights="0" * 64), "the certificate was altered"),
        (lambda path: rewrite(path, seal=True, weights="0" * 64), "is of other weights than the checkpoint's"),
        (
            lambda path: rewrite(path, seal=True, largest_difference=0.5),
            "by 0.5 nats, more than the 0.001",
        ),
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


def test_a_run_does_not_make_an_invalid_certificate_valid(copy: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The start's certificate is of other weights; model.require_certificate=false let the run begin."""
    manifest = copy / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"weights": "3" * 64}))
    shutil.copytree(copy, tmp_path / "saved")
    (tmp_path / "saved" / NAME).unlink()
    hand_on(copy, tmp_path / "saved", replace(read_manifest(checkpoint), weights="1" * 64, iteration=3))
    assert not (tmp_path / "saved" / NAME).exists()


def test_who_owns_a_checkpoint_of_a_run_is_told_to_certify_its_start(copy: Path) -> None:
    (copy / NAME).unlink()
    manifest = copy / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"iteration": 3}))
    with pytest.raises(UserError, match="certify the checkpoint that the run started from before the run"):
        preflight.check_models(config(copy))


@pytest.mark.parametrize("windowed", [(False,) * 4, (False, True) * 2], ids=["none", "the others"])
def test_the_comparison_sees_windows_on_the_wrong_layers_however_wide_they_are(
    windowed: tuple[bool, ...], tmp_path: Path
) -> None:
    """Windows of 4096 tokens, as Gemma-2 has them, which a wrong reading of config.json would give to other layers; and
    a comparison of 33 tokens."""
    make_model(1, "gemma2", tied=True, sliding_window=4096).save_pretrained(tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "checkpoint")
    right, sequences = describe(tmp_path / "checkpoint"), certify_module._sequences(300)
    index = read_index(tmp_path / "checkpoint" / WEIGHTS)
    dtypes = {name: torch.float32 for tensor in family_of(right).tensors(right) for name in tensor.names}
    theirs = certify_module._huggingfaces(tmp_path / "hf", dtypes, right, sequences)
    found = [
        float((certify_module._ours(tmp_path / "checkpoint", index, description, sequences) - theirs).abs().max())
        for description in (right, replace(right, windowed_layers=windowed))
    ]
    assert found[0] < 1e-5 and found[1] > 10 * limit_for(float(theirs.abs().max()))


def test_a_checkpoint_of_another_model_is_told_apart_before_the_comparison(copy: Path, tmp_path: Path) -> None:
    make_model(1, "qwen3", tied=True).save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match="was not converted from .*, whose model differs in family"):
        certify(tmp_path / "hf", copy)


def test_tensors_of_several_dtypes_are_compared_each_in_its_own(tmp_path: Path) -> None:
    """A bf16 model with norms and output matrix in fp32, as some trainers save it."""
    make_model(1, "llama", tied=False).save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    wide = {name: "norm" in name or name == "lm_head.weight" for name in load_file(file)}
    narrowed = {name: x if wide[name] else x.bfloat16() for name, x in load_file(file).items()}
    save_file(narrowed, file, metadata={"format": "pt"})
    hf_to_megatron(tmp_path / "hf", tmp_path / "checkpoint")
    found = read_certificate(tmp_path / "checkpoint")
    assert found.dtype == "bfloat16, float32" and found.largest_difference < 1e-5


def test_a_comparison_that_is_killed_keeps_the_conversion_and_goes_on_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a child, as in a rank of a job; the child's Python is one that is killed."""
    make_model(1, "llama", tied=True).save_pretrained(tmp_path / "hf")
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    with monkeypatch.context() as pretended:
        pretended.setattr(certify_module, "dist", SimpleNamespace(is_initialized=lambda: True))
        pretended.setattr("sys.executable", str(killed))
        with pytest.raises(UserError, match=r"exit code -9; memory may have run out; what is finished stays in"):
            hf_to_megatron(tmp_path / "hf", tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint.partial" / "manifest.json").is_file() and not (tmp_path / "checkpoint").exists()
    hf_to_megatron(tmp_path / "hf", tmp_path / "checkpoint")
    check_certificate(tmp_path / "checkpoint", read_manifest(tmp_path / "checkpoint"))


def test_a_refusal_by_the_child_is_its_own_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(1, "llama", tied=True).save_pretrained(tmp_path / "hf")
    make_model(2, "llama", tied=True).save_pretrained(tmp_path / "other")
    hf_to_megatron(tmp_path / "hf", tmp_path / "checkpoint")
    monkeypatch.setattr(certify_module, "dist", SimpleNamespace(is_initialized=lambda: True))
    with pytest.raises(UserError, match=r"^\S+/other: the converted model's log-probs differ from HuggingFace's by"):
        certify(tmp_path / "other", tmp_path / "checkpoint")
    certify(tmp_path / "hf", tmp_path / "checkpoint")


def test_large_log_probs_may_differ_by_more() -> None:
    """Of a 2B model with random weights they are about -200 nats, and differ by 0.0011."""
    assert limit_for(30.0) == 1e-3 and 5e-3 < limit_for(200.0) < 1e-2


def test_the_comparison_reads_an_output_matrix_that_a_tied_model_stores_as_huggingface_does(tmp_path: Path) -> None:
    make_model(1, "llama", tied=True).save_pretrained(tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "checkpoint")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = 2 * weights["model.embed_tokens.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="more than rounding explains"):
        certify(tmp_path / "hf", tmp_path / "checkpoint")
