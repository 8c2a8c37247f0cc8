"""What the demo records: its settings, its commands, and the quality of each model."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tgdpo_megatron.commands import PYTHON, as_called
from tgdpo_megatron.errors import USER_ERROR, UserError

SFT_LR = 4e-3
BETA = 1.0
BETA_R = 0.5
# Kept low: with more steps or a higher rate the preference losses keep falling, but so do both answers' log-probs.
PREFERENCE_LR = 1e-4
NOISE = 0.45
VOCAB_SIZE = 1000
RUNS = {"sft": "sft", "dpo": "aligned/guidance", "tgdpo": "aligned/policy"}
"""Folder of the run that trained each model."""
MODELS = {"sft": "SFT (before)", "dpo": "DPO (the guidance)", "tgdpo": "TGDPO (after)"}


@dataclass(frozen=True)
class Effort:
    """Numbers of pairs and of optimizer steps. Batches hold 32 pairs.

    Attributes:
        starts: How often everything is trained, each time from other random weights and with another order of pairs.
    """

    train: int = 2000
    validation: int = 200
    sft: int = 4000
    sft_iters: int = 600
    preference_iters: int = 60
    eval_interval: int = 10
    starts: int = 3


FAST = Effort(train=200, validation=20, sft=400, sft_iters=15, preference_iters=6, eval_interval=3, starts=1)


class PeakMemory(threading.Thread):
    """Measures the peak memory of this process and all its children. Shared pages count once (PSS)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        this = psutil.Process()
        while True:
            total = 0
            for process in [this, *this.children(recursive=True)]:
                with suppress(psutil.Error):  # the process has ended
                    total += process.memory_full_info().pss
            self.peak = max(self.peak, total)
            time.sleep(0.5)


@dataclass
class Journal:
    """What the demo did: its commands, the time of each stage, and the folder that holds everything."""

    output: Path
    seed: int
    commands: list[str] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    """Name -> seconds."""
    writing: threading.Lock = field(default_factory=threading.Lock)
    """Held while a command is written down: some run side by side."""
    threads: int | None = None
    """OMP_NUM_THREADS of the programs; None leaves it to them."""
    memory: PeakMemory = field(default_factory=lambda: PeakMemory())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Print the number and name of a stage, and measure its time."""
        print(f"\n{len(self.stages) + 1}. {name}", flush=True)
        started = time.monotonic()
        yield
        self.stages[name] = time.monotonic() - started
        print(f"   took {self.stages[name]:.0f} s", flush=True)

    def run(self, module: str, *arguments: str | Path) -> None:
        """Run one of the programs, and keep its output in the folder `logs`.

        Raises:
            UserError: The program refused its input.
            SystemExit: It failed otherwise.
        """
        command = ["python", "-m", module, *map(str, arguments)]
        with self.writing:
            self.commands.append(as_called(shlex.join(command)))
            print(f"   $ {self.commands[-1]}", flush=True)
            log = self.output / "logs" / f"{len(self.commands):02}-{module}.log"
        environment = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        with log.open("w", encoding="utf-8") as file:
            # Progress bars are shown in a terminal only.
            errors = None if sys.stderr.isatty() else file
            code = subprocess.call(
                [*PYTHON, *command[2:]], stdout=file, stderr=errors, env={**os.environ, **environment}
            )
        if code:
            print("".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-40:]), file=sys.stderr)
            sentence = f"{module} ended with exit code {code}; its whole output is in {log}."
            if code == USER_ERROR:
                raise UserError(sentence)
            sys.exit(f"error: {sentence}")


@dataclass(frozen=True)
class Quality:
    """The quality of one exported model on the held-out pairs, with one entry for each pair.

    Attributes:
        margins: Log-prob of the chosen minus log-prob of the rejected response, nats.
        answers: Greedy answers.
        exact: Whether the answer is exactly the chosen response.
    """

    margins: list[float]
    answers: list[str]
    exact: list[bool]

    @property
    def exact_share(self) -> float:
        """Share of greedy answers that are exactly the chosen response."""
        return mean(self.exact)

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen response is more likely than the rejected one."""
        return mean([margin > 0 for margin in self.margins])


def read_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
