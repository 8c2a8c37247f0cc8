"""What a training says on the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from tgdpo_megatron.config import Config, load, with_steps
from tgdpo_megatron.report.terminal import changed_settings, closing_lines, length_of_run, result_words


def test_only_settings_that_differ_from_the_defaults_are_shown() -> None:
    changes = {"loss": {"type": "dpo", "beta": 0.05}, "optimizer": {"lr": 1e-6}, "train": {"resume": True}}
    assert changed_settings(load(Config(), changes, where="test")) == [
        "loss: type=dpo, beta=0.05",
        "optimizer: lr=1e-06",
        "train: resume=true",
    ]
    assert changed_settings(Config()) == []


def test_lists_and_columns_are_shown_as_they_are_typed() -> None:
    data = {"train": ["a.jsonl", "b.csv"], "weights": [1, 0.5], "columns": {"prompt": "ask"}}
    assert changed_settings(load(Config(), {"data": data}, where="test")) == [
        "data: train=[a.jsonl, b.csv], weights=[1, 0.5], columns={prompt: ask}"
    ]


def test_before_the_first_step_every_pair_ties() -> None:
    step_0 = {"loss": 0.6931, "rewards/accuracies": 0.0, "rewards/margins": 0.0}
    assert result_words(step_0) == "loss 0.6931, chosen and rejected rewards equal"
    wrong = {"loss": 0.8, "rewards/accuracies": 0.0, "rewards/margins": -0.1}
    assert result_words(wrong) == "loss 0.8, accuracy 0.0%, margin -0.1"
    assert result_words({"eval/loss": 1.5}, "eval/") == "loss 1.5"


@pytest.mark.parametrize(
    ("steps", "pairs", "words", "unusual"),
    [
        (10, 320, "10 steps of 32 pairs: 1 epoch of 320 pairs", False),
        (1, 320, "1 step of 32 pairs: 0.1 epochs of 320 pairs", True),
        (100, 320, "100 steps of 32 pairs: 10 epochs of 320 pairs", True),
    ],
)
def test_steps_far_from_an_epoch_are_noticed(steps: int, pairs: int, words: str, unusual: bool) -> None:
    config = load(Config(), {"train": {"train_iters": steps, "global_batch_size": 32}}, where="test")
    assert length_of_run(config, pairs) == (words, unusual)


def test_epochs_that_were_asked_for_are_not_warned_of() -> None:
    config = load(Config(), {"train": {"num_epochs": 10, "global_batch_size": 32}}, where="test")
    assert length_of_run(with_steps(config, 320), 320)[1] is False


def test_a_run_ends_with_its_result_its_checkpoint_and_what_to_do_next() -> None:
    before = {"iteration": 0, "eval/loss": 0.69314, "eval/rewards/accuracies": 0.0, "eval/rewards/margins": 0.0}
    after = {"iteration": 40, "eval/loss": 0.6, "eval/rewards/accuracies": 0.745, "eval/rewards/margins": 0.12}
    checkpoint = Path("runs/tgdpo/checkpoints/iter-0000040")
    lines = closing_lines(
        steps=40,
        finished=True,
        went="100% the policy",
        seconds=75,
        held_out=[before, after],
        held_out_pairs=100,
        checkpoint=checkpoint,
        exported=None,
        report=None,
    )
    assert lines == [
        "done: 40 steps in 1.2 min",
        "time        100% the policy",
        "held out    loss 0.6931, chosen and rejected rewards equal (step 0)  →  "
        "loss 0.6, accuracy 74.5%, margin 0.12 (step 40), 100 pairs",
        "checkpoint  runs/tgdpo/checkpoints/iter-0000040",
        "export      python -m tools.convert_megatron_to_hf runs/tgdpo/checkpoints/iter-0000040 runs/tgdpo/hf",
    ]


def test_without_held_out_pairs_a_run_ends_without_such_a_line() -> None:
    lines = closing_lines(
        steps=1,
        finished=True,
        went="100% the policy",
        seconds=3,
        held_out=[],
        held_out_pairs=0,
        checkpoint=Path("a/checkpoints/b"),
        exported=Path("a/hf/b"),
        report=Path("a/report.html"),
    )
    assert lines[0] == "done: 1 step in 3 s"
    assert lines[2:] == ["checkpoint  a/checkpoints/b", "report      a/report.html", "exported    a/hf/b"]


def test_a_run_that_was_stopped_names_its_checkpoint_and_no_export() -> None:
    lines = closing_lines(
        steps=1,
        finished=False,
        went="100% the policy",
        seconds=3,
        held_out=[],
        held_out_pairs=0,
        checkpoint=Path("a/checkpoints/b"),
        exported=None,
        report=None,
    )
    assert lines == ["stopped: 1 step in 3 s", "time        100% the policy", "checkpoint  a/checkpoints/b"]
