"""The commands of the README run as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where they were run: an empty folder that sees the repository's documents and programs."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## Your own data and model") :]
    blocks: list[str] = re.findall(
        r"^```\n(.*?)^```", section[: section.index("\n## ")], flags=re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 3 and "recipes.align" in blocks[1] and "tools.compare" in blocks[2]
    folder = tmp_path_factory.mktemp("quick_start")
    (folder / "docs").symlink_to(ROOT / "docs")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    for name, commands in {"said.txt": "".join(blocks), "again.txt": blocks[1]}.items():
        done = subprocess.run(
            ["bash", "-e"], cwd=folder, env=environment, input=commands, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        (folder / name).write_text(done.stdout)
    return folder


def test_recipes_align_a_second_time_has_nothing_left_to_do(folder: Path) -> None:
    said = (folder / "again.txt").read_text().split()
    assert " ".join(said).startswith("guidance: finished before scores: finished before")
    assert "$" not in said and said[-4:-2] == ["aligned", "runs/aligned/hf"]


def test_a_training_says_no_more_than_fits_a_screen_and_ends_with_its_result(folder: Path) -> None:
    """Of the commands that the first recipes.align prints and runs, the last training."""
    said, _ = re.findall(
        r"^\$ python -m recipes\.train --recipe=tgdpo_tiny.*?\n\n", (folder / "said.txt").read_text(), re.M | re.S
    )
    lines = said.strip().splitlines()
    assert len(lines) <= 29, said  # the progress bar, which goes to stderr, is one more
    words = [line.split()[0] for line in lines[-6:]]
    assert words == ["done:", "time", "held", "checkpoint", "report", "export"]
    assert (folder / lines[-2].split()[1]).is_file()


def test_two_commands_give_a_huggingface_model(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    aligned, start = (
        AutoModelForCausalLM.from_pretrained(folder / "runs" / name, local_files_only=True)
        for name in ("aligned/hf", "start-hf")
    )
    assert AutoTokenizer.from_pretrained(folder / "runs" / "aligned" / "hf", local_files_only=True).chat_template
    moved = [not before.equal(after) for before, after in zip(start.parameters(), aligned.parameters(), strict=True)]
    assert all(moved)


def test_held_out_accuracy_is_about_what_the_readme_says(folder: Path) -> None:
    """74 of 100 pairs here; another processor rounds otherwise, and a few pairs are close."""
    last = json.loads((folder / "runs" / "aligned" / "policy" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/rewards/accuracies"] == pytest.approx(0.74, abs=0.05)


def test_prompts_become_pairs_a_model_and_a_verdict(folder: Path) -> None:
    """A pair for each of the 500 prompts whose two answers differ, and a verdict over the 100 held-out prompts."""
    answers, pairs = (
        [json.loads(line) for line in (folder / "runs" / name).read_text().splitlines()]
        for name in ("answers.jsonl", "pairs.jsonl")
    )
    differ = [row["prompt"] for row in answers if len(set(row["all_generated_responses"])) == 2]
    assert len(answers) == 500 and [row["prompt"] for row in pairs] == differ
    assert all(row["score_chosen"] > row["score_rejected"] for row in pairs)
    found = json.loads((folder / "runs" / "verdict" / "comparison.json").read_text())
    assert found["prompts"] == 100
    rate = found["models"]["runs/on-policy/hf"]["win_rate"]
    assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
