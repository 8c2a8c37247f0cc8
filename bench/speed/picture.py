"""The speed benchmark's rows as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from bench.rows import Row

GOOD, BAD, OTHERS = "#2a7f62", "#b3362b", "#2a6f97"


def draw(rows: list[Row], path: Path) -> None:
    """Above, how many times as long others take for our step; below, how much of each target is used up."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    steps = [(row, row.measured) for row in rows if _is_step(row) and row.measured]
    shown = [(row, row.measured, row.target) for row in rows if row.measured is not None and row.target]
    heights = [0.45 * len(steps) + 1.2, 0.45 * len(shown) + 1.2]
    figure, (above, below) = pyplot.subplots(2, figsize=(9, sum(heights)), height_ratios=heights, layout="constrained")
    _bars(above, [row.name for row, _ in steps], [times for _, times in steps], [OTHERS] * len(steps))
    for place, (_, times) in enumerate(steps):
        above.text(times, place, f" {times:.2f}×", va="center", fontsize=9)
    above.set_title("CPU time of a whole step\nthe line is ours", fontsize=10, loc="left")

    used = [measured / target if row.at_most else target / measured for row, measured, target in shown]
    colours = [GOOD if row.verdict == "pass" else BAD for row, _, _ in shown]
    _bars(below, [row.name for row, _, _ in shown], used, colours)
    for place, (row, measured, target) in enumerate(shown):
        words = f" {measured:.3g} (target {'≤' if row.at_most else '≥'} {target:.3g})"
        below.text(max(1.0, used[place]), place, words, va="center", fontsize=8)
    below.set_xlim(0, 1.5 * max([1.0, *used]))
    below.set_title(
        "How much of each target is used up\nthe line is the target, left of it is better", fontsize=10, loc="left"
    )
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _bars(axes: Any, names: Sequence[str], lengths: Sequence[float], colours: Sequence[str]) -> None:
    """Named bars from top to bottom, and a line at 1."""
    axes.barh(range(len(names)), lengths, color=colours)
    axes.set_yticks(range(len(names)), [fill(name, 62, break_on_hyphens=False) for name in names], fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def _is_step(row: Row) -> bool:
    """Whether a row tells how long someone else's step takes, in our steps."""
    return "step, CPU time:" in row.name and "against ours" in row.name
