"""What a run may be continued with."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import Metadata

from tgdpo_megatron.checkpoint.manifest import WEIGHTS, CheckpointManifest, read_manifest, write_manifest
from tgdpo_megatron.config import Config, OptimizerConfig, load
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.resuming import check_continues, is_finished
from tgdpo_megatron.run_folder import check_output, keep_settings, newest_checkpoint

IDENTITY = CheckpointManifest(
    weights="w",
    dtype="float32",
    tokenizer="t",
    template="c",
    reference="r",
    guidance="g",
    pairs_hash="p",
    iteration=2,
    chat_template_kwargs={},
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
    keep_settings(tmp_path / "run", config, {})
    return folder, config


def changed(config: Config, group: str, name: str, value: Any) -> Config:
    return load(config, {group: {name: value}}, where="test")


def test_a_run_continues_with_its_own_settings(stopped: tuple[Path, Config]) -> None:
    folder, config = stopped
    check_continues(folder, config, IDENTITY)
    check_output(folder.parent.parent, changed(config, "train", "resume", True))


FIXED = [
    ("loss", "type", "dpo"),
    ("loss", "alpha", 1.0),
    ("loss", "beta", 0.2),
    ("loss", "beta_r", 0.2),
    ("loss", "reward_clip", 0.2),
    ("loss", "sft_loss_weight", 0.2),
    ("loss", "token_rewards", "file"),
    ("train", "seed", 1),
    ("train", "global_batch_size", 64),
    ("train", "precision", "fp32"),
    ("train", "fp8", "hybrid"),
    ("train", "fp8_recipe", "delayed"),
    ("data", "shuffle", False),
    ("data", "max_length", 512),
    ("optimizer", "lr", 1e-5),
    ("optimizer", "min_lr", 1e-8),
    ("optimizer", "lr_warmup_iters", 1),
    ("optimizer", "lr_decay_style", "linear"),
    ("optimizer", "clip_grad", 0.5),
    ("optimizer", "weight_decay", 0.1),
    ("optimizer", "adam_beta1", 0.8),
    ("optimizer", "adam_beta2", 0.95),
    ("optimizer", "adam_eps", 1e-6),
]


def test_every_setting_of_the_optimizer_but_those_of_its_layout_is_among_the_fixed_ones() -> None:
    layout = {"use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"}
    layout.add("lr_warmup_fraction")  # it has become lr_warmup_iters by then
    assert {name for group, name, _ in FIXED if group == "optimizer"} == set(OptimizerConfig.model_fields) - layout


@pytest.mark.parametrize(("group", "name", "value"), FIXED)
def test_a_run_is_not_continued_with_another_setting(
    stopped: tuple[Path, Config], group: str, name: str, value: Any
) -> None:
    folder, config = stopped
    with pytest.raises(UserError, match=f"the run has {group}.{name}="):
        check_continues(folder, changed(config, group, name, value), IDENTITY)


@pytest.mark.parametrize(
    "content",
    [
        "a: [",
        "loss: 3",
        "- a",
        "",
        "\udcff",
        "[" * 5000,
        f"a: &a [1]\nb: [{'*a, ' * 60_000}]\n",
        "a: {b: " + "9" * 5000 + "}",
    ],
    ids=["torn", "no group", "list", "empty", "bytes", "deep", "aliases", "digits"],
)
def test_a_run_whose_settings_were_damaged_is_not_continued(stopped: tuple[Path, Config], content: str) -> None:
    folder, config = stopped
    kept = folder.parent.parent / "config.yaml"
    kept.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=f"^{kept}(: | line )"):
        check_continues(folder, config, IDENTITY)


def test_a_run_whose_settings_are_gone_is_not_continued(stopped: tuple[Path, Config]) -> None:
    folder, config = stopped
    kept = folder.parent.parent / "config.yaml"
    kept.unlink()
    with pytest.raises(UserError, match=f"^{kept}: no such settings file of a run."):
        check_continues(folder, config, IDENTITY)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("pairs_hash", "other pairs"),
        ("reference", "another reference"),
        ("guidance", "another guid"),
        ("rewards", "other contrastive prompts or another reward file"),
        ("chat_template_kwargs", "other data.chat_template_kwargs"),
        ("template", "another chat template"),
    ],
)
def test_a_run_is_not_continued_with_other_data_or_frozen_weights(
    stopped: tuple[Path, Config], field: str, words: str
) -> None:
    folder, config = stopped
    with pytest.raises(UserError, match=f"the run had {words}.*train.resume_with_changes=true"):
        check_continues(folder, config, replace(IDENTITY, **{field: "other"}))


def test_other_pairs_are_named_by_their_files_before_and_now(stopped: tuple[Path, Config]) -> None:
    folder, config = stopped
    moved = changed(config, "data", "train", "new.jsonl")
    with pytest.raises(UserError, match=r"other pairs than now \(data.train was None, and is new.jsonl\)"):
        check_continues(folder, moved, replace(IDENTITY, pairs_hash="other"))


def test_a_run_is_continued_with_changes_where_the_user_says_so_and_they_are_told(
    stopped: tuple[Path, Config],
) -> None:
    folder, config = stopped
    accepting = changed(changed(config, "train", "resume_with_changes", True), "train", "seed", 1)
    told = check_continues(folder, accepting, replace(IDENTITY, pairs_hash="other"))
    assert told == ["the run had other pairs than now", "the run has train.seed=42, not 1"]


@pytest.mark.parametrize("what", ["tokenizer", "train.precision"])
def test_what_the_weights_depend_on_cannot_change_whatever_the_user_says(
    stopped: tuple[Path, Config], what: str
) -> None:
    folder, config = stopped
    config = changed(config, "train", "resume_with_changes", True)
    identity = IDENTITY
    if what == "tokenizer":
        identity = replace(IDENTITY, tokenizer="other")
    else:
        config = changed(config, "train", "precision", "fp32")
    with pytest.raises(UserError, match="continue it as it was, start a new run.$"):
        check_continues(folder, config, identity)


def test_weights_alone_are_no_start_of_a_continued_run(stopped: tuple[Path, Config]) -> None:
    folder, config = stopped
    write_manifest(folder, replace(IDENTITY, weights_only=True))
    with pytest.raises(UserError, match=f"start a new run with model.checkpoint={folder}"):
        check_continues(folder, config, IDENTITY)


def test_the_settings_in_the_checkpoint_stand_in_for_those_of_the_run(stopped: tuple[Path, Config]) -> None:
    """So a config.yaml that was deleted, or altered, stops nothing."""
    folder, config = stopped
    kept = folder.parent.parent / "config.yaml"
    kept.rename(folder / "config.yaml")
    check_continues(folder, config, IDENTITY)
    with pytest.raises(UserError, match="the run has train.seed=42, not 1"):
        check_continues(folder, changed(config, "train", "seed", 1), IDENTITY)


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [("train", "train_iters", 8), ("train", "micro_batch_size", 2), ("parallel", "tensor_model_parallel_size", 2)],
)
def test_layout_and_length_of_a_run_may_change(stopped: tuple[Path, Config], group: str, name: str, value: Any) -> None:
    folder, config = stopped
    check_continues(folder, changed(config, group, name, value), IDENTITY)


def test_a_checkpoint_that_was_not_finished_is_not_the_newest(stopped: tuple[Path, Config]) -> None:
    """Killed after its last file was written and before it got its name."""
    folder, _ = stopped
    shutil.copytree(folder, folder.with_name("iter-0000003.tmp"))
    assert newest_checkpoint(folder.parent.parent) == folder


@pytest.mark.parametrize(("train_iters", "finished"), [(1, True), (2, True), (3, False)])
def test_a_run_that_has_all_its_steps_is_finished(
    stopped: tuple[Path, Config], train_iters: int, finished: bool
) -> None:
    folder, config = stopped
    config.train.resume, config.train.train_iters = True, train_iters
    assert is_finished(folder, config) == finished


def test_a_finished_run_may_have_kept_weights_alone(stopped: tuple[Path, Config]) -> None:
    folder, config = stopped
    write_manifest(folder, replace(read_manifest(folder), weights_only=True))
    config.train.resume, config.train.train_iters = True, 2
    check_continues(folder, config, IDENTITY)
    config.train.train_iters = 3
    with pytest.raises(UserError, match="holds weights alone"):
        check_continues(folder, config, IDENTITY)


def test_a_folder_that_holds_something_else_is_not_continued_as_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("scores: {}\n")
    with pytest.raises(UserError, match="holds no run that could be continued; choose another train.output"):
        check_output(tmp_path, load(Config(), {"train": {"resume": True}}, where="test"))
