"""Pictures for reports: line charts and coloured tokens, as SVG text without external resources.

Figures are made object by object: pyplot's global state would leak between reports of one process.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart with any common colour vision deficiency.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
_BLUE, _ORANGE = (86, 160, 214), (240, 150, 70)
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "tgdpo"}


@dataclass(frozen=True)
class Line:
    """One curve. Training curves are thin, held-out ones thick and with a marker at each measurement."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    held_out: bool = False
    colour: int = 0
    """Lines of one model share a number."""


@dataclass(frozen=True)
class Chart:
    """Curves over one pair of axes; the labels name the units."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Token:
    """A token's text, its reward (nats times β_r), and whether it is known to be wrong."""

    text: str
    reward: float
    wrong: bool = False


def chart_svg(chart: Chart) -> str:
    """One chart as an `<svg>` element."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 3.0), layout="constrained")
        _draw(figure.subplots(), chart)
        return _svg(figure)


def figure_svg(charts: Sequence[Chart], rows: Sequence[tuple[str, Sequence[Token]]], limit: float, caption: str) -> str:
    """Charts side by side over rows of coloured tokens, as an `<svg>` element.

    Args:
        rows: A label and the tokens of each row.
        limit: Reward shown in the strongest colour.
        caption: Stands over the rows.
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


def _draw(axes: Any, chart: Chart) -> None:
    for line in chart.lines:
        style: dict[str, Any] = {"linewidth": 2.0, "marker": "o", "markersize": 3.5} if line.held_out else {}
        style = style or {"linewidth": 0.8, "alpha": 0.55}
        axes.plot(line.x, line.y, color=_COLOURS[line.colour % len(_COLOURS)], label=line.name, **style)
    axes.set_title(chart.title, fontsize=10, loc="left")
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(alpha=0.25, linewidth=0.5)
    if len(chart.lines) > 1:
        axes.legend(frameon=False, fontsize=8)


def _draw_rows(axes: Any, rows: Sequence[tuple[str, Sequence[Token]]], limit: float, caption: str) -> None:
    """Tokens as coloured boxes in a fixed-width font, one data unit a character."""
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
    """The figure's `<svg>` element alone: no XML prologue, no document type, no metadata that names other sites."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    return text[text.index("<svg") :]
