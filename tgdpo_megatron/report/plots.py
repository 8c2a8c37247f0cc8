"""Pictures for reports: line charts, bars and coloured tokens, as SVG text without external resources.

Figures are made without pyplot, whose global state would be shared by all reports of a process.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tgdpo_megatron.report.look import reward_colour

# Okabe and Ito's colours, which people with any common colour vision deficiency can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")
_FEW = 6
"""A chart with more lines than this has its legend below the axes."""
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "svg.hashsalt": "tgdpo",
}

_INK, _SOFT, _LINE, _CARD = "#1a1c20", "#59616c", "#e0e3e8", "#fffffe"
"""Colours that stand for those of a page, see `_themed`."""
_PAGE_STYLE = _STYLE | {
    "svg.fonttype": "none",  # letters stay letters: they take the page's font, and can be searched and copied
    "text.color": _INK,
    "axes.labelcolor": _SOFT,
    "axes.edgecolor": _SOFT,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "grid.color": _LINE,
    "grid.alpha": 1.0,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
}
_OF_THE_PAGE = {
    **{_INK: "--ink", _SOFT: "--soft", _LINE: "--line", _CARD: "--card"},
    **{colour: f"--line-{place}" for place, colour in enumerate(_COLOURS)},
}
"""Colour in a picture -> the variable of look.css that stands in its place on a page."""


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
class Mark:
    """A point beside the curves that a word explains."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Curves over one pair of axes; the labels name the units.

    Attributes:
        shares: Whether y is a share of something: drawn from 0 to 100 %, with a line at one half.
        note: What stands under the chart on a page.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    shares: bool = False
    note: str = ""


@dataclass(frozen=True)
class Series:
    """One bar of every group: its length, and the spread that its whisker shows (nan for no whisker). Where the sides
    of the whisker differ, the spread is how far it reaches below and above."""

    name: str
    values: Sequence[float]
    spreads: Sequence[float | tuple[float, float]]


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, one group for each name. The label names the unit."""

    title: str
    x_label: str
    names: Sequence[str]
    series: Sequence[Series]
    mark: float = 0.0
    """Where a vertical line stands, for comparison."""
    note: str = ""
    """What stands under the bars on a page."""


@dataclass(frozen=True)
class Token:
    """A token's text, its reward (nats times β_r), and whether it is known to be wrong."""

    text: str
    reward: float
    wrong: bool = False


def chart_svg(chart: Chart | Bars, *, small: bool = False) -> str:
    """One chart as an `<svg>` element for a page with `look.css`, in whose colours it is. The page gives the title."""
    width, height = (3.3, 2.4) if small else (4.2, _height(chart))  # inches of text that is 9 points high
    with matplotlib.rc_context(_PAGE_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        _draw(figure.subplots(), chart, title="")
        return _themed(_svg(figure), chart.title)


def _themed(svg: str, title: str) -> str:
    """The picture with variables of the page in place of its colours, and a name for who cannot see it."""
    for colour, variable in _OF_THE_PAGE.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


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
                _draw(grid[line][place].subplots(), chart, chart.title)
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
            _draw(figure.add_subplot(grid[0, place]), chart, chart.title)
        _draw_rows(figure.add_subplot(grid[1, :]), rows, limit, caption)
        return _svg(figure)


def _height(chart: Chart | Bars) -> float:
    """Height in inches, enough for every name in the legend or beside the bars."""
    if isinstance(chart, Bars):
        return 1.1 + len(chart.names) * (0.1 + 0.1 * len(chart.series))
    return 3.0 if len(chart.lines) <= _FEW else 2.6 + 0.15 * len(chart.lines)


def _draw(axes: Any, chart: Chart | Bars, title: str) -> None:
    below = isinstance(chart, Bars) and len(chart.series) > 1  # the legend stands between title and axes
    if title:
        axes.set_title(title, fontsize=10, loc="left", pad=16 if below else None)
    axes.set_xlabel(chart.x_label)
    if isinstance(chart, Bars):
        _draw_bars(axes, chart)
    else:
        _draw_lines(axes, chart)
        _draw_legend(axes, chart, above=not title)


def _draw_bars(axes: Any, chart: Bars) -> None:
    thickness = 0.8 / len(chart.series)
    for place, series in enumerate(chart.series):
        heights = [line + (place + 0.5) * thickness - 0.4 for line in range(len(chart.names))]
        sides = [spread if isinstance(spread, tuple) else (spread, spread) for spread in series.spreads]
        whiskers = [[0.0 if side != side else side for side in all_of_one] for all_of_one in zip(*sides, strict=True)]
        colour = _COLOURS[place % len(_COLOURS)]
        axes.barh(heights, series.values, thickness, xerr=whiskers, color=colour, label=series.name, ecolor="#555555")
    axes.axvline(chart.mark, color="black", linewidth=0.8)
    names = [textwrap.fill(name, 23) for name in chart.names]
    axes.set_yticks(range(len(names)), names, fontsize=7.5)
    axes.invert_yaxis()
    axes.grid(axis="x")
    if len(chart.series) > 1:
        axes.legend(frameon=False, fontsize=6.5, ncols=len(chart.series), loc="lower right", bbox_to_anchor=(1.0, 0.99))


def _draw_lines(axes: Any, chart: Chart) -> None:
    beside = any(line.held_out for line in chart.lines)
    power = _power(chart)
    for line in chart.lines:
        style: dict[str, Any] = {"linewidth": 2.0, "marker": "o", "markersize": 3.5} if line.held_out else {}
        style = style or ({"linewidth": 0.8, "alpha": 0.55} if beside else {"linewidth": 1.3})
        if line.colour >= len(_COLOURS):
            style["linestyle"] = "--"
        if len(line.x) == 1 and not line.held_out:
            style |= {"marker": ".", "alpha": 1.0}  # a line needs two points
        axes.plot(
            line.x,
            [y / 10.0**power for y in line.y],
            color=_COLOURS[line.colour % len(_COLOURS)],
            label=line.name,
            **style,
        )
    for mark in chart.marks:
        axes.plot([mark.x], [mark.y], "o", markersize=4, color=_SOFT, markerfacecolor=_CARD, clip_on=False, zorder=3)
        axes.annotate(mark.text, (mark.x, mark.y), (-3, 5), textcoords="offset points", fontsize=8, color=_SOFT)
    axes.set_ylabel(f"{chart.y_label}, 10{str(power).translate(_RAISED)}".lstrip(", ") if power else chart.y_label)
    axes.grid()
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    if chart.shares:
        axes.set_ylim(-0.02, 1.02)
        axes.axhline(0.5, color=_SOFT, linewidth=0.8, linestyle=":")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))


def _draw_legend(axes: Any, chart: Chart, *, above: bool) -> None:
    """The legend: above the axes, or where it hides least; for many lines below, where it hides nothing."""
    if len(chart.lines) > _FEW:
        axes.legend(frameon=False, fontsize=6.5, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.17))
    elif above and len(chart.lines) > 1:
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.2}
        axes.legend(frameon=False, fontsize=8, ncols=2, **place)
    elif len(chart.lines) > 1:
        axes.legend(frameon=False, fontsize=8)


def _power(chart: Chart) -> int:
    """The power of ten that the label has instead of the numbers: 0 but for very small and very large ones."""
    largest = max((abs(y) for line in chart.lines for y in line.y), default=0.0)
    power = math.floor(math.log10(largest)) if largest > 0 else 0
    return power if power < -3 or power > 5 else 0


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


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
