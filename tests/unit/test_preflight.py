"""What a program is given, checked before a model exists."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tgdpo_megatron import preflight
from tgdpo_megatron.checkpoint.manifest import read_manifest
from tgdpo_megatron.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    ParallelConfig,
    ReportConfig,
    ScoresConfig,
    TrainConfig,
    check_batch_layout,
    check_layout,
)
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.token_scores import ScoresManifest
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.run_folder import check_writable
from tgdpo_megatron.scores.contrastive import DEFAULT, read_prompts
from tgdpo_megatron.scores.store import Key, write_scores_manifest, write_shard


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
        preflight.check_models(Config())


def test_a_checkpoint_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint folder"):
        preflight.check_models(Config(model=ModelConfig(checkpoint=tmp_path / "no")))


def test_the_reference_is_the_policys_start_unless_given(checkpoint: Path) -> None:
    models = preflight.check_models(Config(model=ModelConfig(checkpoint=checkpoint)))
    assert models.reference == models.policy and models.guidance is None


@pytest.mark.parametrize("role", ["reference", "guidance"])
@pytest.mark.parametrize(("field", "words"), [("tokenizer", "tokenizer"), ("template", "chat template")])
def test_a_frozen_model_with_another_tokenizer_is_refused(
    role: str, field: str, words: str, checkpoint: Path, tmp_path: Path
) -> None:
    other = edited(checkpoint, tmp_path / "other", "manifest.json", **{field: "f" * 64})
    config = Config(model=ModelConfig(checkpoint=checkpoint, **{role: other}))
    with pytest.raises(UserError, match=f"the {role} has another {words} than the policy"):
        preflight.check_models(config)


@pytest.mark.parametrize("role", ["reference", "guidance"])
def test_a_frozen_model_whose_run_gave_its_template_something_else_is_refused(
    role: str, checkpoint: Path, tmp_path: Path
) -> None:
    """A checkpoint that was only converted goes with anything."""
    kwargs = {"enable_thinking": False}
    other = edited(checkpoint, tmp_path / "other", "manifest.json", chat_template_kwargs=kwargs)
    config = Config(model=ModelConfig(checkpoint=checkpoint, **{role: other}))
    with pytest.raises(
        UserError, match=rf"the {role} was trained with data.chat_template_kwargs=.*this run has {{}}; "
    ):
        preflight.check_models(config)
    config.data.chat_template_kwargs = kwargs
    assert preflight.check_models(config)
    plain = ModelConfig(checkpoint=checkpoint, **{role: edited(checkpoint, tmp_path / "plain", "manifest.json")})
    assert preflight.check_models(config.model_copy(update={"model": plain}))


def test_a_vocabulary_that_is_only_padded_differently_is_no_other_vocabulary(checkpoint: Path, tmp_path: Path) -> None:
    """The tokenizer is the same; such a model can be scored, but not ride in the policy's pipeline."""
    other = edited(checkpoint, tmp_path / "other", "hf/config.json", vocab_size=1000)
    config = Config(model=ModelConfig(checkpoint=checkpoint, guidance=other, require_certificate=False))
    assert preflight.check_models(config).guidance is not None
    with pytest.raises(UserError, match="in vocab_size and cannot run beside it"):
        preflight.carried_checkpoints(config)


def test_a_guidance_that_the_loss_does_not_read_may_have_any_shape(checkpoint: Path, tmp_path: Path) -> None:
    other = edited(checkpoint, tmp_path / "other", "hf/config.json", hidden_size=128)
    model = ModelConfig(checkpoint=checkpoint, guidance=other)
    assert preflight.carried_checkpoints(Config(model=model, loss=LossConfig(type="dpo"))) == [checkpoint]


@pytest.mark.parametrize("changes", [{"hidden_size": 128}, {"num_hidden_layers": 4}], ids=str)
def test_a_guidance_of_another_shape_cannot_ride_along_and_is_told_what_to_do(
    changes: dict[str, int], checkpoint: Path, tmp_path: Path
) -> None:
    other = edited(checkpoint, tmp_path / "other", "hf/config.json", **changes)
    config = Config(model=ModelConfig(checkpoint=checkpoint, guidance=other))
    with pytest.raises(UserError, match=r"cannot run beside it; .*scores.source=cached"):
        preflight.carried_checkpoints(config)


