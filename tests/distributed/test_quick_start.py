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
    assert len(blocks) == 3 and "recipes.align" in blocks[1] and "--family qwen3" in blocks[2]
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
    """Of the commands that recipes.align prints and runs, the last training."""
    (said,) = re.findall(
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


def test_a_model_of_another_family_is_scored_trained_and_exported_without_a_conversion_by_hand(folder: Path) -> None:
    """The export loads in transformers and is no longer the start."""
    import torch
    from transformers import AutoModelForCausalLM

    names = ("qwen3-hf", "qwen3-dpo-hf")
    start, trained = (AutoModelForCausalLM.from_pretrained(folder / "runs" / name) for name in names)
    assert type(start) is type(trained) and trained.config.model_type == "qwen3"
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert not torch.equal(start(ids).logits, trained(ids).logits)
