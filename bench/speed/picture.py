"""The speed benchmark's rows as a picture."""

from __future__ import annotations

from pathlib import Path

from bench.rows import Row


def draw(rows: list[Row], path: Path) -> None:
    """Above, how many times as long others take for our step; below, how much of each target is used up."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    steps = [(_in_two_lines(row.name), row.measured) for row in rows if _is_step(row) and row.measured]
    shown = [(row, row.measured, row.target) for row in rows if row.measured is not None and row.target]
    heights = [0.5 * len(steps) + 0.9, 0.3 * len(shown) + 0.9]
    figure, (above, below) = pyplot.subplots(2, figsize=(10, sum(heights)), height_ratios=heights, layout="constrained")
    above.barh(range(len(steps)), [times for _, times in steps], color="#2a6f97")
    above.set_yticks(range(len(steps)), [name for name, _ in steps], fontsize=8)
    above.axvline(1, color="black", linewidth=1)
    for place, (_, times) in enumerate(steps):
        above.text(times, place, f" {times:.2f}×", va="center", fontsize=9)
    above.set_title("CPU time of a whole step, ours = 1: the line", fontsize=10, loc="left")

    used = [measured / target if row.at_most else target / measured for row, measured, target in shown]
    below.barh(
        range(len(shown)), used, color=["#2a7f62" if row.verdict == "pass" else "#b3362b" for row, _, _ in shown]
    )
    below.axvline(1, color="black", linewidth=1)
    below.set_yticks(range(len(shown)), [row.name for row, _, _ in shown], fontsize=8)
    for place, (row, measured, target) in enumerate(shown):
        words = f" {measured:.3g} (target {'≤' if row.at_most else '≥'} {target:.3g})"
        below.text(max(1.0, used[place]), place, words, va="center", fontsize=7)
    below.set_xlim(0, 1.35 * max([1.0, *used]))
    below.set_title(
        "share of each target used up: the line is the target, left of it is better", fontsize=10, loc="left"
    )
    for axes in (above, below):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _is_step(row: Row) -> bool:
    """Whether a row tells how long someone else's step takes, in our steps."""
    return "step, CPU time:" in row.name and "against ours" in row.name


def _in_two_lines(name: str) -> str:
    return name.replace(": ", ":\n", 1)
