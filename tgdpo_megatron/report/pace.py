"""How fast a training goes, and where its time goes: the metrics that begin with `perf/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tgdpo_megatron.config import Config
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.shared_prompts import tokens_read_by_side
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.flops import TRAINING, forward_operations
from tgdpo_megatron.platform.clock import ACTIVITIES, OTHER, WAITING, Spent
from tgdpo_megatron.platform.peaks import peak_of

SHARE, SECONDS = "perf/share_", "perf/seconds"


class Pace:
    """The speed of a run's steps, and the shares of its time since its last line of metrics.

    Args:
        ranks: Number of processes.
        gpu: Name of the GPU that each of them has; None on CPUs.
    """

    def __init__(
        self, config: Config, description: ModelDescription, data: PreparedPairs, *, ranks: int, gpu: str | None
    ) -> None:
        self._description, self._ranks = description, ranks
        self._frozen = len(config.live_models)
        self._data, self._sides = data, config.loss.method.sides
        self._shares_prompts = config.train.shared_prompts
        self._peak = (
            peak_of(gpu, fp8=config.train.fp8 is not None) if gpu and config.train.precision == "bf16" else None
        )
        self._before = Spent.nothing(ranks)

    def of_step(self, picked: np.ndarray, seconds: float) -> dict[str, float]:
        """Metrics of one optimizer step.

        Args:
            picked: Its pairs, over all ranks. [n] int64.
            seconds: Wall-clock time that it took.
        """
        lengths, labels, prefixes = self._counts(picked)
        rate = forward_operations(self._description, lengths, labels, prefixes) / (seconds * self._ranks)
        metrics = {
            "perf/seconds_per_step": seconds,
            "perf/tokens_per_second": float(lengths.sum()) / seconds,
            "perf/tflops_per_rank": TRAINING * rate / 1e12,
        }
        if self._frozen:
            metrics["perf/frozen_tflops_per_rank"] = self._frozen * rate / 1e12
        if self._peak is not None:
            metrics["perf/mfu"] = (TRAINING + self._frozen) * rate / self._peak
        return metrics

    def _counts(self, picked: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
        """Of some pairs the tokens that the model reads, the labels, and the shared prompts that are not read again.

        Returns:
            [n, sides], a number, and [n, sides].
        """
        fed, prefixes = tokens_read_by_side(self._data, picked, self._sides, shared_prompts=self._shares_prompts)
        labels = int((fed + prefixes + 1 - self._data.prompt_lengths[picked, None]).sum())
        return fed, labels, prefixes

    def since_last_line(self, spent: Spent | None) -> dict[str, float]:
        """How the time since the last call divides into activities.

        Args:
            spent: Where the time of all ranks went since the start.
        """
        if spent is None:
            return {}
        seconds = {activity: spent.seconds[activity] - self._before.seconds[activity] for activity in ACTIVITIES}
        longest_wait = max(now - before for now, before in zip(spent.waiting, self._before.waiting, strict=True))
        self._before = spent
        if not (whole := sum(seconds.values())):
            return {}
        shares = {f"{SHARE}{activity}": part / whole for activity, part in seconds.items()}
        return {SECONDS: whole, **shares, f"{SHARE}{WAITING}_max": longest_wait / whole}


def total_shares(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Activity -> its share of the time that some lines of metrics cover. Empty where they say nothing of it."""
    known = [line for line in lines if SECONDS in line]
    whole = sum(line[SECONDS] for line in known)
    return {
        activity: sum(line[SECONDS] * line[f"{SHARE}{activity}"] for line in known) / whole
        for activity in (ACTIVITIES if known else ())
    }


def where_time_went(spent: Spent) -> str:
    """The shares of a run's time in words, the largest first. What takes less than half a percent is other work."""
    whole = sum(spent.seconds.values())
    shares = {activity: seconds / whole for activity, seconds in spent.seconds.items()}
    named = {activity: share for activity, share in shares.items() if activity != OTHER and share >= 0.005}
    words = [f"{share:.0%} {_words(activity, spent, whole)}" for activity, share in _sorted(named)]
    rest = 1 - sum(named.values())
    return ", ".join([*words, f"{rest:.0%} {ACTIVITIES[OTHER]}"] if rest >= 0.005 else words)


def _words(activity: str, spent: Spent, whole: float) -> str:
    words = ACTIVITIES[activity]
    return f"{words} (at most {max(spent.waiting) / whole:.0%} on one)" if activity == WAITING else words


def _sorted(shares: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(shares.items(), key=lambda item: -item[1])
