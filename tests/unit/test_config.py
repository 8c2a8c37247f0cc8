"""Settings: precedence, names, ranges, and the combinations that are refused with a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipes.settings import RECIPES, read_command_line
from tgdpo_megatron.config import Config, LossConfig, check_batch_layout, check_layout, complete, load
from tgdpo_megatron.config.constants import FP8_FORMATS
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.losses import LOSSES
from tgdpo_megatron.losses.rewards import REWARD_SOURCES


def settings(*changes: str) -> Config:
    return read_command_line("recipes.train", "", ["--recipe", "tgdpo_tiny", *changes]).config


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as refused:
        read_command_line("recipes.train", "", list(arguments))
    return str(refused.value)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("loss.bta=1", "loss.beta"),
        ("loss.alhpa=1", "loss.alpha"),
        ("train.globl_batch_size=8", "train.global_batch_size"),
        ("parallel.tensor_parallel_size=2", "parallel.tensor_model_parallel_size"),
        ("optimiser.lr=1", "optimizer"),
        ("lr=1e-4", "optimizer.lr"),
        ("beta=0.1", "loss.beta"),
        ("alpha=0.1", "loss.alpha"),
        ("eval_interval=2", "train.eval_interval"),
    ],
)
def test_an_unknown_key_names_the_nearest(written: str, meant: str) -> None:
    key = written.partition("=")[0]
    named = key.partition(".")[0] if meant.count(".") < key.count(".") else key
    assert refusal(written) == f"command line: unknown key '{named}'; did you mean '{meant}'."


def test_a_key_like_no_other_lists_what_is_known() -> None:
    assert "known here: loss.type, loss.sft_loss_weight, " in refusal("loss.zzzzzz=1")


def test_an_unknown_key_in_yaml_names_the_file(tmp_path: Path) -> None:
    conf = tmp_path / "experiment.yaml"
    conf.write_text("recipe: dpo_tiny\nloss: {betta: 0.2}\n")
    assert refusal("--conf", str(conf)) == f"{conf}: unknown key 'loss.betta'; did you mean 'loss.beta'."


def test_a_group_is_not_a_value() -> None:
    assert refusal("loss=dpo") == "command line: 'loss' is a group of settings, not 'dpo'; write loss.NAME=VALUE."


def test_a_change_without_a_value_is_refused() -> None:
    assert "'loss.beta' is not of the form key=value" in refusal("loss.beta")


def test_an_unknown_recipe_names_the_nearest() -> None:
    assert "did you mean 'tgdpo_tiny'?" in refusal("--recipe", "tgpdo_tiny")


def test_an_unknown_option_is_one_sentence() -> None:
    assert refusal("--reciep=x").startswith("command line: --reciep=x is not known here;")


def test_yaml_that_does_not_parse_names_the_line(tmp_path: Path) -> None:
    conf = tmp_path / "experiment.yaml"
    conf.write_text("loss:\n  beta: 0.1\n  alpha: [1\n  x: 2\n")
    assert refusal("--conf", str(conf)).startswith(f"{conf} line 4: not valid YAML")


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "just words\n"])
def test_yaml_that_is_no_group_is_refused(content: str, tmp_path: Path) -> None:
    conf = tmp_path / "experiment.yaml"
    conf.write_text(content)
    assert (
        refusal("--conf", str(conf))
        == f"{conf}: expected groups of settings, such as 'loss:' with 'beta: 0.05' below it."
    )


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    conf = tmp_path / "experiment.yaml"
    conf.write_text(f"train: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    assert "not valid YAML" in refusal("--conf", str(conf))
    assert not (tmp_path / "made").exists()


def test_a_missing_yaml_file_is_refused(tmp_path: Path) -> None:
    assert refusal("--conf", str(tmp_path / "no.yaml")).endswith("no such configuration file.")


# ---------------------------------------------------------------- ranges


@pytest.mark.parametrize(
    "change",
    [
        "loss.beta=0",
        "loss.beta=-0.1",
        "loss.beta=.nan",
        "loss.beta=.inf",
        "loss.beta=small",
        "loss.alpha=-1",
        "loss.beta_r=0",
        "loss.type=kto",
        "scores.source=hub",
        "data.max_length=0",
        "optimizer.lr=0",
        "optimizer.lr=.inf",
        "optimizer.adam_beta1=1",
        "optimizer.clip_grad=0",
        "train.global_batch_size=0",
        "train.micro_batch_size=1.5",
        "train.train_iters=-1",
        "train.train_iters=true",
        "train.precision=fp16",
        "train.resume=perhaps",
        "parallel.tensor_model_parallel_size=0",
        "parallel.virtual_pipeline_model_parallel_size=1",
    ],
)
def test_a_value_out_of_range_is_refused_with_key_and_value(change: str) -> None:
    key = change.partition("=")[0]
    sentence = refusal(change)
    assert sentence.startswith(f"command line: {key}=") and " is refused: " in sentence
    assert "\n" not in sentence


def test_less_than_one_process_is_refused() -> None:
    assert refusal("--nproc-per-node", "0") == "--nproc-per-node must be at least 1, not 0."


# ---------------------------------------------------------------- where settings come from


def test_the_command_line_wins_over_yaml_and_yaml_over_the_recipe(tmp_path: Path) -> None:
    conf = tmp_path / "experiment.yaml"
    conf.write_text("loss: {beta: 0.2, alpha: 2.0}\n")
    command = read_command_line(
        "recipes.train",
        "",
        ["--recipe", "tgdpo_tiny", "--conf", str(conf), "--nproc-per-node", "4", "loss.alpha=3", "loss.beta_r=1"],
    )
    config, processes = command.config, command.processes
    recipe = RECIPES["tgdpo_tiny"]()
    assert (config.loss.beta, config.loss.alpha, config.loss.beta_r) == (0.2, 3.0, 1.0)
    assert config.optimizer == recipe.optimizer and config.train == recipe.train
    assert processes == 4


def test_the_last_of_two_equal_keys_wins() -> None:
    assert settings("train.train_iters=3", "train.train_iters=5").train.train_iters == 5


def test_settings_may_stand_before_and_after_options() -> None:
    arguments = ["loss.beta=0.2", "--nproc-per-node", "2", "loss.alpha=3"]
    command = read_command_line("recipes.train", "", arguments)
    config, processes = command.config, command.processes
    assert (config.loss.beta, config.loss.alpha, processes) == (0.2, 3.0, 2)


def test_scientific_notation_is_a_number() -> None:
    assert settings("optimizer.lr=1e-6").optimizer.lr == 1e-6


def test_null_unsets_a_setting() -> None:
    assert settings("loss.reward_clip=0.7", "loss.reward_clip=null").loss.reward_clip is None


def test_loading_changes_leaves_the_base_alone() -> None:
    base = Config()
    load(base, {"loss": {"beta": 0.7}}, where="here")
    assert base == Config()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_fits_its_processes(name: str) -> None:
    config = RECIPES[name]()
    assert Config.model_validate(config.model_dump()) == config
    assert check_batch_layout(config, world_size=config.parallel.model_parallel_size) == 1


def test_a_recipe_gives_a_fresh_configuration_each_time() -> None:
    first = RECIPES["dpo_tiny"]()
    first.loss.beta = 0.9
    assert RECIPES["dpo_tiny"]().loss.beta is None


def test_beta_r_is_beta_unless_set() -> None:
    assert settings("loss.beta=0.3").loss.beta_r == 0.3
    assert settings("loss.beta=0.3", "loss.beta_r=1").loss.beta_r == 1.0


# ---------------------------------------------------------------- what a method reads


def test_the_methods_defaults_are_written_out() -> None:
    loss = settings("loss.type=dpo_reg").loss
    assert (loss.beta, loss.alpha, loss.sequence_weight, loss.token_rewards) == (0.1, 0.25, "detached", "contrastive")
    assert (loss.beta_r, loss.reward_squash, loss.gamma) == (1.0, True, None)


DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {"beta": 0.1, "label_smoothing": 0.0},
    "dpo_norm": {"beta": 2.0, "label_smoothing": 0.0},
    "robust": {"beta": 0.1, "label_smoothing": 0.1},
    "hinge": {"beta": 0.1},
    "ipo": {"beta": 0.1},
    "ipo_sum": {"beta": 0.1},
    "simpo": {"beta": 2.5, "gamma_beta_ratio": 0.55, "label_smoothing": 0.0},
    "tgdpo": {"beta": 0.1, "alpha": 0.5, "beta_r": 0.1, "token_rewards": "guidance", "reward_squash": False},
    "tdpo1": {"beta": 0.1},
    "tdpo2": {"beta": 0.1, "alpha": 0.5},
    "rpo": {"beta": 0.1, "beta_r": 1.0, "token_rewards": "file", "reward_squash": False},
    "sepo": {"gamma": 2.1, "selected_share": 0.3, "token_rewards": "guidance"},
    "dpo_reg": {"beta": 0.1, "alpha": 0.25, "beta_r": 1.0, "token_rewards": "contrastive", "reward_squash": True},
    "simpo_reg": {"beta": 2.5, "gamma_beta_ratio": 0.55, "alpha": 0.25, "beta_r": 1.0, "reward_squash": True},
}
"""What each method computes with where nothing is set, written by hand: changing one changes people's results."""


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_methods_defaults_are_the_published_ones(name: str) -> None:
    loss = settings(f"loss.type={name}").loss
    assert {option: getattr(loss, option) for option in DEFAULTS[name]} == DEFAULTS[name]


