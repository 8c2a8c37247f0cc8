"""Where a run's metrics go as they come: metrics.jsonl, TensorBoard, and where asked for Weights & Biases and MLflow.

metrics.jsonl is the run's own, and all others are copies. The two services may be far away, so each works in a thread
of its own: no step waits for a network, and where one fails the run goes on without it. Their keys and addresses come
from the environment, as their own documentation says.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Protocol, Self

from tqdm import tqdm

from tgdpo_megatron.cache import write_json
from tgdpo_megatron.config import Config, LossConfig
from tgdpo_megatron.errors import INTERRUPTED, REQUEUE, UNEXPECTED, StoppedError, in_short
from tgdpo_megatron.report.journal import Journal
from tgdpo_megatron.report.metrics import warnings

Metrics = Mapping[str, float]
PATIENCE = 60
"""Seconds that a service has at the end of a run for what it has not sent yet."""
LITTLE_PATIENCE = 10
"""The same where the run was stopped, or failed, and has little time left."""


class Sink(Protocol):
    """What takes the metrics of optimizer steps, in order."""

    def log(self, iteration: int, metrics: Metrics) -> None: ...

    def close(self, code: int) -> None:
        """Flush and close.

        Args:
            code: The exit code of the run, which is 0 where it has done all its steps.
        """


class Logger:
    """All sinks of a run. Only one rank writes. As a context, it closes them, however the block ends.

    Args:
        output: Folder of the run.
        active: Whether this is the rank that writes.
        first: Optimizer steps done before this process. Lines that an interrupted run wrote after them are dropped.
    """

    def __init__(self, output: Path, config: Config, *, active: bool, first: int = 0) -> None:
        self.active = active
        self.warned: set[str] = set()
        self.sinks: list[Sink] = []
        self.lines: Journal | None = None
        if not active:
            return
        self.lines = Journal(output / "metrics.jsonl", first=first)
        if importlib.util.find_spec("tensorboard"):
            self.sinks.append(_TensorBoard(output, first))
        for service, setting in ((_WandB, config.report.wandb_project), (_MLflow, config.report.mlflow_experiment)):
            if setting is not None:
                open_it = partial(service, setting, output, config)
                before = [json.loads(line) for line in self.lines.before]
                self.sinks.append(_InBackground(service.title, output / service.file, open_it, before, first))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, Exception):  # not where a second Ctrl-C ends all at once
            self.close(0 if error is None else error.code if isinstance(error, StoppedError) else UNEXPECTED)

    @property
    def refused(self) -> str | None:
        """The sentence about a line that the operating system refused; None so far, and on ranks that do not write."""
        return self.lines.refused if self.lines else None

    def log(self, iteration: int, metrics: Metrics) -> None:
        """Record the metrics of an optimizer step, counted from 1; 0 is before the first."""
        if self.lines:
            self.lines.write(iteration, metrics)
        for sink in self.sinks:
            sink.log(iteration, metrics)

    def complete(self, iteration: int, metrics: Metrics) -> None:
        """Add metrics, which may be none, to those of the step from which the run goes on."""
        if not metrics:
            return
        if self.lines:
            self.lines.complete(iteration, metrics)
        for sink in self.sinks:
            sink.log(iteration, metrics)

    def new_warnings(self, loss: LossConfig, metrics: Metrics) -> list[str]:
        """The warnings that were not given before. Empty on ranks that do not write."""
        found = {name: sentence for name, sentence in warnings(loss, metrics).items() if name not in self.warned}
        self.warned |= found.keys()
        return list(found.values()) if self.active else []

    def close(self, code: int = 0) -> None:
        """Flush and close everything, once.

        Args:
            code: The exit code of the run.
        """
        while self.sinks:
            self.sinks.pop().close(code)


class _TensorBoard:
    """The folder tensorboard. What an interrupted run wrote after the step from which it goes on is hidden.

    A full disk is passed over here: metrics.jsonl, of which this is a copy, meets it too.
    """

    def __init__(self, output: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(output / "tensorboard"), purge_step=first + 1 if first else None)

    def log(self, iteration: int, metrics: Metrics) -> None:
        with contextlib.suppress(OSError):
            for name, value in _tagged(metrics).items():
                self.writer.add_scalar(name, value, iteration)

    def close(self, code: int) -> None:
        with contextlib.suppress(OSError):
            self.writer.close()


def _tagged(metrics: Metrics) -> dict[str, float]:
    """The metrics under two groups, `train` and `eval`, as TRL's trainers name them in TensorBoard and the services."""
    return {name if name.startswith("eval/") else f"train/{name}": value for name, value in metrics.items()}


