"""tools.runs: a line for each run of a sweep."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools.runs import main


def write(run: Path, *lines: dict[str, float]) -> None:
    run.mkdir(parents=True)
    text = "".join(json.dumps({"iteration": step, "loss": 1.0, **line}) + "\n" for step, line in enumerate(lines, 1))
    (run / "metrics.jsonl").write_text(text + '{"iteration": 9, "lo')  # a line that is being written


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *folders: Path) -> list[list[str]]:
    monkeypatch.setattr(sys, "argv", ["runs", *map(str, folders)])
    main()
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_every_run_of_a_sweep_has_a_line_with_its_newest_evaluation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = tmp_path / "sweep" / "alpha-0.5-beta-0.1", tmp_path / "sweep" / "alpha-1-beta-0.1"
    write(
        first, {"eval/loss": 0.9}, {"eval/loss": 0.5, "eval/rewards/accuracies": 0.75, "eval/rewards/margins": -1}, {}
    )
    write(second, {})
    (tmp_path / "sweep" / "notes").mkdir()
    heading, *rows = shown(capsys, monkeypatch, tmp_path / "sweep")
    assert heading == ["run", "step", "eval/loss", "eval/rewards/accuracies", "eval/rewards/margins"]
    assert rows == [[str(first), "3", "0.5000", "0.7500", "-1.0000"], [str(second), "1", "-", "-", "-"]]
    assert shown(capsys, monkeypatch, second)[1:] == rows[1:]


def test_a_folder_without_runs_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        shown(capsys, monkeypatch, tmp_path)
    assert ended.value.code == 2 and "holds a metrics.jsonl; give the folder of a sweep" in capsys.readouterr().err
