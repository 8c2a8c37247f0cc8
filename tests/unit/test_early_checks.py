"""Missing and unusable files are named before torch is loaded, which takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from recipes.{program} import main
sys.argv[1:] = {arguments!r}
try:
    main()
finally:
    print("torch loaded:", "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("program", "changes", "words"),
    [
        ("train", ["model.checkpoint=nowhere"], "nowhere: no such folder; a model on a hub is named"),
        ("train", ["data.train=nowhere.jsonl"], "nowhere.jsonl: no such data file"),
        ("train", ["data.validation=nowhere.jsonl"], "nowhere.jsonl: no such data file"),
        ("train", ["train.global_batch_size=64"], "train.global_batch_size=64 is more than the 2 pairs"),
        ("train", ["data.template=mine.jinja"], "data.template=mine.jinja: no such file"),
        ("train", ["scores.path=nowhere"], "nowhere/train: no token scores there"),
        (
            "train",
            ["loss.token_rewards=file", "scores.reward_file=r.jsonl"],
            "scores.reward_file=r.jsonl: no such file",
        ),
        ("train", ["model.guidance=hf"], "hf/config.json: architecture 'None' is not supported"),
        ("score", ["model.checkpoint=nowhere"], "nowhere: no such folder; a model on a hub is named"),
        ("score", ["data.train=broken.jsonl"], "broken.jsonl line 2: not valid JSON"),
        ("score", ["data.train=kto.jsonl"], "kto.jsonl"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_it_is_refused_before_torch_is_loaded(
    program: str, changes: list[str], words: str, checkpoint: Path, tmp_path: Path
) -> None:
    good = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    (tmp_path / "good.jsonl").write_text(2 * good)
    (tmp_path / "broken.jsonl").write_text(good + good[:20])
    (tmp_path / "kto.jsonl").write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    given = [f"model.checkpoint={checkpoint}", f"model.guidance={checkpoint}", "data.train=good.jsonl"]
    given += ["train.output=out", "train.global_batch_size=2", "train.micro_batch_size=1", "scores.path=written"]
    if program == "train":
        given = given[:-1]
    if any("token_rewards" in change for change in changes):
        given.remove(f"model.guidance={checkpoint}")
    source = PROGRAM.format(program=program, arguments=[*given, *changes])
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{source}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "torch loaded: False" in done.stdout
    assert not (tmp_path / "out").exists() and not (tmp_path / "written").exists()