@pytest.mark.parametrize("name", LOSSES)
def test_completing_twice_changes_nothing(name: str) -> None:
    config = complete(Config(loss=LossConfig(type=name)), where="here")
    assert complete(config, where="here") == config
    assert Config.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name, method in LOSSES.items()
        for option in LossConfig.model_fields
        if option not in ("type", "sft_loss_weight", "token_rewards", *method.options)
        and not (method.rewards and option in REWARD_SOURCES[method.rewards].options and not method.order_alone)
    ],
)
def test_a_setting_that_a_method_does_not_read_is_refused(name: str, option: str) -> None:
    value = {"sequence_weight": "static", "reward_squash": "false", "reward_end_of_turn": "false"}.get(option, "0.3")
    sentence = refusal(f"loss.type={name}", f"loss.{option}={value}")
    assert f"loss.type={name}" in sentence and f"does not read loss.{option}=" in sentence


@pytest.mark.parametrize("name", [name for name, method in LOSSES.items() if not method.rewards])
def test_token_rewards_are_refused_for_a_method_without(name: str) -> None:
    assert f"loss.type={name} does not read loss.token_rewards=file" in refusal(
        f"loss.type={name}", "loss.token_rewards=file"
    )


@pytest.mark.parametrize(
    ("name", "role"),
    [("simpo", "reference"), ("simpo", "guidance"), ("dpo", "guidance"), ("dpo_reg", "guidance"), ("sft", "reference")],
)
def test_a_frozen_model_that_nothing_reads_is_refused(name: str, role: str) -> None:
    sentence = refusal(f"loss.type={name}", f"model.{role}=somewhere")
    assert f"model.{role} is not read by loss.type={name}" in sentence


