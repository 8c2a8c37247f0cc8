"""What a run may be continued with."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import Metadata

from tgdpo_megatron.checkpoint.manifest import WEIGHTS, CheckpointManifest, write_manifest
from tgdpo_megatron.config import Config, load
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.run_folder import check_continues, check_output, record

IDENTITY = CheckpointManifest(
    weights="w", dtype="float32", tokenizer="t", template="c", reference="r", guidance="g", pairs_hash="p", iteration=2
)


@pytest.fixture
def stopped(tmp_path: Path) -> tuple[Path, Config]:
    """A run stopped after its second step, and its settings."""
    config = load(Config(), {"train": {"output": str(tmp_path / "run"), "train_iters": 4}}, where="test")
    folder = tmp_path / "run" / "checkpoints" / "iter-0000002"
    (folder / WEIGHTS).mkdir(parents=True)
    index = Metadata(state_dict_metadata={})
    (folder / WEIGHTS / ".metadata").write_bytes(pickle.dumps(index))
    write_manifest(folder, IDENTITY)
    record(tmp_path / "run", config, None)
    return folder, config


def changed(config: Config, group: str, name: str, value: Any) -> Config:
    return load(config, {group: {name: value}}, where="test")


def test_a_run_continues_with_its_own_settings(stopped: tuple[Path, Config]) -> None:
    folder, config = stopped
    check_continues(folder, config, IDENTITY)
    resumed = changed(config, "train", "resume", True)
    assert check_output(folder.parent.parent, resumed) == folder


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("loss", "type", "dpo"),
        ("loss", "alpha", 1.0),
        ("train", "seed", 1),
        ("train", "global_batch_size", 64),
        ("train", "precision", "fp32"),
        ("data", "shuffle", False),
        ("optimizer", "lr", 1e-5),
        ("optimizer", "clip_grad", 0.5),
    ],
)
def test_a_run_is_not_continued_with_another_setting(
    stopped: tuple[Path, Config], group: str, name: str, value: Any
) -> None:
    folder, config = stopped
    with pytest.raises(UserError, match=f"the run has {group}.{name}="):
        check_continues(folder, changed(config, group, name, value), IDENTITY)


@pytest.mark.parametrize("content", ["a: [", "loss: 3", "- a", "", "\udcff"])
def test_a_run_whose_settings_were_damaged_is_not_continued(stopped: tuple[Path, Config], content: str) -> None:
    folder, config = stopped
    kept = folder.parent.parent / "config.yaml"
    kept.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=f"^{kept}: the settings of the run "):
        check_continues(folder, config, IDENTITY)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("pairs_hash", "pairs"),
        ("reference", "reference"),
        ("guidance", "guid"),
        ("rewards", "contrastive prompts or reward file"),
    ],
)
def test_a_run_is_not_continued_with_other_data_or_frozen_weights(
    stopped: tuple[Path, Config], field: str, words: str
) -> None:
    folder, config = stopped
    with pytest.raises(UserError, match=f"the run had another {words}"):
        check_continues(folder, config, replace(IDENTITY, **{field: "other"}))


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [("train", "train_iters", 8), ("train", "micro_batch_size", 2), ("parallel", "tensor_model_parallel_size", 2)],
)
def test_layout_and_length_of_a_run_may_change(stopped: tuple[Path, Config], group: str, name: str, value: Any) -> None:
    folder, config = stopped
    check_continues(folder, changed(config, group, name, value), IDENTITY)