def test_live_guidance_that_is_not_given_is_asked_for(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="^model.guidance is not set; give .* or set scores.source=cached"):
        preflight.carried_checkpoints(Config(model=ModelConfig(checkpoint=checkpoint)))


def test_the_loss_decides_which_frozen_models_ride_along(checkpoint: Path) -> None:
    model = ModelConfig(checkpoint=checkpoint, guidance=checkpoint)
    riders = {
        name: len(preflight.carried_checkpoints(Config(model=model, loss=LossConfig(type=name))))
        for name in ("sft", "dpo", "tgdpo")
    }
    assert riders == {"sft": 0, "dpo": 1, "tgdpo": 2}
    assert preflight.carried_checkpoints(Config(model=model, scores=ScoresConfig(source="cached"))) == []


@pytest.mark.parametrize(
    ("loss", "scores", "words"),
    [
        (
            "tgdpo",
            {"path": "scores", "source": "live"},
            "scores.path=scores is not read with scores.source=live; set scores.source=cached",
        ),
        (
            "simpo",
            {"source": "cached"},
            "loss.type=simpo reads no cached scores; leave scores.source and scores.path out",
        ),
    ],
)
def test_scores_that_training_would_not_read_are_refused(loss: Any, scores: Any, words: str, checkpoint: Path) -> None:
    model = ModelConfig(checkpoint=checkpoint)
    config = Config(model=model, loss=LossConfig(type=loss), scores=ScoresConfig(**scores))
    with pytest.raises(UserError, match=words):
        preflight.carried_checkpoints(config)


def test_a_layout_is_checked_against_the_checkpoint(checkpoint: Path) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=4)
    with pytest.raises(UserError, match="does not divide the model's 2 key-value heads"):
        preflight.check_models(Config(model=ModelConfig(checkpoint=checkpoint), parallel=parallel))


# ---------------------------------------------------------------- scores from files


def write_store(folder: Path, data: PreparedPairs, names: Sequence[str], **made_with: str) -> None:
    """Scores of −1 nat for every token, which say what they were made with."""
    folder.mkdir(parents=True)
    scores = {
        Key(data.hashes[pair].tobytes(), side, name): np.full(data.response_length(pair, side), -1.0)
        for pair in range(len(data))
        for side in (0, 1)
        for name in names
    }
    write_shard(folder, scores)
    manifest = ScoresManifest(tokenizer="", template="", max_length=0, precision="bf16", **made_with)
    write_scores_manifest(folder, manifest)


@pytest.fixture
def pairs(prepared_by_hand: Callable[..., Any]) -> PreparedPairs:
    return prepared_by_hand([([1, 2], [4, 5], [6]), ([11], [13, 14, 15], [16, 17])])


def test_scores_of_another_guidance_model_are_refused(checkpoint: Path, pairs: PreparedPairs, tmp_path: Path) -> None:
    """The one they were made with is taken; so the weights alone decide."""
    write_store(
        tmp_path / "scores" / "train",
        pairs,
        ["reference", "guidance"],
        reference=read_manifest(checkpoint).weights,
        guidance="a" * 64,
    )

    def load_with(weights: str) -> Any:
        guidance = edited(checkpoint, tmp_path / weights[0], "manifest.json", weights=weights)
        config = Config(
            model=ModelConfig(checkpoint=checkpoint, guidance=guidance, require_certificate=False),
            loss=LossConfig(type="tgdpo"),
            scores=ScoresConfig(source="cached", path=tmp_path / "scores"),
            train=TrainConfig(precision="bf16"),
        )
        return preflight.load_scores_of(config, preflight.check_models(config), pairs, None)

    scores, _ = load_with("a" * 64)
    assert scores is not None and set(scores.values) == {"reference", "guidance"}
    with pytest.raises(UserError, match=r"made with other weights of the guidance \(aaaaaaaaaaaa, this run has bbbb"):
        load_with("b" * 64)


def test_scores_of_other_contrastive_prompts_are_refused(
    checkpoint: Path, pairs: PreparedPairs, tmp_path: Path
) -> None:
    write_store(
        tmp_path / "scores" / "train",
        pairs,
        ["reference", "better", "worse"],
        reference=read_manifest(checkpoint).weights,
        prompts=read_prompts(DEFAULT).hash,
    )

    def load_with(prompts: Path) -> Any:
        config = Config(
            model=ModelConfig(checkpoint=checkpoint),
            loss=LossConfig(type="dpo_reg"),
            scores=ScoresConfig(source="cached", path=tmp_path / "scores", contrastive_prompts=prompts),
            train=TrainConfig(precision="bf16"),
        )
        return preflight.load_scores_of(config, preflight.check_models(config), pairs, None)

    scores, _ = load_with(DEFAULT)
    assert scores is not None and set(scores.values) == {"reference", "better", "worse"}
    with pytest.raises(UserError, match="made with other contrastive prompts"):
        load_with(DEFAULT.with_name("direct.yaml"))