def test_options_that_need_another_are_refused() -> None:
    assert "with loss.token_rewards=guidance; set loss.token_rewards=file, or leave scores.reward_file out" in refusal(
        "loss.type=tgdpo", "scores.reward_file=rewards.jsonl"
    )
    assert "loss.type=dpo; leave scores.contrastive_prompts out" in refusal(
        "loss.type=dpo", "scores.contrastive_prompts=prompts.yaml"
    )
    assert "needs loss.sequence_weight=static" in refusal("loss.type=dpo_reg", "loss.static_weight=0.5")
    assert "nothing to select" in refusal("loss.type=sepo", "loss.token_rewards=chosen")
    assert "does not read loss.sft_loss_weight" in refusal("loss.type=sft", "loss.sft_loss_weight=1")


# ---------------------------------------------------------------- what must fit


def test_the_data_parallel_size_is_what_the_layout_leaves() -> None:
    config = settings("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2")
    assert check_batch_layout(config, world_size=8) == 2
    with_context = settings("parallel.tensor_model_parallel_size=2", "parallel.context_parallel_size=2")
    assert check_batch_layout(with_context, world_size=8) == 2


def test_tokens_divide_by_every_size_that_splits_them() -> None:
    config = settings(
        "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true", "parallel.context_parallel_size=3"
    )
    assert config.token_multiple == 6


def test_a_plan_is_needed_where_prompts_or_ranks_share_sequences() -> None:
    assert settings().picks_keys, "prompts are shared by default"
    assert not settings("train.shared_prompts=false").picks_keys
    assert settings("train.shared_prompts=false", "parallel.context_parallel_size=2").picks_keys


