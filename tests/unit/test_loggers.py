"""Where metrics are written: each step once, whatever stops a run, and without harm where a service fails."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tgdpo_megatron.config import Config, ReportConfig
from tgdpo_megatron.errors import StoppedError, UserError
from tgdpo_megatron.preflight import check_services
from tgdpo_megatron.report import loggers
from tgdpo_megatron.report.loggers import Logger

WANDB = Config(report=ReportConfig(wandb_project="pairs"))
MLFLOW = Config(report=ReportConfig(mlflow_experiment="pairs"))


def log(output: Path, iterations: range, *, first: int = 0, config: Config | None = None) -> list[Any]:
    """Log some steps as one process would, and read what metrics.jsonl then holds."""
    logger = Logger(output, config or Config(), active=True, first=first)
    for iteration in iterations:
        logger.log(iteration, {"loss": 0.5, "rewards/margins": -0.25})
    logger.close()
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_the_log_is_one_json_object_a_line(tmp_path: Path) -> None:
    expected = [{"iteration": number, "loss": 0.5, "rewards/margins": -0.25} for number in (1, 2)]
    assert log(tmp_path, range(1, 3)) == expected


def test_a_continued_run_logs_each_step_once(tmp_path: Path) -> None:
    """A run killed in the middle of writing step 5, continued from the checkpoint of step 2."""
    log(tmp_path, range(1, 5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "lo')
    lines = log(tmp_path, range(3, 5), first=2)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]


def scalars(output: Path) -> dict[str, list[int]]:
    """Tag -> the steps that TensorBoard shows."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    read = accumulator(str(output / "tensorboard"))
    read.Reload()
    return {tag: [event.step for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_groups_training_and_held_out_numbers_as_for_other_trainers(tmp_path: Path) -> None:
    logger = Logger(tmp_path, Config(), active=True)
    logger.log(1, {"loss": 0.5, "rewards/margins": 0.1, "eval/loss": 0.6})
    logger.close()
    assert scalars(tmp_path) == {"train/loss": [1], "train/rewards/margins": [1], "eval/loss": [1]}


def test_tensorboard_shows_each_step_of_a_continued_run_once(tmp_path: Path) -> None:
    log(tmp_path, range(1, 6))
    log(tmp_path, range(3, 6), first=2)
    assert scalars(tmp_path)["train/loss"] == [1, 2, 3, 4, 5]


def test_lines_that_are_no_metrics_are_dropped_when_a_run_goes_on_and_the_others_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line is what a kill left of one, and is not worth a word."""
    lines = log(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\xff\x00 garbage\n[3]\n{}\n" + b"".join(others) + b'{"iterat')
    assert log(tmp_path, range(0), first=3) == lines
    assert capsys.readouterr().err == f"warning: {path}: line 2, and 2 more: not of this program; dropped.\n"


def test_other_ranks_write_no_log(tmp_path: Path) -> None:
    logger = Logger(tmp_path, Config(), active=False)
    logger.log(1, {"loss": 0.5})
    logger.close()
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_killed_right_after_it_is_continued_keeps_its_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = "".join(f'{{"iteration": {step}, "loss": 0.5}}\n' for step in range(1, 5))
    path.write_text(lines)
    Logger(tmp_path, Config(), active=True, first=4)  # nothing is logged, flushed or closed
    assert path.read_text() == lines


class StandIn:
    """The calls of wandb that are used, as its documentation describes them. It remembers what it was told."""

    def __init__(self) -> None:
        self.runs: dict[str, list[int]] = {}
        self.opened: list[dict[str, Any]] = []
        self.taken: list[dict[str, float]] = []
        self.finished = 0
        self.codes: list[int] = []
        self.fails_at: int | None = None

    def init(self, **settings: Any) -> Any:
        self.opened.append(settings)
        steps = self.runs.setdefault(settings["id"], [])

        class Run:
            def log(_, data: dict[str, float], step: int, commit: bool) -> None:
                if step == self.fails_at:
                    raise ConnectionError("no route to the service. Retry later.")
                steps.append(step)
                self.taken.append(data)

            def finish(_, exit_code: int) -> None:
                self.finished += 1
                self.codes.append(exit_code)

        return Run()


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    module = ModuleType("wandb")
    module.init = stand_in.init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_SILENT", "WANDB_CONSOLE", "WANDB_FINISH_TIMEOUT"):
        monkeypatch.setenv(name, "")  # so that what is set there is unset after the test
    return stand_in


def test_a_service_gets_every_metric_under_the_names_of_tensorboard(wandb: StandIn, tmp_path: Path) -> None:
    log(tmp_path, range(2), config=WANDB)
    assert wandb.taken == 2 * [{"train/loss": 0.5, "train/rewards/margins": -0.25}]
    assert [(run["project"], run["name"], run["dir"]) for run in wandb.opened] == [("pairs", *2 * [str(tmp_path)])]
    assert wandb.finished == 1


def test_a_continued_run_goes_on_in_the_same_run_of_a_service_which_gets_each_step_once(
    wandb: StandIn, tmp_path: Path
) -> None:
    """Killed at step 5 and again at step 4, each time continued from the checkpoint of step 2."""
    for steps, first in ((range(0, 6), 0), (range(3, 5), 2), (range(3, 9), 2)):
        log(tmp_path, steps, first=first, config=WANDB)
    assert list(wandb.runs.values()) == [[0, 1, 2, 3, 4, 5, 6, 7, 8]]


def test_steps_that_a_service_missed_are_sent_when_the_run_goes_on(
    wandb: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.fails_at = 3
    lines = log(tmp_path, range(1, 7), config=WANDB)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    reason = "Weights & Biases gets no metrics from here on (no route to the service)"
    assert capsys.readouterr().err.strip() == f"warning: {reason}; metrics.jsonl has them all."
    wandb.fails_at = None
    log(tmp_path, range(7, 9), first=6, config=WANDB)
    assert list(wandb.runs.values()) == [[1, 2, 4, 5, 6, 7, 8]]  # 3 may have arrived, so it is not sent again


def test_a_service_that_never_answers_holds_up_neither_a_step_nor_for_long_the_end(
    wandb: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loggers, "PATIENCE", 0.2)
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: time.sleep(5))
    began = time.monotonic()
    assert len(log(tmp_path, range(1, 100), config=WANDB)) == 99
    assert time.monotonic() - began < 2
    assert "Weights & Biases has not taken all metrics" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (UserError("the loss is not finite"), 1), (StoppedError("stopped"), 75), (StoppedError("", 130), 130)],
)
def test_however_a_run_ends_a_service_gets_its_last_metrics_and_is_told_how(
    wandb: StandIn, tmp_path: Path, error: Exception | None, code: int
) -> None:
    with contextlib.suppress(UserError, StoppedError), Logger(tmp_path, WANDB, active=True) as logger:
        logger.log(1, {"loss": 0.5})
        if error:
            raise error
    assert (wandb.taken, wandb.codes) == ([{"train/loss": 0.5}], [code])


def test_held_out_metrics_of_the_step_from_which_a_run_goes_on_reach_a_service(wandb: StandIn, tmp_path: Path) -> None:
    log(tmp_path, range(1, 3), config=WANDB)
    with Logger(tmp_path, WANDB, active=True, first=2) as logger:
        logger.complete(2, {"eval/loss": 0.25})
        logger.log(3, {"loss": 0.5})
    assert list(wandb.runs.values()) == [[1, 2, 2, 3]] and wandb.taken[2] == {"eval/loss": 0.25}


@pytest.mark.parametrize(("name", "package"), [("wandb_project", "wandb"), ("mlflow_experiment", "mlflow")])
def test_a_service_whose_package_is_missing_is_refused_at_the_start(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a folder has its name, as wandb's own runs leave one behind."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, package, raising=False)
    check_services(Config())
    for made in (None, package):
        if made:
            (tmp_path / made).mkdir()
        with pytest.raises(UserError) as refused:
            check_services(Config(report=ReportConfig.model_validate({name: "pairs"})))
        assert str(refused.value) == (
            f"report.{name}=pairs needs the package {package}, which is not installed; type "
            f"pip install '.[{package}]' in the repository, or leave report.{name} out."
        )


def test_mlflow_has_each_step_of_a_continued_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: pip install '.[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions ask for it
    output = tmp_path / "run"
    output.mkdir()
    log(output, range(0, 5), config=MLFLOW)
    log(output, range(3, 7), first=2, config=MLFLOW)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("pairs").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(step, 0.5) for step in range(7)]
    assert run.data.params["loss.type"] == MLFLOW.loss.type and run.info.status == "FINISHED"


def test_wandb_keeps_a_continued_run_under_one_id_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is not installed: pip install '.[wandb]'")
    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "FINISH_TIMEOUT": "30"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    log(tmp_path, range(0, 4), config=WANDB)
    log(tmp_path, range(3, 6), first=2, config=WANDB)
    run, sent = json.loads((tmp_path / "wandb.json").read_text())
    kept = sorted(path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert kept == [run, run] and sent == 5 and "warning" not in capsys.readouterr().err
