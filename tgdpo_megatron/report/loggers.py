"""Where a run's metrics go as they come: metrics.jsonl, TensorBoard, and where asked for Weights & Biases and MLflow.

metrics.jsonl is the run's own, and all others are copies. The two services may be far away, so each works in a thread
of its own: no step waits for a network, and where one fails the run goes on without it. Their keys and addresses come
from the environment, as their own documentation says.
"""

from __future__ import annotations

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
from typing import Any, Protocol

from tqdm import tqdm

from tgdpo_megatron.cache import write_json
from tgdpo_megatron.config import Config, LossConfig
from tgdpo_megatron.errors import in_short
from tgdpo_megatron.report.journal import lines_until
from tgdpo_megatron.report.metrics import warnings

Metrics = Mapping[str, float]
PATIENCE = 60
"""Seconds that a service has at the end of a run for what it has not sent yet."""


class Sink(Protocol):
    """What takes the metrics of optimizer steps, in order."""

    def log(self, iteration: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class Logger:
    """All sinks of a run. Only one rank writes.

    Args:
        output: Folder of the run.
        active: Whether this is the rank that writes.
        first: Optimizer steps done before this process. Lines that an interrupted run wrote after them are dropped.
    """

    def __init__(self, output: Path, config: Config, *, active: bool, first: int = 0) -> None:
        self.active = active
        self.warned: set[str] = set()
        self.sinks: list[Sink] = []
        if not active:
            return
        lines = _Lines(output, first)
        self.sinks.append(lines)
        if importlib.util.find_spec("tensorboard"):
            self.sinks.append(_TensorBoard(output, first))
        for service, setting in ((_WandB, config.report.wandb_project), (_MLflow, config.report.mlflow_experiment)):
            if setting is not None:
                open_it = partial(service, setting, output, config)
                self.sinks.append(_InBackground(service.title, output / service.file, open_it, lines.before))

    def log(self, iteration: int, metrics: Metrics) -> None:
        """Record the metrics of an optimizer step, counted from 1; 0 is before the first."""
        for sink in self.sinks:
            sink.log(iteration, metrics)

    def new_warnings(self, loss: LossConfig, metrics: Metrics) -> list[str]:
        """The warnings that were not given before. Empty on ranks that do not write."""
        found = {name: sentence for name, sentence in warnings(loss, metrics).items() if name not in self.warned}
        self.warned |= found.keys()
        return list(found.values()) if self.active else []

    def close(self) -> None:
        """Flush and close everything."""
        for sink in self.sinks:
            sink.close()


class _Lines:
    """metrics.jsonl: a line of JSON for each step.

    Attributes:
        before: What earlier processes logged, up to the step from which the run goes on.
    """

    def __init__(self, output: Path, first: int) -> None:
        path = output / "metrics.jsonl"
        kept = lines_until(first, path)
        self.before: list[dict[str, float]] = [json.loads(line) for line in kept]
        part = path.with_suffix(".tmp")
        part.write_text("".join(kept), encoding="utf-8")
        os.replace(part, path)  # a run that is killed now keeps its lines
        self.file = path.open("a", encoding="utf-8")

    def log(self, iteration: int, metrics: Metrics) -> None:
        self.file.write(json.dumps({"iteration": iteration, **metrics}, allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class _TensorBoard:
    """The folder tensorboard. What an interrupted run wrote after the step from which it goes on is hidden."""

    def __init__(self, output: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(output / "tensorboard"), purge_step=first + 1 if first else None)

    def log(self, iteration: int, metrics: Metrics) -> None:
        for name, value in _tagged(metrics).items():
            self.writer.add_scalar(name, value, iteration)

    def close(self) -> None:
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
    """

    def __init__(
        self,
        title: str,
        kept: Path,
        open_it: Callable[[str | None], _Service],
        before: Iterable[Mapping[str, float]],
    ) -> None:
        self.title, self.kept, self.open_it = title, kept, open_it
        self.steps: SimpleQueue[tuple[int, Metrics] | None] = SimpleQueue()
        for line in before:
            self.steps.put((int(line["iteration"]), {name: line[name] for name in line if name != "iteration"}))
        self.thread = Thread(target=self._work, daemon=True)
        self.thread.start()

    def log(self, iteration: int, metrics: Metrics) -> None:
        if self.thread.is_alive():  # else the service has failed, and this was said
            self.steps.put((iteration, metrics))

    def close(self) -> None:
        self.steps.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            self._warn(f"{self.title} has not taken all metrics after {PATIENCE} s")

    def _work(self) -> None:
        try:
            self._send()
        except Exception as error:  # whatever a service does wrong, the run goes on
            self._warn(f"{self.title} gets no metrics from here on ({in_short(error)})")

    def _send(self) -> None:
        run, sent = json.loads(self.kept.read_text(encoding="utf-8")) if self.kept.is_file() else (None, -1)
        service = self.open_it(run)
        while (step := self.steps.get()) is not None:
            iteration, metrics = step
            if iteration > sent:
                write_json(self.kept, (service.run, iteration))  # first: a step that is lost is better than one twice
                service.log(iteration, _tagged(metrics))
        service.close()

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

    def close(self) -> None:
        self.writer.finish()


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

    def close(self) -> None:
        self.client.set_terminated(self.run)