@pytest.mark.parametrize(
    ("changes", "processes", "words"),
    [
        (
            ["parallel.context_parallel_size=2", "parallel.tensor_model_parallel_size=2"],
            6,
            ["6 processes are no multiple of the 4 ", "parallel.context_parallel_size=2", "--nproc-per-node"],
        ),
        (
            ["parallel.context_parallel_size=2", "train.micro_batch_tokens=65"],
            2,
            ["65 is not a multiple of 2", "context_parallel_size=2, whose ranks each hold a share", "up to 66"],
        ),
        (["parallel.sequence_parallel=true"], 1, ["sequence_parallel=true needs", "tensor_model_parallel_size > 1"]),
        (
            ["parallel.virtual_pipeline_model_parallel_size=2"],
            1,
            ["virtual_pipeline_model_parallel_size needs", "pipeline_model_parallel_size > 1"],
        ),
        (["parallel.tensor_model_parallel_size=2"], 3, ["3 processes are no multiple of the 2 ", "--nproc-per-node"]),
        (
            ["parallel.tensor_model_parallel_size=3", "cluster.nodes=2", "cluster.gpus_per_node=8"],
            16,
            [
                "16 processes are no multiple of the 3 ",
                "change cluster.nodes=2, cluster.gpus_per_node=8 or these sizes",
            ],
        ),
        (["train.global_batch_size=30"], 1, ["global_batch_size=30", "4 × 1 = 4"]),
        (["train.global_batch_size=4"], 2, ["global_batch_size=4", "4 × 2 = 8"]),
        (["train.train_iters=5", "optimizer.lr_warmup_iters=5"], 1, ["lr_warmup_iters=5", "the 5"]),
        (
            [
                "parallel.pipeline_model_parallel_size=2",
                "parallel.virtual_pipeline_model_parallel_size=2",
                "train.global_batch_size=12",
            ],
            2,
            ["3 micro-batches", "pipeline of 2 ranks", "multiple of 8"],
        ),
        (["optimizer.lr=1e-4", "optimizer.min_lr=1e-3"], 1, ["optimizer.min_lr", "optimizer.lr"]),
    ],
    ids=[
        "context",
        "context tokens",
        "sequence",
        "virtual",
        "world",
        "cluster",
        "batch",
        "ranks",
        "warm-up",
        "interleaved",
        "min_lr",
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(changes: list[str], processes: int, words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        check_batch_layout(settings(*changes), world_size=processes)
    assert all(word in str(refused.value) for word in words), str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        ["train.global_batch_size=30"],
        ["train.train_iters=5", "optimizer.lr_warmup_iters=5"],
        ["optimizer.lr=1e-4", "optimizer.min_lr=1e-3"],
        ["train.eval_interval=5"],
        ["train.fixed_micro_batches=true"],
    ],
    ids=str,
)
def test_scoring_is_not_refused_for_what_only_training_reads(changes: list[str]) -> None:
    with pytest.raises(UserError):
        check_batch_layout(settings(*changes), world_size=1)
    assert check_layout(settings(*changes), world_size=1) == 1


def test_a_token_budget_must_split_over_ranks_only_where_the_sequence_does() -> None:
    changes = ["parallel.tensor_model_parallel_size=2", "train.micro_batch_tokens=63"]
    assert check_layout(settings(*changes), world_size=2) == 1
    with pytest.raises(UserError, match="micro_batch_tokens=63 is not a multiple of 2 .*=2, over which .* up to 64"):
        check_layout(settings(*changes, "parallel.sequence_parallel=true"), world_size=2)


@pytest.mark.parametrize(("recipe", "of_a_rank"), [("tensorwise", 16), ("delayed", 16), ("blockwise", 128)])
def test_a_token_budget_must_be_one_that_fp8_can_divide_on_every_rank(recipe: str, of_a_rank: int) -> None:
    """Transformer Engine 2.11: 16 for every product; whole blocks of 128 where ranks gather blockwise tokens."""
    fp8 = ["train.precision=bf16", f"train.fp8={FP8_FORMATS[recipe]}", f"train.fp8_recipe={recipe}"]
    two_ranks = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    assert settings(*fp8).token_multiple == 16 and settings(*fp8, *two_ranks).token_multiple == 2 * of_a_rank
    assert check_layout(settings(*fp8, "train.micro_batch_tokens=80"), world_size=1) == 1
    with pytest.raises(UserError, match="=88 is not a multiple of 16 .FP8's 16.; round it up to 96"):
        check_layout(settings(*fp8, "train.micro_batch_tokens=88"), world_size=1)
    with pytest.raises(UserError, match=f"FP8's {of_a_rank} × .*; round it up to {4 * of_a_rank}"):
        check_layout(settings(*fp8, *two_ranks, f"train.micro_batch_tokens={3 * of_a_rank}"), world_size=2)


def test_fp8_takes_its_recipe_from_the_default_and_bf16_beneath_it() -> None:
    filled = settings("train.precision=bf16", "train.fp8=hybrid")
    assert filled.train.fp8_recipe == "tensorwise"
    assert settings().train.fp8 is settings().train.fp8_recipe is None
    for recipe, format in FP8_FORMATS.items():
        words = f"train.fp8_recipe={recipe} is not read without train.fp8; set train.fp8={format}"
        with pytest.raises(UserError, match=words):
            settings(f"train.fp8_recipe={recipe}")
    with pytest.raises(UserError, match="blockwise needs train.fp8=e4m3"):
        settings("train.precision=bf16", "train.fp8=hybrid", "train.fp8_recipe=blockwise")
    with pytest.raises(UserError, match="train.fp8=e4m3 needs train.precision=bf16"):
        settings("train.precision=fp32", "train.fp8=e4m3")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensor_model_parallel_size": 8}, "does not divide the model's 4 attention heads"),
        ({"tensor_model_parallel_size": 4}, "does not divide the model's 2 key-value heads"),
        ({"pipeline_model_parallel_size": 4}, "4 pipeline stages"),
        ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, "4 pipeline stages"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(changes: Any, words: str, hf_model: Path) -> None:
    from tgdpo_megatron.config import ParallelConfig
    from tgdpo_megatron.model.description import check_model_layout
    from tgdpo_megatron.model.families import read_description

    with pytest.raises(UserError, match=words):
        check_model_layout(read_description(hf_model), ParallelConfig(**changes))


def test_the_old_name_of_a_setting_is_taken_and_said_to_be_old(capsys: pytest.CaptureFixture[str]) -> None:
    assert load(Config(), {"data": {"layout": "trl"}}, where="old.yaml").data.format == "trl"
    assert "old.yaml: data.layout is now called data.format" in capsys.readouterr().err


# ---------------------------------------------------------------- recipes of experiment files


def test_an_experiment_without_a_recipe_is_refused(tmp_path: Path) -> None:
    conf = tmp_path / "experiment.yaml"
    conf.write_text("loss: {beta: 0.2}\n")
    assert refusal("--conf", str(conf)).startswith(f"{conf}: names no recipe; add 'recipe: NAME' as its first key")
    assert read_command_line("recipes.train", "", ["--conf", str(conf), "--recipe", "dpo_tiny"]).config.loss.beta == 0.2


def test_an_experiment_with_an_unknown_recipe_is_refused_and_the_nearest_named(tmp_path: Path) -> None:
    conf = tmp_path / "experiment.yaml"
    conf.write_text("recipe: tgpdo_tiny\n")
    assert refusal("--conf", str(conf)) == f"{conf}: recipe: tgpdo_tiny: no such recipe; did you mean 'tgdpo_tiny'?"


def test_a_recipe_that_contradicts_the_experiment_is_refused_and_the_same_one_taken(tmp_path: Path) -> None:
    conf = tmp_path / "experiment.yaml"
    conf.write_text("recipe: dpo_tiny\n")
    assert refusal("--conf", str(conf), "--recipe", "tgdpo_tiny") == (
        f"{conf}: its recipe is dpo_tiny, but --recipe tgdpo_tiny was given; leave --recipe out."
    )
    assert (
        read_command_line("recipes.train", "", ["--conf", str(conf), "--recipe", "dpo_tiny"]).config.loss.type == "dpo"
    )


def test_a_recipe_that_is_the_beginning_of_a_name_is_taken_for_that_one() -> None:
    assert "did you mean 'tgdpo_llama3_8b_pairrm'?" in refusal("--recipe", "tgdpo_llama3_8b")


# ---------------------------------------------------------------- files of pairs


def test_one_file_or_several_are_given_in_one_setting() -> None:
    assert settings("data.train=a.jsonl").data.sources == [Path("a.jsonl")]
    config = settings("data.train=[a.jsonl,b.parquet]", "data.weights=[2,0.5]")
    assert config.data.sources == [Path("a.jsonl"), Path("b.parquet")] and config.data.weights == [2, 0.5]


def test_columns_are_a_setting_and_not_a_group() -> None:
    columns = {"prompt": "ask", "chosen": "good"}
    assert settings("data.columns={prompt: ask, chosen: good}").data.columns == columns
    assert settings("data.columns={}").data.columns == {}
    kept = settings("data.columns={prompt: ask, chosen: good}", "data.train=[a.jsonl,b.jsonl]")
    assert load(Config(), kept.model_dump(mode="json"), where="config.yaml") == kept


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("loss.beta=abc", "loss.beta='abc' is refused: it should be a number."),
        ("loss.beta=.nan", "loss.beta=nan is refused: it should be a finite number."),
        ("loss.beta=0", "loss.beta=0 is refused: it should be more than 0."),
        ("train.global_batch_size=null", "train.global_batch_size=null is refused: it should be a whole number."),
        ("train.global_batch_size=2.5", "train.global_batch_size=2.5 is refused: it should be a whole number."),
        (
            "train.rank_timeout_minutes=99999",
            "train.rank_timeout_minutes=99999 is refused: it should be at most 10080.",
        ),
        ("data.max_length=7", "data.max_length=7 is refused: it should be at least 8."),
        ("data.validation_share=1", "data.validation_share=1 is refused: it should be less than 1."),
        ("train.resume=perhaps", "train.resume='perhaps' is refused: it should be true or false."),
        ("train.precision=fp16", "train.precision='fp16' is refused: it should be 'auto', 'bf16' or 'fp32'."),
        ("data.weights=2", "data.weights=2 is refused: it should be a list, such as [1, 2]."),
        (
            "data.columns=prompt",
            "data.columns='prompt' is refused: it should be a mapping, such as {prompt: question}.",
        ),
        ("data.train=3", "data.train=3 is refused: it should be a path; one that looks like a number or a list is "),
        ("data.train=[a,3]", "data.train.1=3 is refused: it should be a path; "),
        ("data.template=3", "data.template=3 is refused: it should be a text; one that looks like a number, "),
        ("report.wandb_project=''", "report.wandb_project='' is refused: it should not be empty."),
    ],
)
def test_a_refused_value_is_told_in_plain_words_what_it_should_be(change: str, sentence: str) -> None:
    assert refusal(change).startswith(f"command line: {sentence}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            ["data.train=[a,b]", "data.weights=[1]"],
            "data.weights has 1 numbers and data.train 2 files; give one number",
        ),
        (["data.train=a", "data.weights=[1,2]"], "data.weights has 2 numbers and data.train 1 files"),
        (["data.train=a", "data.weights=[0]"], "data.weights.0=0 is refused: it should be more than 0"),
        (["data.validation=a", "data.validation_share=0.1"], "so data.validation_share=0.1 is not read; leave one"),
        (["data.validation_share=1"], "data.validation_share=1 is refused: it should be less than 1"),
        (
            ["data.train=[a,b]", "loss.token_rewards=file", "scores.reward_file=r.jsonl"],
            "scores.reward_file numbers the rows of one file, and data.train names 2",
        ),
        (["data.columns=prompt"], "data.columns='prompt' is refused"),
        (["data.columns={rejected: no}"], "data.columns.rejected=false is refused"),
    ],
)
def test_files_of_pairs_that_do_not_fit_their_settings_are_refused(changes: list[str], words: str) -> None:
    assert words in refusal("--recipe", "tgdpo_tiny", *changes)


def test_a_held_out_share_is_enough_to_evaluate() -> None:
    config = settings("data.validation_share=0.1", "train.eval_interval=2", "report.samples=1", "train.train_iters=4")
    assert config.data.holds_out and check_batch_layout(config, world_size=1) == 1


def test_contrastive_prompts_need_turns_to_rewrite() -> None:
    with pytest.raises(UserError, match="contrastive rewrites the user's turn, and data.template=none does not tell"):
        settings("loss.type=dpo_reg", "data.template=none")
