"""tools.tokens prints the tokens that a reward file numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import PAIRS
from tgdpo_megatron.checkpoint.manifest import HF
from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.errors import UserError
from tools.tokens import as_json, as_lines, prepared, response_tokens, tokenizer_folder

ROOT = Path(__file__).resolve().parents[2]
DATA = DataConfig()


def test_the_tokens_spell_the_responses_and_close_the_turn(pairs_file: Path, hf_model: Path) -> None:
    data, tokenizer = prepared(pairs_file, hf_model, DATA)
    found = list(response_tokens(data, tokenizer))
    assert [row for row, _ in found] == [1, 2, 3, 4, 5, 6]
    for pair, (_, texts) in zip(PAIRS, found, strict=True):
        assert ["".join(side) for side in texts] == [f"{pair[side]}<|end|>" for side in ("chosen", "rejected")]
        assert all(side[-1] == "<|end|>" for side in texts)


def test_a_reward_file_made_from_the_output_is_read_token_by_token(
    pairs_file: Path, hf_model: Path, tmp_path: Path
) -> None:
    """Each text replaced by a number: as many numbers as there are tokens, in their order."""
    from tgdpo_megatron.scores.reward_file import read_reward_file

    data, tokenizer = prepared(pairs_file, hf_model, DATA)
    lines, expected = [], []
    for row, texts in response_tokens(data, tokenizer):
        line = json.loads(as_json(row, texts))
        numbers = {side: [row + place / 100 for place in range(len(line[side]))] for side in ("chosen", "rejected")}
        expected += numbers["chosen"] + numbers["rejected"]
        lines.append(json.dumps({**line, **numbers}))
    rewards = tmp_path / "rewards.jsonl"
    rewards.write_text("\n".join(lines))
    np.testing.assert_array_equal(read_reward_file(rewards, data, tokenizer), np.float32(expected))


def test_a_line_has_row_response_number_and_text() -> None:
    lines = as_lines(7, [["a", ' "'], ["\n"]]).splitlines()
    assert [line.split(maxsplit=3) for line in lines] == [
        ["7", "chosen", "0", '"a"'],
        ["7", "chosen", "1", '" \\""'],
        ["7", "rejected", "0", '"\\n"'],
    ]


def test_one_row_is_found_by_its_line_and_a_row_without_tokens_is_refused(
    write_pairs: Callable[..., Path], hf_model: Path, tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", [PAIRS[0], {**PAIRS[1], "chosen": " "}, PAIRS[2]])
    data, tokenizer = prepared(pairs, hf_model, DATA)
    ((row, texts),) = response_tokens(data, tokenizer, 3)
    assert row == 3 and "".join(texts[0]) == "Paris.<|end|>"
    with pytest.raises(UserError, match="--row 2: training leaves it out .the chosen response is empty"):
        list(response_tokens(data, tokenizer, 2))
    with pytest.raises(UserError, match="--row 9: there is no such row"):
        list(response_tokens(data, tokenizer, 9))


def test_a_checkpoint_and_the_model_it_was_made_from_have_the_same_tokenizer(checkpoint: Path, hf_model: Path) -> None:
    assert tokenizer_folder(checkpoint) == checkpoint / HF
    assert tokenizer_folder(hf_model) == hf_model


def run(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.tokens", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})


def test_bad_input_is_one_sentence_before_anything_slow_is_loaded(
    pairs_file: Path, hf_model: Path, tmp_path: Path
) -> None:
    """Nothing that takes seconds is there to be loaded: in its place stands what ends the program with another code."""
    for slow in ("torch", "transformers", "megatron"):
        (tmp_path / "site" / slow).mkdir(parents=True)
        (tmp_path / "site" / slow / "__init__.py").write_text(f"raise SystemExit('{slow} is loaded')")
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "cho\n')
    for arguments, sentence in (
        ((tmp_path / "none.jsonl", hf_model), "none.jsonl: no such data file"),
        ((pairs_file, tmp_path), "no tokenizer.json there; give a checkpoint, or a HuggingFace folder"),
        ((torn, hf_model), "torn.jsonl line 2: not valid JSON"),
        ((pairs_file, hf_model, "data.max_lenth=9"), "did you mean 'data.max_length'"),
    ):
        done = run(*arguments, PYTHONPATH=str(tmp_path / "site"))
        assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert done.stdout == ""
    assert run(pairs_file, hf_model, PYTHONPATH=str(tmp_path / "site")).stderr.endswith(" is loaded\n")


def test_the_rows_that_are_left_out_are_named_beside_the_tokens(
    write_pairs: Callable[..., Path], hf_model: Path, tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", [PAIRS[0], {**PAIRS[1], "rejected": ""}])
    done = run(pairs, hf_model, "--json")
    assert done.returncode == 0 and done.stderr == "left out: the rejected response is empty (row 2)\n"
    assert [json.loads(line)["row"] for line in done.stdout.splitlines()] == [1]
