"""What goes wrong in single steps of a training, and which pairs were in them.

A step whose loss or gradient is not finite is skipped: nothing is updated. A step whose loss leaps is done, and its
pairs are written down. Both name the pairs that are the cause, as far as it can be found.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tgdpo_megatron.config import Config
from tgdpo_megatron.data.batch import Batch
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.engine import Engine
from tgdpo_megatron.errors import NonFiniteError
from tgdpo_megatron.platform.processes import Ranks, on_first_rank
from tgdpo_megatron.platform.random_states import set_for_step
from tgdpo_megatron.report.journal import SAMPLES, SKIPPED, SPIKES, Journal, lines_until

WINDOW = 50
"""Number of steps whose losses a leap is measured against."""
FEWEST = 10
"""Number of steps before which no leap is seen."""
LEAST_SPREAD = 0.02
"""Losses of a calm run hardly differ. Their spread is taken for at least this share of the median."""
_DEVIATION = 1.4826
"""Standard deviations in a median absolute deviation of normal numbers."""


@dataclass
class History:
    """What is remembered of the steps before. Equal on all ranks.

    Attributes:
        skipped: Number of steps that were skipped.
        in_a_row: Those among them that came last, one after another.
        losses: Losses of the last steps that were not skipped.
    """

    skipped: int = 0
    in_a_row: int = 0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def skip(self) -> None:
        """Count a step that was skipped."""
        self.skipped += 1
        self.in_a_row += 1

    def add(self, loss: float) -> None:
        """Count a step that was done."""
        self.in_a_row = 0
        self.losses.append(loss)

    def leap(self, loss: float, deviations: float) -> float | None:
        """The median of the losses before, if a loss is so many deviations above it.

        Args:
            deviations: In standard deviations, estimated from the median absolute deviation. 0: no loss is too high.
        """
        if not deviations or len(self.losses) < FEWEST:
            return None
        median = statistics.median(self.losses)
        spread = _DEVIATION * statistics.median(abs(earlier - median) for earlier in self.losses)
        least = LEAST_SPREAD * abs(median)
        return median if loss > median + deviations * max(spread, least) else None


class Incidents:
    """Looks at each step of a run. Its methods are called on every rank; the first rank writes and speaks.

    Args:
        engine: Runs the policy on the pairs in question once more.
        batches_of: This rank's micro-batches of some pairs.
        what_is_kept: Says what is left of the run if it ends now. Collective.
        first: Optimizer steps done before this process.
    """

    def __init__(
        self,
        output: Path,
        config: Config,
        engine: Engine,
        pairs: PreparedPairs,
        batches_of: Callable[[np.ndarray], list[Batch]],
        what_is_kept: Callable[[], str],
        *,
        first: int,
        ranks: Ranks,
    ) -> None:
        self.output, self.settings, self.engine, self.pairs = output, config.train, engine, pairs
        self.batches_of, self.what_is_kept = batches_of, what_is_kept
        self.history = on_first_rank(ranks, partial(history_of, output, first))
        names = (SAMPLES, SKIPPED, SPIKES) if ranks.is_first else ()
        self.journals = {name: Journal(output / name, first=first) for name in names}

    @property
    def refused(self) -> str | None:
        """The sentence about a line that the operating system refused; None so far, and on ranks that do not write."""
        return next((journal.refused for journal in self.journals.values() if journal.refused), None)

    def skip(self, step: int, what: str, picked: np.ndarray, batches: list[Batch]) -> dict[str, float]:
        """Count a step that is skipped, find the pairs that are the cause, and say so.

        Args:
            what: What is not finite, "loss" or "gradient".

        Returns:
            The metrics of the step.

        Raises:
            NonFiniteError: It is one too many.
        """
        self.history.skip()
        self._write(SAMPLES, step, {"pairs": self._ids(picked)})
        causes = self._causes(what, picked, batches)
        self._write(SKIPPED, step, {"what": what, "pairs": self._ids(picked), "causes": self._ids(causes)})
        because = f", because of {_few([self.pairs.name(pair) for pair in causes])}" if causes else ""
        if (before := self.history.in_a_row - 1) >= self.settings.max_skipped_steps:
            too = f", after {before} skipped in a row" if before else ""
            raise NonFiniteError(
                f"the {what} of step {step} ({self.pairs.names(picked)}) is not finite{because}{too}; "
                f"{self.what_is_kept()}."
            )
        self._say(f"step {step} is skipped: its {what} is not finite{because}; {self.history.skipped} skipped so far.")
        return self._counted()

    def look_for_leap(self, step: int, loss: float, batches: list[Batch]) -> None:
        """Write down the pairs of a step whose loss leaps, before the weights are updated."""
        median = self.history.leap(loss, self.settings.loss_spike_deviations)
        if median is None:
            return
        set_for_step(self.settings.seed, step)  # a loss that draws numbers draws the same as before
        losses = self.engine.losses_of_pairs(batches)
        ranked = sorted(losses, key=lambda pair: -losses[pair])
        each = [{"pair": self._id(pair), "loss": losses[pair]} for pair in ranked]
        self._write(SPIKES, step, {"loss": loss, "median": median, "pairs": each})
        worst = f"{self.pairs.name(ranked[0])} ({losses[ranked[0]]:.4g})"
        self._say(f"step {step}: the loss leaps to {loss:.4g} from {median:.4g}, most of all on {worst}; see {SPIKES}.")

    def done(self, step: int, loss: float, picked: np.ndarray) -> dict[str, float]:
        """Count a step that was done, and write down its pairs. Returns what the metrics say of the steps so far."""
        self.history.add(loss)
        self._write(SAMPLES, step, {"pairs": self._ids(picked), "loss": loss})
        return self._counted()

    def _counted(self) -> dict[str, float]:
        """The metric of skipped steps, once there is one."""
        return {"skipped_steps": float(self.history.skipped)} if self.history.skipped else {}

    def _causes(self, what: str, picked: np.ndarray, batches: list[Batch]) -> list[int]:
        """The pairs whose loss is not finite; else the pair whose gradient is not, if it is one alone."""
        if what == "loss":
            losses = self.engine.losses_of_pairs(batches)
            # A step that holds the end of an epoch may hold a pair twice.
            if causes := [pair for pair in dict.fromkeys(map(int, picked)) if not math.isfinite(losses[pair])]:
                return causes
        found = culprit(picked, self._is_bad)
        self.engine.zero_grad()
        return [] if found is None else [found]

    def _is_bad(self, picked: np.ndarray) -> bool:
        """Whether the loss or the gradient of some pairs is not finite."""
        self.engine.zero_grad()
        totals = self.engine.forward_backward(self.batches_of(picked))
        return not math.isfinite(self.engine.gradient_norm()) or not math.isfinite(totals["loss"])

    def _write(self, name: str, step: int, content: dict[str, Any]) -> None:
        if name in self.journals:
            self.journals[name].write(step, content)

    def _say(self, warning: str) -> None:
        if self.journals:
            tqdm.write(f"warning: {warning}")

    def _ids(self, pairs: Iterable[int]) -> list[int | str]:
        return [self._id(int(pair)) for pair in pairs]

    def _id(self, pair: int) -> int | str:
        """The row of a pair in its file, with the file where there are several."""
        return self.pairs.name(pair) if self.pairs.summary.parts else int(self.pairs.rows[pair])


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def history_of(output: Path, first: int) -> History:
    """What a run that is continued remembers after `first` steps, from its files. Called on one rank."""
    skipped = [step["iteration"] for step in _lines(output / SKIPPED, first)]
    history = History(len(skipped))
    while first - history.in_a_row in skipped and history.in_a_row < first:
        history.in_a_row += 1
    history.losses.extend(line["loss"] for line in _lines(output / SAMPLES, first) if "loss" in line)
    return history


def _lines(path: Path, first: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines_until(first, path)]


def culprit(pairs: np.ndarray, is_bad: Callable[[np.ndarray], bool]) -> int | None:
    """The pair that makes some pairs bad, found by halving them; None where only several together are bad.

    Args:
        is_bad: Whether some pairs are bad. It is asked about twice the binary logarithm of their number.
    """
    while len(pairs) > 1:
        halves = np.array_split(pairs, 2)
        pairs = next((half for half in halves if is_bad(half)), pairs[:0])
    return int(pairs[0]) if len(pairs) else None