class _InBackground:
    """A service that is opened and fed in a thread of its own.

    A continued run goes on in the service's same run, whose id is kept in the folder of the run with the last step that
    was sent. Steps up to there are not sent again, though they are computed again; those that the service missed are.

    Args:
        title: What the service is called.
        kept: File for the id and the step.
        open_it: Opens the service, given the id of the run to go on with, or None.
        before: Lines of metrics of earlier processes.
        first: The step from which the run goes on. Its metrics may be completed.
    """

    def __init__(
        self,
        title: str,
        kept: Path,
        open_it: Callable[[str | None], _Service],
        before: Iterable[Mapping[str, float]],
        first: int,
    ) -> None:
        self.title, self.kept, self.open_it, self.first = title, kept, open_it, first
        self.before = [(int(line["iteration"]), {**line}) for line in before]
        self.steps: SimpleQueue[tuple[int, Metrics] | int] = SimpleQueue()
        """Steps, and then an exit code."""
        self.thread = Thread(target=self._work, daemon=True)
        self.thread.start()

    def log(self, iteration: int, metrics: Metrics) -> None:
        if self.thread.is_alive():  # else the service has failed, and this was said
            self.steps.put((iteration, metrics))

    def close(self, code: int) -> None:
        patience = LITTLE_PATIENCE if code else PATIENCE
        self.steps.put(code)
        self.thread.join(patience)
        if self.thread.is_alive():
            self._warn(f"{self.title} has not taken all metrics after {patience} s")

    def _work(self) -> None:
        try:
            self._send()
        except Exception as error:  # whatever a service does wrong, the run goes on
            self._warn(f"{self.title} gets no metrics from here on ({in_short(error)})")

    def _send(self) -> None:
        run, sent = json.loads(self.kept.read_text(encoding="utf-8")) if self.kept.is_file() else (None, -1)
        service = self.open_it(run)

        def send(iteration: int, metrics: Metrics) -> None:
            # First: a step that is lost is better than one twice.
            write_json(self.kept, (service.run, max(iteration, sent)))
            service.log(iteration, _tagged(metrics))

        for iteration, line in self.before:
            if iteration > sent:
                send(iteration, {name: line[name] for name in line if name != "iteration"})
        while not isinstance(step := self.steps.get(), int):
            if step[0] > sent or 0 < step[0] == self.first:
                send(*step)
        service.close(step)

    def _warn(self, words: str) -> None:
        tqdm.write(f"warning: {words}; metrics.jsonl has them all.", file=sys.stderr)


class _Service(Sink, Protocol):
    """A sink outside this machine. `run` is the id under which it keeps the run."""

    run: str


class _WandB:
    """A run of a project in Weights & Biases; with WANDB_MODE=offline in the folder of the run, for `wandb sync`."""

    title, file = "Weights & Biases", "wandb.json"

    def __init__(self, project: str, output: Path, config: Config, run: str | None) -> None:
        # It neither writes between our lines, nor keeps a finished job waiting for a network that is gone.
        for name, value in {"SILENT": "true", "CONSOLE": "off", "FINISH_TIMEOUT": str(PATIENCE // 2)}.items():
            os.environ.setdefault(f"WANDB_{name}", value)
        import wandb

        self.run = run or secrets.token_hex(4)
        self.writer: Any = wandb.init(
            project=project,
            id=self.run,
            resume="allow",
            name=str(output),
            dir=os.environ.get("WANDB_DIR", str(output)),
            config=config.model_dump(mode="json"),
        )

    def log(self, iteration: int, metrics: Metrics) -> None:
        self.writer.log(dict(metrics), step=iteration, commit=True)

    def close(self, code: int) -> None:
        self.writer.finish(exit_code=code)


class _MLflow:
    """A run of an MLflow experiment, at the address that MLFLOW_TRACKING_URI names."""

    title, file = "MLflow", "mlflow.json"

    def __init__(self, experiment: str, output: Path, config: Config, run: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.metric, self.client = Metric, MlflowClient()
        if run is not None:
            self.run: str = run
            self.client.update_run(run, status="RUNNING")
            return
        found = self.client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self.client.create_experiment(experiment)
        self.run = self.client.create_run(number, run_name=str(output)).info.run_id
        settings = [
            Param(f"{group}.{name}", str(value))
            for group, values in config.model_dump(mode="json").items()
            for name, value in values.items()
            if value is not None
        ]
        for first in range(0, len(settings), 100):  # the most that MLflow takes at once
            self.client.log_batch(self.run, params=settings[first : first + 100])

    def log(self, iteration: int, metrics: Metrics) -> None:
        now = time.time_ns() // 1_000_000
        self.client.log_batch(
            self.run, metrics=[self.metric(name, value, now, iteration) for name, value in metrics.items()]
        )

    def close(self, code: int) -> None:
        ends = {0: "FINISHED", REQUEUE: "SCHEDULED", INTERRUPTED: "KILLED"}
        self.client.set_terminated(self.run, status=ends.get(code, "FAILED"))