@pytest.fixture
def load_rewards(checkpoint: Path, pairs: PreparedPairs, tmp_path: Path) -> Callable[..., Any]:
    """A function that writes reward files, each of one number, and loads them for training and validation pairs.

    Both sets are the same pairs, so that either file could be read for either.
    """

    def run(validation_share: float | None = None, **files: float) -> Any:
        for name, number in files.items():
            lines = [
                {"row": row, "chosen": [number] * chosen, "rejected": [number] * rejected}
                for row, chosen, rejected in ((1, 2, 1), (2, 3, 2))
            ]
            (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = Config(
            model=ModelConfig(checkpoint=checkpoint),
            loss=LossConfig(type="tgdpo", token_rewards="file"),
            scores=ScoresConfig(**{name: tmp_path / name for name in files}),
            data=DataConfig(validation_share=validation_share),
        )
        return preflight.load_scores_of(config, preflight.check_models(config), pairs, pairs)

    return run


def test_validation_pairs_take_their_rewards_from_their_own_file(load_rewards: Callable[..., Any]) -> None:
    found = load_rewards(reward_file=0.25, validation_reward_file=-3.0)
    assert [set(scores.values["reward"].tolist()) for scores in found] == [{0.25}, {-3.0}]


def test_validation_pairs_without_a_file_of_rewards_are_refused(load_rewards: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="^scores.validation_reward_file is not set; give "):
        load_rewards(reward_file=0.25)


def test_a_share_that_is_held_out_takes_its_rewards_from_the_same_file(load_rewards: Callable[..., Any]) -> None:
    found = load_rewards(reward_file=0.25, validation_share=0.5)
    assert [set(scores.values["reward"].tolist()) for scores in found] == [{0.25}, {0.25}]


# ---------------------------------------------------------------- pairs


@pytest.fixture
def load(checkpoint: Path, tmp_path: Path) -> Callable[..., Any]:
    """A function that loads data as the only rank of a job."""
    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.platform.processes import Ranks

    def run(**data: Any) -> Any:
        config = Config(model=ModelConfig(checkpoint=checkpoint), data=DataConfig(max_length=256, **data))
        return preflight.load_data(config, describe(checkpoint), Ranks(0, 1, 0, "cpu"), tmp_path / "data")

    return run


def test_how_each_source_was_read_is_said_once(
    load: Callable[..., Any], pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A saved `datasets` folder is a source of rows, not a folder of prepared pairs."""
    from datasets import Dataset

    turns = [{"role": "user", "content": "Hi"}]
    answers = {name: [*turns, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    Dataset.from_list([{**answers, "score": 1.0}] * 2).save_to_disk(str(tmp_path / "saved"))
    train, validation = load(train=pairs_file, validation=tmp_path / "saved")
    assert (len(train), len(validation)) == (6, 2)
    said = [line for line in capsys.readouterr().out.splitlines() if "read as" in line]
    assert said == [
        "data.train: read as llama_factory (columns instruction, chosen, rejected)",
        "data.validation: read as trl_implicit_prompt_messages (columns chosen, rejected)",
    ]


def test_a_prepared_folder_says_how_it_was_read_once(
    load: Callable[..., Any], pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(train=pairs_file)
    (prepared,) = (tmp_path / "data").iterdir()
    first = capsys.readouterr().out
    load(train=prepared)
    assert capsys.readouterr().out == first and first.count("read as llama_factory") == 1
    assert list((tmp_path / "data").iterdir()) == [prepared], "nothing is prepared again"


def test_a_layout_that_is_given_makes_another_folder(
    load: Callable[..., Any], pairs_file: Path, tmp_path: Path
) -> None:
    recognised, _ = load(train=pairs_file)
    forced, _ = load(train=pairs_file, format="llama_factory")
    assert len(list((tmp_path / "data").iterdir())) == 2
    assert forced.summary.pairs_hash == recognised.summary.pairs_hash


def test_an_epoch_of_weighted_files_has_room_for_a_step(pairs_file: Path) -> None:
    """Six pairs in each file: with weights 1 and 0.5 an epoch has nine."""
    config = Config(data=DataConfig(train=[pairs_file, pairs_file], weights=[1, 0.5]))
    preflight.check_batch_fits(config, [6, 6], 9)
    with pytest.raises(UserError, match=f"=10 is more than the 9 pairs of {pairs_file} and {pairs_file}; lower it"):
        preflight.check_batch_fits(config, [6, 6], 10)


@pytest.mark.parametrize(("tensor", "loss"), [(1, "dpo"), (2, "dpo"), (8, "dpo"), (1, "sft")])
def test_a_token_budget_that_is_too_small_is_refused_with_one_that_will_do(
    tensor: int, loss: str, prepared_by_hand: Callable[..., Any]
) -> None:
    """The second pair has 12 + 31 tokens that the model reads, less the prompt of 2 that both responses share and that
    it reads once; SFT reads the 12 of its chosen response, and 14."""
    data = prepared_by_hand([([1, 2], [3] * 13, [4]), ([1, 2], [5] * 11, [6] * 30)])

    def budgeted(tokens: int) -> Config:
        return Config(
            loss=LossConfig(type=loss),
            parallel=ParallelConfig(tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1),
            train=TrainConfig(micro_batch_tokens=tokens),
        )

    source = Path("pairs.jsonl")
    if loss == "sft":
        preflight._check_budget(budgeted(16), data, source)
        return
    with pytest.raises(UserError, match=r"\(row 2 of by-hand.jsonl\) has 41 tokens and does not fit .*=16;") as refused:
        preflight._check_budget(budgeted(16), data, source)
    (needed,) = map(int, re.findall(r"raise it to (\d+) or more", str(refused.value)))
    assert 41 <= needed < 41 + tensor
    preflight._check_budget(budgeted(needed), data, source)
    assert check_layout(budgeted(needed), world_size=tensor) == 1


def test_a_token_budget_counts_a_prompt_that_is_not_shared_twice(prepared_by_hand: Callable[..., Any]) -> None:
    data = prepared_by_hand([([1, 2], [5] * 11, [6] * 30)])
    train = TrainConfig(micro_batch_tokens=42)
    preflight._check_budget(Config(train=train), data, Path("pairs.jsonl"))
    apart = Config(train=train.model_copy(update={"shared_prompts": False}))
    with pytest.raises(UserError, match=r"has 43 tokens and does not fit train.micro_batch_tokens=42;"):
        preflight._check_budget(apart, data, Path("pairs.jsonl"))


def test_a_weight_that_takes_no_pair_of_a_file_is_refused() -> None:
    config = Config(data=DataConfig(train=[Path("few.jsonl"), Path("many.jsonl")], weights=[0.004, 1]))
    with pytest.raises(UserError, match="0.004 of the 100 pairs of few.jsonl is less than one pair in an epoch"):
        preflight.check_batch_fits(config, [100, 900], 32)


def test_a_file_in_place_of_a_folder_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot be written \(it is a file, not a folder\)"):
        check_writable(tmp_path / "file")


def test_answers_need_micro_batches_of_changing_size() -> None:
    train = TrainConfig(micro_batch_tokens=64, fixed_micro_batches=True)
    config = Config(data=DataConfig(validation=Path("held-out.jsonl")), train=train, report=ReportConfig(samples=1))
    with pytest.raises(UserError, match="report.samples=1 needs micro-batches of changing size"):
        check_batch_layout(config, world_size=1)


def test_a_refusal_names_a_converted_model_as_the_user_did(checkpoint: Path, tmp_path: Path) -> None:
    from tgdpo_megatron.checkpoint.located import named_as_given
    from tgdpo_megatron.checkpoint.sources import Source

    other = edited(checkpoint, tmp_path / "cache", "manifest.json", tokenizer="0" * 64)
    config = Config(model=ModelConfig(checkpoint=checkpoint, guidance=other))
    found = {"guidance": Source(Path("acme/guide"), tmp_path / "snapshot", commit="abc")}
    with pytest.raises(UserError, match=r"^acme/guide \(commit abc\): the guidance has another tokenizer"):  # noqa: SIM117
        with named_as_given(config, found):
            preflight.check_models(config)
