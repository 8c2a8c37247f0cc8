"""Pictures for reports: line charts, bars and coloured tokens, as SVG text without external resources.

Figures are made without pyplot, whose global state would be shared by all reports of a process.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any common colour vision deficiency can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_BLUE, _ORANGE = (86, 160, 214), (240, 150, 70)
_FEW = 6
"""A chart with more lines than this has its legend below the axes."""
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "tgdpo"}


@dataclass(frozen=True)
class Line:
    """One curve. Held-out curves are thick and marked at each measurement; training curves beside them are thin."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    held_out: bool = False
    colour: int = 0
    """Lines of one model share a number. Lines with a number of 7 or more are dashed."""


@dataclass(frozen=True)
class Chart:
    """Curves over one pair of axes; the labels name the units."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Series:
    """One bar of every group: its length, and the spread that its whisker shows (nan for no whisker)."""

    name: str
    values: Sequence[float]
    spreads: Sequence[float]


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, one group for each name. The label names the unit."""

    title: str
    x_label: str
    names: Sequence[str]
    series: Sequence[Series]
    mark: float = 0.0
    """Where a vertical line stands, for comparison."""


@dataclass(frozen=True)
class Token:
    """A token's text, its reward (nats times β_r), and whether it is known to be wrong."""

    text: str
    reward: float
    wrong: bool = False


def chart_svg(chart: Chart | Bars) -> str:
    """One chart as an `<svg>` element."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, _height(chart)), layout="constrained")
        _draw(figure.subplots(), chart)
        return _svg(figure)


def grid_svg(charts: Sequence[Chart | Bars], columns: int) -> str:
    """Charts row by row, as one `<svg>` element."""
    rows = [charts[first : first + columns] for first in range(0, len(charts), columns)]
    heights = [max(map(_height, row)) for row in rows]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6 * columns, sum(heights)), layout="constrained")
        # Each chart is a subfigure, so that long names in one chart take no room from the charts above it.
        grid = figure.subfigures(len(rows), columns, squeeze=False, height_ratios=heights)
        for line, row in enumerate(rows):
            for place, chart in enumerate(row):
                _draw(grid[line][place].subplots(), chart)
        return _svg(figure)


def figure_svg(charts: Sequence[Chart], rows: Sequence[tuple[str, Sequence[Token]]], limit: float, caption: str) -> str:
    """Charts side by side over rows of coloured tokens, as an `<svg>` element.

    Args:
        rows: A label and the tokens of each row.
        limit: Reward that is shown in the strongest colour.
        caption: Text over the rows.
    """
    with matplotlib.rc_context(_STYLE):
        height = 2.9 + 0.35 * (len(rows) + 1)
        figure = Figure(figsize=(4.2 * len(charts), height), layout="constrained")
        grid = figure.add_gridspec(2, len(charts), height_ratios=[2.9, 0.35 * (len(rows) + 1)])
        for place, chart in enumerate(charts):
            _draw(figure.add_subplot(grid[0, place]), chart)
        _draw_rows(figure.add_subplot(grid[1, :]), rows, limit, caption)
        return _svg(figure)


def reward_colour(reward: float, limit: float) -> str:
    """Blue for positive, orange for negative rewards, white at 0; strongest from ±limit on."""
    strength = min(1.0, abs(reward) / limit) if limit > 0 else 0.0
    end = _BLUE if reward > 0 else _ORANGE
    return "#" + "".join(f"{round(255 + strength * (channel - 255)):02x}" for channel in end)


def _height(chart: Chart | Bars) -> float:
    """Height in inches, enough for every name in the legend or beside the bars."""
    if isinstance(chart, Bars):
        return 1.1 + len(chart.names) * (0.1 + 0.1 * len(chart.series))
    return 3.0 if len(chart.lines) <= _FEW else 2.6 + 0.15 * len(chart.lines)


def _draw(axes: Any, chart: Chart | Bars) -> None:
    below = isinstance(chart, Bars) and len(chart.series) > 1  # the legend stands between title and axes
    axes.set_title(chart.title, fontsize=10, loc="left", pad=16 if below else None)
    axes.set_xlabel(chart.x_label)
    if isinstance(chart, Bars):
        _draw_bars(axes, chart)
    else:
        _draw_lines(axes, chart)


def _draw_bars(axes: Any, chart: Bars) -> None:
    thickness = 0.8 / len(chart.series)
    for place, series in enumerate(chart.series):
        heights = [line + (place + 0.5) * thickness - 0.4 for line in range(len(chart.names))]
        whiskers = [0.0 if spread != spread else spread for spread in series.spreads]
        colour = _COLOURS[place % len(_COLOURS)]
        axes.barh(heights, series.values, thickness, xerr=whiskers, color=colour, label=series.name, ecolor="#555555")
    axes.axvline(chart.mark, color="black", linewidth=0.8)
    names = [textwrap.fill(name, 23) for name in chart.names]
    axes.set_yticks(range(len(names)), names, fontsize=7.5)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.25, linewidth=0.5)
    if len(chart.series) > 1:
        axes.legend(frameon=False, fontsize=6.5, ncols=len(chart.series), loc="lower right", bbox_to_anchor=(1.0, 0.99))


def _draw_lines(axes: Any, chart: Chart) -> None:
    beside = any(line.held_out for line in chart.lines)
    for line in chart.lines:
        style: dict[str, Any] = {"linewidth": 2.0, "marker": "o", "markersize": 3.5} if line.held_out else {}
        style = style or ({"linewidth": 0.8, "alpha": 0.55} if beside else {"linewidth": 1.3})
        if line.colour >= len(_COLOURS):
            style["linestyle"] = "--"
        axes.plot(line.x, line.y, color=_COLOURS[line.colour % len(_COLOURS)], label=line.name, **style)
    axes.set_ylabel(chart.y_label)
    axes.grid(alpha=0.25, linewidth=0.5)
    if len(chart.lines) > _FEW:  # inside the axes, the legend would hide the curves
        axes.legend(frameon=False, fontsize=6.5, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.17))
    elif len(chart.lines) > 1:
        axes.legend(frameon=False, fontsize=8)


def _draw_rows(axes: Any, rows: Sequence[tuple[str, Sequence[Token]]], limit: float, caption: str) -> None:
    """Tokens as coloured boxes in a fixed-width font. A character is one unit of the x-axis wide."""
    from matplotlib.patches import Rectangle

    margin = max((len(label) for label, _ in rows), default=0) + 2
    length = max((sum(len(token.text) for token in tokens) for _, tokens in rows), default=1)
    axes.set_title(caption, fontsize=10, loc="left")
    for line, (label, tokens) in enumerate(rows):
        axes.text(0, -line - 0.5, label, va="center")
        x = float(margin)
        for token in tokens:
            width = len(token.text)
            colour = reward_colour(token.reward, limit)
            axes.add_patch(Rectangle((x, -line - 0.9), width, 0.8, facecolor=colour, edgecolor="white", linewidth=0.5))
            axes.text(x + width / 2, -line - 0.5, token.text, ha="center", va="center", family="monospace")
            if token.wrong:
                axes.plot([x + 0.1, x + width - 0.1], [-line - 0.86] * 2, color="black", linewidth=1.2)
            x += width
    axes.set_xlim(0, margin + length)
    axes.set_ylim(-max(1, len(rows)), 0)
    axes.axis("off")


def _svg(figure: Any) -> str:
    """The `<svg>` element of a figure, without XML prologue, document type and metadata that names other sites."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    return text[text.index("<svg") :]
