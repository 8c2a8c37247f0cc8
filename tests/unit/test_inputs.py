"""What a program is given, checked before a model exists."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tgdpo_megatron import inputs
from tgdpo_megatron.config import Config, LossConfig, ModelConfig, ParallelConfig, ScoresConfig
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.run_folder import check_writable


def edited(checkpoint: Path, target: Path, file: str, **changes: object) -> Path:
    """A copy of a checkpoint with some fields of one of its JSON files changed."""
    shutil.copytree(checkpoint, target)
    (target / file).write_text(json.dumps(json.loads((target / file).read_text()) | changes))
    return target


@pytest.mark.parametrize("below", [[], ["run"], ["run", "deeper"]])
def test_a_folder_that_cannot_be_made_is_refused(below: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    folder = tmp_path.joinpath("file", *below)
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_missing_checkpoint_setting_is_named() -> None:
    with pytest.raises(UserError, match="^model.checkpoint is not set; give "):
        inputs.check_models(Config())


def test_a_checkpoint_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint folder"):
        inputs.check_models(Config(model=ModelConfig(checkpoint=tmp_path / "no")))


def test_the_reference_is_the_policys_start_unless_given(checkpoint: Path) -> None:
    models = inputs.check_models(Config(model=ModelConfig(checkpoint=checkpoint)))
    assert models.reference == models.policy and models.guidance is None


@pytest.mark.parametrize("role", ["reference", "guidance"])
@pytest.mark.parametrize(("field", "words"), [("tokenizer", "tokenizer"), ("template", "chat template")])
def test_a_frozen_model_with_another_tokenizer_is_refused(
    role: str, field: str, words: str, checkpoint: Path, tmp_path: Path
) -> None:
    other = edited(checkpoint, tmp_path / "other", "manifest.json", **{field: "f" * 64})
    config = Config(model=ModelConfig(checkpoint=checkpoint, **{role: other}))
    with pytest.raises(UserError, match=f"the {role} has another {words} than the policy"):
        inputs.check_models(config)


def test_a_frozen_model_with_another_vocabulary_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = edited(checkpoint, tmp_path / "other", "hf/config.json", vocab_size=1000)
    with pytest.raises(UserError, match="another vocabulary size"):
        inputs.check_models(Config(model=ModelConfig(checkpoint=checkpoint, guidance=other)))


@pytest.mark.parametrize("changes", [{"hidden_size": 128}, {"num_hidden_layers": 4}], ids=str)
def test_a_guidance_of_another_shape_cannot_ride_along_and_is_told_what_to_do(
    changes: dict[str, int], checkpoint: Path, tmp_path: Path
) -> None:
    other = edited(checkpoint, tmp_path / "other", "hf/config.json", **changes)
    config = Config(model=ModelConfig(checkpoint=checkpoint, guidance=other))
    with pytest.raises(UserError, match=r"cannot run beside it; .*scores.source=cached"):
        inputs.carried_checkpoints(config)


def test_live_guidance_that_is_not_given_is_asked_for(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="^model.guidance is not set; give .* or set scores.source=cached"):
        inputs.carried_checkpoints(Config(model=ModelConfig(checkpoint=checkpoint)))


def test_the_loss_decides_which_frozen_models_ride_along(checkpoint: Path) -> None:
    model = ModelConfig(checkpoint=checkpoint, guidance=checkpoint)
    riders = {
        name: len(inputs.carried_checkpoints(Config(model=model, loss=LossConfig(type=name))))
        for name in ("sft", "dpo", "tgdpo")
    }
    assert riders == {"sft": 0, "dpo": 1, "tgdpo": 2}
    assert inputs.carried_checkpoints(Config(model=model, scores=ScoresConfig(source="cached"))) == []


def test_a_layout_is_checked_against_the_checkpoint(checkpoint: Path) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=4)
    with pytest.raises(UserError, match="does not divide the model's 2 key-value heads"):
        inputs.check_models(Config(model=ModelConfig(checkpoint=checkpoint), parallel=parallel))
