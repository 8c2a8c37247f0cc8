"""Settings by the names that other programs give them: refused, with ours in the sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.settings import read_command_line
from tgdpo_megatron.config import Config
from tgdpo_megatron.config.foreign_names import FOREIGN, LLAMA_FACTORY, MEGATRON, NEMO, SWIFT, TRL, of_tool
from tgdpo_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as refused:
        read_command_line("recipes.train", "", list(arguments))
    return str(refused.value)


def test_the_setting_that_a_name_leads_to_exists() -> None:
    ours = {f"{group}.{name}" for group, settings in Config() for name in type(settings).model_fields}
    assert {foreign.ours for foreign in FOREIGN} - {None} <= ours


def test_a_name_has_one_meaning_and_one_without_a_setting_has_its_reason() -> None:
    names = [name for foreign in FOREIGN for name in foreign.names]
    assert len(names) == len(set(names))
    assert [foreign for foreign in FOREIGN if foreign.ours is None and not foreign.difference] == []


@pytest.mark.parametrize("tool", [TRL, LLAMA_FACTORY, SWIFT, NEMO, MEGATRON])
def test_every_program_has_its_common_names(tool: str) -> None:
    assert len([name for foreign in of_tool(tool) for name in foreign.names]) >= 25


def test_trl_itself_has_the_names_that_are_said_to_be_its() -> None:
    """Where transformers is installed, those of its trainer. The others are of TRL alone, or of earlier versions."""
    from transformers import TrainingArguments

    theirs = set(TrainingArguments.__dataclass_fields__)
    of_trl_alone = {
        *("model_name_or_path", "dtype", "torch_dtype", "trust_remote_code", "use_peft", "lora_r", "lora_alpha"),
        *("lora_dropout", "lora_target_modules", "load_in_4bit", "load_in_8bit", "attn_implementation", "config"),
        *("dataset_name", "datasets", "dataset_test_split", "dataset_num_proc", "max_length", "truncation_mode"),
        *("padding_free", "precompute_ref_log_probs", "disable_dropout", "sync_ref_model", "f_divergence_type"),
        *("loss_type", "loss_weights", "beta", "label_smoothing", "ld_alpha", "simpo_gamma", "cpo_alpha"),
        *("generate_during_eval", "max_completion_length", "ref_model"),
    }
    earlier = {
        "max_prompt_length",
        "rpo_alpha",
        "reference_free",
        "warmup_ratio",
        "overwrite_output_dir",
        "logging_dir",
    }
    named = {name for foreign in of_tool(TRL) for name in foreign.names}
    assert named - theirs == of_trl_alone | earlier


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["learning_rate=1e-6"],
            "'learning_rate' is TRL's, LLaMA-Factory's and ms-swift's name; here it is optimizer.lr: write "
            "optimizer.lr=1e-6.",
        ),
        (["pref_beta=0.1"], "'pref_beta' is LLaMA-Factory's name; here it is loss.beta: write loss.beta=0.1."),
        (["--clip-grad", "0.5"], "here it is optimizer.clip_grad: write optimizer.clip_grad=0.5."),
        (["--weight_decay=0.1", "loss.beta=1"], "'--weight_decay' is TRL's, "),
        (["--micro-batch-size", "4"], "write train.micro_batch_size=… (counts pairs, which are two sequences each)."),
        (["train.micro-batch-size=4"], "'train.micro-batch-size' is Megatron-LM's and ms-swift's name; "),
        (["optimizer.learning_rate=1"], "'optimizer.learning_rate' is TRL's, "),
        (
            ["per_device_train_batch_size=4"],
            "here it is train.global_batch_size: write train.global_batch_size=… (pairs of a step over all ranks, ",
        ),
        (["pref_loss=simpo"], "write loss.type=… (sigmoid is dpo here; "),
        (["max_length=512"], "here it is data.max_length: write data.max_length=… (a limit for prompt and answer "),
        (["lora_r=8"], "'lora_r' is TRL's name; nothing is set for it here: all weights are trained, "),
        (["policy.megatron_cfg.optimizer.lr=1e-6"], "'policy.megatron_cfg.optimizer.lr' is NeMo-RL's name; "),
        (["data.train.data_path=pairs.jsonl"], "here it is data.train: write data.train=pairs.jsonl."),
        (["model=some/model"], "'model' is ms-swift's name; here it is model.checkpoint: "),
        (
            ["metric_for_best_model=eval_loss"],
            "here it is train.keep_best: write train.keep_best=… (a metric of the ",
        ),
        (["--exit-duration-in-mins", "230"], "write train.exit_after_minutes=230."),
        (
            ["--save_only_model", "true"],
            "write train.save_optimizer=… (the other way round: true there is false here).",
        ),
        (["--exit-signal-handler"], "nothing is set for it here: SIGTERM and SIGUSR1 always let a training save "),
        (["--bf16"], "here it is train.precision: write train.precision=…"),
        (["--nproc_per_node", "2"], "is torchrun's name; nothing is set for it here: write --nproc-per-node N."),
        (["--loss.beta", "0.2"], "'--loss.beta': a setting is written without dashes: write loss.beta=0.2."),
        (["--alpha=0.2"], "'--alpha': a setting is written without dashes: write loss.alpha=0.2."),
    ],
    ids=str,
)
def test_another_programs_name_is_refused_with_ours(arguments: list[str], sentence: str) -> None:
    said = refusal(*arguments)
    assert said.startswith("command line: '") and sentence in said and said.endswith("."), said


def test_a_file_of_another_program_is_answered_as_yaml_is_written(tmp_path: Path) -> None:
    conf = tmp_path / "dpo.yaml"
    conf.write_text("recipe: dpo_tiny\nlearning_rate: 5.0e-6\nnum_train_epochs: 3\n")
    assert refusal("--conf", str(conf)) == (
        f"{conf}: 'learning_rate' is TRL's, LLaMA-Factory's and ms-swift's name; here it is optimizer.lr: write "
        "'optimizer: {lr: 5e-06}'; docs/coming-from.md has the others."
    )
    conf.write_text("recipe: dpo_tiny\npolicy: {train_micro_batch_size: 2}\n")
    assert "'policy.train_micro_batch_size' is NeMo-RL's name; " in refusal("--conf", str(conf))


def test_a_whole_name_in_a_yaml_file_is_told_its_group(tmp_path: Path) -> None:
    conf = tmp_path / "dpo.yaml"
    conf.write_text("recipe: dpo_tiny\noptimizer.lr: 1.0e-6\n")
    assert refusal("--conf", str(conf)) == f"{conf}: unknown key 'optimizer.lr'; write 'optimizer: {{lr: …}}'."


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda foreign: foreign.names[0])
def test_every_name_is_recognised_as_a_key_and_as_an_option(foreign: object) -> None:
    for name in foreign.names:  # type: ignore[attr-defined]
        if "." not in name and name != "nproc_per_node":  # with dashes it is an option here
            assert name in refusal(f"--{name.replace('_', '-')}=1").replace("-", "_")
        if name not in {field for _, settings in Config() for field in type(settings).model_fields}:
            assert f"'{name}' is " in refusal(f"{name}=1")


def test_names_are_known_without_torch() -> None:
    program = (
        "import sys; from tgdpo_megatron.config import foreign_names, load; import json; "
        "print(json.dumps([name for name in ('torch', 'transformers', 'megatron') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
