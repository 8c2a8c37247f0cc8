"""Which programs recipes.align runs, in which order, with which arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.align import Stage, align, stages_of
from recipes.settings import read_command_line
from tgdpo_megatron.errors import UserError


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[str, str]:
    """A HuggingFace folder without a weight or a token in it, which shows only late, and a file of pairs."""
    (tmp_path / "hf").mkdir()
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": 330, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_act": "silu", **shape}))
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / "hf" / name).touch()
    (tmp_path / "pairs.jsonl").write_text(40 * '{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return f"model.checkpoint={tmp_path / 'hf'}", f"data.train={tmp_path / 'pairs.jsonl'}"


def planned(*arguments: str, guidance: tuple[str, ...] = ()) -> dict[str, Stage]:
    command = read_command_line("recipes.align", "", arguments)
    return {stage.name: stage for stage in stages_of(command, guidance, Path("out"))}


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ([], ["guidance", "scores", "policy", "hf"]),
        (["loss.type=dpo"], ["policy", "hf"]),
        (["loss.type=simpo"], ["policy", "hf"]),
        (["loss.type=tdpo2"], ["policy", "hf"]),
        (["loss.type=dpo_reg"], ["scores", "policy", "hf"]),
        (["loss.type=dpo", "scores.path=kept"], ["scores", "policy", "hf"]),
        (["model.guidance=somewhere"], ["scores", "policy", "hf"]),
    ],
    ids=str,
)
def test_only_the_stages_that_the_loss_needs_are_run(
    settings: list[str], stages: list[str], inputs: tuple[str, str]
) -> None:
    assert list(planned(*inputs, *settings)) == stages


def test_each_stage_reads_what_the_one_before_it_wrote(inputs: tuple[str, str]) -> None:
    stages = planned(*inputs)
    assert inputs[0] in stages["guidance"].arguments and inputs[0] in stages["policy"].arguments
    assert "model.guidance=out/guidance" in stages["scores"].arguments
    assert "scores.path=out/scores" in stages["scores"].arguments
    assert {"scores.path=out/scores", "train.output=out/policy"} <= set(stages["policy"].arguments)
    assert stages["hf"].arguments == ("out/policy", "out/hf")


def test_settings_go_to_the_stages_that_they_are_meant_for(inputs: tuple[str, str]) -> None:
    stages = planned(*inputs, "train.seed=3", "loss.beta=0.2", "optimizer.lr=1e-5", guidance=("optimizer.lr=1e-6",))
    guidance, policy = stages["guidance"].arguments, stages["policy"].arguments
    assert {"train.seed=3", "optimizer.lr=1e-6"} <= set(guidance)
    assert not {"loss.beta=0.2", "optimizer.lr=1e-5"} & set(guidance)
    assert {"train.seed=3", "loss.beta=0.2", "optimizer.lr=1e-5"} <= set(policy)


def test_an_experiment_file_goes_to_the_training_and_its_data_to_the_guidance(
    tmp_path: Path, inputs: tuple[str, str]
) -> None:
    conf = tmp_path / "mine.yaml"
    pairs = inputs[1].partition("=")[2]
    conf.write_text(f"recipe: tgdpo_tiny\ndata: {{train: {pairs}, max_length: 100}}\nloss: {{beta: 0.2}}\n")
    stages = planned("--conf", str(conf), inputs[0])
    assert {"--recipe=dpo_tiny", f"data.train={pairs}", "data.max_length=100"} <= set(stages["guidance"].arguments)
    assert "loss.beta=0.2" not in stages["guidance"].arguments
    assert stages["policy"].arguments[0] == f"--conf={conf}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "model.checkpoint is not set"),
        (["model.checkpoint=nowhere", "data.train=x"], "nowhere: no such folder; a model on a hub is named"),
        (["guidance.optimizer.lr=1", "loss.type=dpo"], "guidance.optimizer.lr=1: no guidance is trained"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(
    arguments: list[str], words: str, inputs: tuple[str, str], tmp_path: Path
) -> None:
    given = [*inputs, *arguments] if len(arguments) != 0 and "guidance" in arguments[0] else arguments
    with pytest.raises(UserError, match=words):
        align([*given, f"train.output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_stages_of_other_settings_in_the_folder_are_refused(tmp_path: Path, inputs: tuple[str, str]) -> None:
    output = tmp_path / "out"
    output.mkdir()
    stages = planned(*inputs, "loss.type=dpo", f"train.output={output}")
    kept = {
        name: {"command": ["python", "-m", stage.module, *stage.arguments], "finished": True}
        for name, stage in stages.items()
    }
    kept["hf"]["command"] = ["python", "-m", "tools.convert_megatron_to_hf", "other", "x"]
    kept["policy"]["command"] = [word.replace("out/", f"{output}/") for word in kept["policy"]["command"]]
    (output / "align.json").write_text(json.dumps(kept))
    (output / "hf").mkdir()
    with pytest.raises(UserError, match="its hf was made from something else"):
        align([*inputs, "loss.type=dpo", f"train.output={output}"])


def test_a_stage_that_fails_ends_the_chain_with_its_exit_code(tmp_path: Path, inputs: tuple[str, str]) -> None:
    """The files of the model are empty, which the first stage says."""
    output = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "recipes.align", *inputs, f"train.output={output}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and not (output / "guidance").exists()
    assert "stage guidance refused its input; give the command again with what was wrong mended." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("where", ["command line", "file"])
def test_live_scores_are_not_scored_first(where: str, tmp_path: Path, inputs: tuple[str, str]) -> None:
    conf = tmp_path / "mine.yaml"
    conf.write_text("recipe: tgdpo_tiny\nscores: {source: live}\n")
    given = ["scores.source=live"] if where == "command line" else ["--conf", str(conf)]
    stages = planned(*inputs, *given)
    assert "scores" not in stages and "model.guidance=out/guidance" in stages["policy"].arguments


def test_only_tgdpos_recipes_have_a_recipe_for_their_guidance(inputs: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="no recipe trains a guidance for dpo_reg_llama3_8b; give model.guidance"):
        planned(*inputs, "--recipe=dpo_reg_llama3_8b", "loss.token_rewards=guidance")


def test_the_order_of_settings_and_the_loudness_are_no_other_settings(
    tmp_path: Path, inputs: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    stages = planned(*inputs, "loss.beta=0.2", "train.seed=3", f"train.output={output}")
    commands = {name: ["python", "-m", stage.module, *reversed(stage.arguments)] for name, stage in stages.items()}
    commands = {name: [word.replace("out/", f"{output}/") for word in words] for name, words in commands.items()}
    (output / "align.json").write_text(
        json.dumps({name: {"command": words, "finished": True} for name, words in commands.items()})
    )
    align([*inputs, "train.seed=3", "loss.beta=0.2", "--quiet", f"train.output={output}"])
    assert capfd.readouterr().out.count("finished before") == len(stages)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report.samples=4"], "report.samples=4 answers held-out prompts; set data.validation"),
        (["optimizer.lr_warmup_iters=50", "train.train_iters=2"], "lr_warmup_iters=50 leaves no step of the 2"),
        (["guidance.optimizer.learning_rate=3"], "optimizer.learning_rate"),
        (["train.global_batch_size=64"], "train.global_batch_size=64 is more than the 40 pairs"),
        (["data.validation=nowhere.jsonl"], "nowhere.jsonl: no such data file"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(
    arguments: list[str], words: str, inputs: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        align([*inputs, *arguments, f"train.output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_a_stage_that_had_made_nothing_is_run_with_other_settings(
    tmp_path: Path, inputs: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Its folder holds nothing that belongs to the settings before."""
    output = tmp_path / "out"
    output.mkdir()
    before = {"guidance": {"command": ["python", "-m", "recipes.train", "other", "x"], "finished": False}}
    (output / "align.json").write_text(json.dumps(before))
    with pytest.raises(SystemExit) as ended:  # the folder is no model, which the program says
        align([*inputs, f"train.output={output}"])
    assert ended.value.code == 2 and "$ python -m recipes.train" in capfd.readouterr().out


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"policy": 1}', '{"policy": {"command": "x", "finished": true}}', "[" * 9999]
)
def test_a_damaged_list_of_stages_is_refused_in_a_sentence(
    content: str, tmp_path: Path, inputs: tuple[str, str]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "align.json").write_text(content)
    with pytest.raises(UserError, match=f"^{output / 'align.json'}( line 1)?: "):
        align([*inputs, f"train.output={output}"])


def test_a_folder_that_was_not_made_here_is_never_deleted(tmp_path: Path, inputs: tuple[str, str]) -> None:
    """Not even where everything before it was run anew: the program refuses the folder instead."""
    output = tmp_path / "out"
    (output / "guidance").mkdir(parents=True)
    (output / "guidance" / "mine.txt").write_text("precious")
    with pytest.raises(SystemExit):
        align([*inputs, f"train.output={output}"])
    assert (output / "guidance" / "mine.txt").read_text() == "precious"


def test_ranks_that_torchrun_started_are_refused(inputs: tuple[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recipes.align", *inputs],
        env={**os.environ, "RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "start it without torchrun" in done.stderr
