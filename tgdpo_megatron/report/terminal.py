"""What a training says on the terminal: what it is, held-out results as they come, and its result at the end."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tgdpo_megatron.config import Config, ScoresConfig
from tgdpo_megatron.report.words import plural


class Loudness(IntEnum):
    """How much a program says."""

    QUIET = 0
    """Warnings and the result."""
    NORMAL = 1
    VERBOSE = 2
    """Every setting, and every line of metrics, too."""


def changed_settings(config: Config) -> list[str]:
    """What differs from the defaults: a line for each group of settings."""
    lines = []
    # Without cached scores, `live` is the default filled in.
    usual_config = Config(scores=ScoresConfig(source=None if config.scores.cached else config.scores.source))
    for name in Config.model_fields:
        group, usual = getattr(config, name), getattr(usual_config, name)
        changed = [
            f"{field}={_value(getattr(group, field))}"
            for field in type(group).model_fields
            if getattr(group, field) != getattr(usual, field) and not _follows(group, field)
        ]
        if changed:
            lines.append(f"{name}: {', '.join(changed)}")
    return lines


def _follows(group: Any, field: str) -> bool:
    """Whether a setting was computed from another one that is shown."""
    source = {"train_iters": "num_epochs", "lr_warmup_iters": "lr_warmup_fraction"}.get(field)
    return source is not None and getattr(group, source) is not None


def _value(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_value(inner)}' for name, inner in value.items())}}}"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def length_of_run(config: Config, num_pairs: int) -> tuple[str, bool]:
    """How many steps and epochs a run has, and whether that is far from what pairs are usually trained for."""
    steps, batch = config.train.train_iters or 0, config.train.global_batch_size
    epochs = steps * batch / num_pairs
    words = (
        f"{plural(steps, 'step')} of {plural(batch, 'pair')}: {epochs:.3g} "
        f"epoch{'' if epochs == 1 else 's'} of {plural(num_pairs, 'pair')}"
    )
    by_steps = config.train.num_epochs is None  # epochs that were given are meant
    return words, by_steps and not 0.5 <= epochs <= 5


_ROUNDING = 1e-5
"""What rounding may leave of the mean reward of responses."""


def all_tie(metrics: Mapping[str, float], prefix: str = "") -> bool:
    """Whether the two responses of every pair have the same reward, as where the policy still is its reference.

    `rewards/accuracies` then says nothing: a tie is no win, and the sign of what rounding leaves is chance. It leaves
    something where the reference was scored at another layout.

    Args:
        prefix: `eval/` for held-out pairs.
    """
    of = {name: metrics.get(f"{prefix}rewards/{name}", math.inf) for name in ("margins", "chosen", "rejected")}
    if not metrics.get(f"{prefix}rewards/accuracies", 1.0):
        return abs(of["margins"]) < _ROUNDING  # where no margin is above 0 and their mean is 0, all are
    return all(abs(reward) < _ROUNDING for reward in of.values())


def result_words(metrics: Mapping[str, float], prefix: str = "") -> str:
    """Loss, accuracy and margin of pairs in a few words; before the first step the rewards of all pairs are equal."""
    words = [f"loss {metrics[f'{prefix}loss']:.4g}"]
    if (accuracy := metrics.get(f"{prefix}rewards/accuracies")) is not None:
        margin = metrics[f"{prefix}rewards/margins"]
        equal = all_tie(metrics, prefix)
        words += (
            ["chosen and rejected rewards equal"] if equal else [f"accuracy {accuracy:.1%}", f"margin {margin:.4g}"]
        )
    return ", ".join(words)


def progress_words(metrics: Mapping[str, float]) -> str:
    """What stands beside the progress bar: the result of the last step that was logged, and the speed."""
    return f"{result_words(metrics)}, {metrics['perf/tokens_per_second']:,.0f} tokens/s"


def closing_lines(
    *,
    steps: int,
    finished: bool,
    seconds: float,
    went: str,
    held_out: Sequence[Mapping[str, float]],
    held_out_pairs: int,
    checkpoint: Path,
    exported: Path | None,
    report: Path | None,
    best: Path | None = None,
) -> list[str]:
    """The result of a run, and what to do with it. One that is stopped goes on, and is not exported yet.

    Args:
        steps: Steps that were done now.
        finished: Whether they were all.
        seconds: How long they took, with evaluations and checkpoints.
        went: What the time was spent on.
        held_out: The lines of metrics with held-out results, in order.
        held_out_pairs: Number of pairs behind them.
        best: The checkpoint that train.keep_best keeps; None without.
        exported: The HuggingFace model of the checkpoint, where it was written.
        report: report.html, where it was written.
    """
    spent = (
        f"{seconds / 3600:.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.1f} min"
        if seconds >= 60
        else f"{seconds:.0f} s"
    )
    lines = [f"{'done' if finished else 'stopped'}: {plural(steps, 'step')} in {spent}", f"time        {went}"]
    if held_out:
        first, last = held_out[0], held_out[-1]
        before = f"{result_words(first, 'eval/')} (step {first['iteration']:.0f})  →  " if len(held_out) > 1 else ""
        worse = "; worse than before" if last["eval/loss"] > first["eval/loss"] else ""
        after = f"{result_words(last, 'eval/')} (step {last['iteration']:.0f})"
        lines.append(f"held out    {before}{after}, {plural(held_out_pairs, 'pair')}{worse}")
    lines.append(f"checkpoint  {checkpoint}")
    if best is not None:
        lines.append(f"best        {best}")
    if report is not None:
        lines.append(f"report      {report}")
    if exported is not None:
        return [*lines, f"exported    {exported}"]
    if not finished:
        return lines
    export = ["python", "-m", "tools.convert_megatron_to_hf", str(checkpoint), str(checkpoint.parent.parent / "hf")]
    return [*lines, f"export      {shlex.join(export)}"]


def held_out_results(output: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics that hold held-out results."""
    from tgdpo_megatron.report.run_files import read_metrics  # what it loads, a command line does not need

    return [metrics for metrics in read_metrics(output) if "eval/loss" in metrics]
