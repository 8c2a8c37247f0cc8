"""tools.sample and tools.annotate, killed in the middle of their work, go on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.support.completions import Completions, served
from tests.support.in_process import Program
from tests.support.reward_models import answered, make_classifier, write_lines
from tgdpo_megatron.sampling.answers import read_answers
from tools.annotate import main as annotate

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
PATIENCE = 120


def started(arguments: Sequence[object], program: str = "tools.sample") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", program, *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(program: subprocess.Popen[str]) -> str:
    """What a program said that ended as it should."""
    said, complaints = program.communicate(timeout=PATIENCE)
    assert program.returncode == 0, complaints
    return said


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.is_file() else []


def killed(program: subprocess.Popen[str], output: Path, after: int) -> int:
    """Kill a program once it has written some lines. Returns how many whole ones it left."""
    deadline = time.monotonic() + PATIENCE
    while len(lines_of(output)) < after:
        assert program.poll() is None and time.monotonic() < deadline, program.communicate()
        time.sleep(0.005)
    program.send_signal(signal.SIGKILL)
    program.communicate()
    assert program.returncode == -signal.SIGKILL
    return sum(line.endswith(b"\n") for line in lines_of(output))


@pytest.mark.parametrize("engine", ["transformers", "http"])
def test_a_killed_run_goes_on_bit_for_bit(engine: str, hf_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "".join(f"What is {number} times {number % 7}{'?' * (number % 5 + 1)}\n" for number in range(40))
    )
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    with served(Completions(hf_model, str(hf_model))) as server:
        # Of different lengths, so that batches are sorted; in small blocks, so that there is a middle.
        common = [hf_model, prompts, "--n", 2, "--max-new-tokens", 24, "--batch-size", 4]
        common += ["--engine", "http", "--url", server.url, "--concurrency", 4] if engine == "http" else []
        finished(started([*common, "--output", whole]))
        server.seconds = 0.05
        left = killed(started([*common, "--output", output]), output, after=5)
        assert left < 40
        with output.open("ab") as file:
            file.write(b'{"prompt": "half a li')
        server.seconds, before = 0, len(server.asked)
        said = finished(started([*common, "--output", output]))
    assert "40 prompts, 80 answers" in said
    assert output.read_bytes() == whole.read_bytes()
    if engine == "http":  # what is there is not asked for again
        kept = {seed for line in islice(read_answers(output), left) for seed in line.seeds}
        assert kept.isdisjoint(request["seed"] for request in islice(server.asked, before, None))


def test_a_killed_annotation_goes_on_bit_for_bit(tokenizer: Any, tmp_path: Path, in_process: Program) -> None:
    texts = ["Blue.", "A stone sings of rivers.", "No house is blue.", "Hello there!"]
    rows = [answered(f"Name {number} colours.", texts[number % 3 :][:2]) for number in range(700)]
    answers = write_lines(tmp_path / "answers.jsonl", rows)
    common = [make_classifier(tmp_path / "rm", tokenizer), answers, "--device", "cpu"]
    whole, output = tmp_path / "whole.jsonl", tmp_path / "pairs.jsonl"
    assert in_process(annotate, [*common, "--output", whole])[0] == 0
    arguments = [*common, "--output", output]
    left = killed(started(arguments, "tools.annotate"), output, after=1)
    assert left < len(lines_of(whole)) == 700
    with output.open("ab") as file:
        file.write(b'{"prompt": "half a li')
    code, said = in_process(annotate, arguments)
    assert code == 0 and "700 pairs of 700 prompts" in said
    assert output.read_bytes() == whole.read_bytes()
    reports = [path.with_suffix(".report.json").read_bytes() for path in (output, whole)]
    assert reports[0] == reports[1]
