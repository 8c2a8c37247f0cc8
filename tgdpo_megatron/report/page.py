"""One HTML page about a run. Everything is inline, so the page opens anywhere and can be sent by mail.

The page takes plain data and does not depend on where the data comes from. It has a light and a dark look, and scrolls
in no direction but down: what is wider than a phone scrolls in a box of its own. Its look is in `look.css` and
`page.css` beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tgdpo_megatron.report import look
from tgdpo_megatron.report.plots import Bars, Chart, Token, chart_svg

_STYLE = Path(__file__).with_name("page.css")
_NO_WORDS = '<span class="soft">(no words)</span>'


@dataclass(frozen=True)
class Table:
    """Rows of numbers under a header. The first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Facts:
    """Names, each with a value in words, such as settings."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Curves:
    """Charts side by side, as many as fit; more of them where they are small."""

    charts: Sequence[Chart | Bars]
    small: bool = False


@dataclass(frozen=True)
class Commands:
    """Commands to copy, one after another. A line that begins with # says what the next is for."""

    lines: Sequence[str]


@dataclass(frozen=True)
class TokenPair:
    """A prompt and its two responses, token by token."""

    prompt: str
    chosen: Sequence[Token]
    rejected: Sequence[Token]
    name: str = ""


@dataclass(frozen=True)
class TokenPairs:
    """Pairs whose tokens are shaded by their rewards.

    Attributes:
        special: Texts of special tokens, which are set apart where prompts have them.
    """

    pairs: Sequence[TokenPair]
    special: Sequence[str] = ()


@dataclass(frozen=True)
class Answer:
    """What one model answered.

    Attributes:
        right: Whether the answer is the expected text. None where that is no measure of it.
    """

    model: str
    text: str
    right: bool | None = None


@dataclass(frozen=True)
class Sample:
    """A prompt, the expected answer, and what each model answered."""

    prompt: str
    expected: str
    answers: Sequence[Answer]
    special: Sequence[str] = ()
    """Texts of special tokens, which are set apart in the prompt."""


@dataclass(frozen=True)
class Side:
    """One of several texts that stand beside each other: its name, what is known of it in a few words, and itself."""

    name: str
    note: str
    text: str


@dataclass(frozen=True)
class SideBySide:
    """A prompt, and what several models answered, in columns."""

    prompt: str
    sides: Sequence[Side]
    special: Sequence[str] = ()
    """Texts of special tokens, which are set apart in the prompt."""


Part = str | Table | Facts | Curves | Commands | TokenPairs | Sample | SideBySide
"""A part of a section. A string is a paragraph."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it. A section without parts, or with empty ones only, is left out."""

    heading: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """A title, sentences on what was done and what came out of it, and everything else in sections."""

    title: str
    summary: Sequence[str]
    sections: Sequence[Section]


def build_page(page: Page) -> str:
    """Return the whole HTML document."""
    style = "".join(path.read_text(encoding="utf-8") for path in (look.CSS, _STYLE))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.title)}</title>\n<style>\n{style}</style></head>\n<body><main>\n"
        f'<h1>{escape(page.title)}</h1>\n<p class="summary">{escape(" ".join(page.summary))}</p>\n'
        + "\n".join(filter(None, map(_section, page.sections)))
        + "\n</main></body></html>\n"
    )


def reward_limit(pairs: Sequence[TokenPair]) -> float:
    """The reward shown in the strongest colour."""
    return look.strongest(token.reward for pair in pairs for token in (*pair.chosen, *pair.rejected))


def _section(section: Section) -> str:
    body = "".join(map(_part, section.parts))
    return f"<section><h2>{escape(section.heading)}</h2>\n{body}</section>" if body else ""


def _part(part: Part) -> str:
    match part:
        case str():
            return f"<p>{escape(part)}</p>" if part else ""
        case Table():
            return _table(part) if part.rows else ""
        case Facts():
            rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in part.rows)
            return f'<dl class="facts card">{rows}</dl>' if rows else ""
        case Curves():
            figures = "".join(_figure(chart, part.small) for chart in part.charts)
            return f'<div class="charts{" small" if part.small else ""}">{figures}</div>' if figures else ""
        case Commands():
            lines = "".join(map(_command, part.lines))
            return f'<pre class="card">{lines}</pre>' if lines else ""
        case TokenPairs():
            return _token_pairs(part) if part.pairs else ""
        case Sample():
            return _sample(part)
        case SideBySide():
            return _side_by_side(part)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = []
    for first, *others in table.rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        rows.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    # A box that scrolls must be reachable by keyboard.
    return (
        f'<div class="wide card" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def _figure(chart: Chart | Bars, small: bool) -> str:
    note = f"<figcaption>{escape(chart.note)}</figcaption>" if chart.note else ""
    return f'<figure class="card"><h3>{escape(chart.title)}</h3>{chart_svg(chart, small=small)}{note}</figure>'


def _command(line: str) -> str:
    if line.startswith("#"):
        return f'<span class="remark">{escape(line)}</span>'
    # A line ends between words, not at the hyphens of an option.
    words = " ".join(f"<span>{escape(word)}</span>" for word in line.split(" "))
    return f'<span class="command">{words}</span>'


def _token_pairs(part: TokenPairs) -> str:
    limit = reward_limit(part.pairs)
    return _legend(part.pairs, limit) + "".join(_token_pair(pair, part.special, limit) for pair in part.pairs)


def _prompt(prompt: str, special: Sequence[str]) -> str:
    return "".join(
        f'<span class="special">{escape(text)}</span>' if is_special else escape(text)
        for text, is_special in look.pieces(prompt, special)
    )


def _token_pair(pair: TokenPair, special: Sequence[str], limit: float) -> str:
    prompt = _prompt(pair.prompt, special)
    name = f'<div class="soft">{escape(pair.name)}</div>' if pair.name else ""
    sides = "".join(
        f'<div class="side"><div class="label">{words}</div><div class="tokens">{_tokens(tokens, limit)}</div></div>'
        for words, tokens in (("chosen", pair.chosen), ("rejected", pair.rejected))
    )
    return (
        f'<article class="pair card">{name}<div class="prompt" tabindex="0">{prompt}</div>'
        f'<div class="sides">{sides}</div></article>'
    )


def _tokens(tokens: Sequence[Token], limit: float) -> str:
    spans = []
    for token in tokens:
        kind = "token wrong" if token.wrong else "token"
        kind += " more" if token.reward > 0 else " less" if token.reward < 0 else ""
        title = _signed(token.reward) + (" (known to be wrong)" if token.wrong else "")
        shade = f"--s:{100 * look.strength(token.reward, limit):.0f}%"
        spans.append(f'<span class="{kind}" style="{shade}" title="{escape(title)}">{_visible(token.text)}</span>')
    return "".join(spans)


def _visible(text: str) -> str:
    """A token's text, with line ends and tabs that can be seen."""
    return escape(text).replace("\n", '<i class="glyph">⏎</i>\n').replace("\t", '<i class="glyph">⇥</i>\t')


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def _legend(pairs: Sequence[TokenPair], limit: float) -> str:
    ticks = "".join(f"<span>{_signed(part * limit)}</span>" for part in (-1, -0.5, 0, 0.5, 1))
    wrong = any(token.wrong for pair in pairs for token in (*pair.chosen, *pair.rejected))
    words = "Underlined: known to be wrong. " if wrong else ""
    return (
        f'<div class="legend"><div class="ramp"></div><div class="ticks">{ticks}</div>'
        f"<p>{words}Point at a token for its number.</p></div>"
    )


def _sample(sample: Sample) -> str:
    rows = [f"<div><dt>expected</dt><dd>{escape(sample.expected)}</dd></div>"]
    for answer in sample.answers:
        verdict = {True: "right", False: "wrong", None: ""}[answer.right]
        mark = f'<b class="{verdict}">{verdict}</b>' if verdict else ""
        text = escape(answer.text) or _NO_WORDS
        rows.append(f"<div><dt>{escape(answer.model)}</dt><dd>{text}{mark}</dd></div>")
    return (
        f'<article class="card"><div class="prompt" tabindex="0">{_prompt(sample.prompt, sample.special)}</div>'
        f'<dl class="facts">{"".join(rows)}</dl></article>'
    )


def _side_by_side(part: SideBySide) -> str:
    sides = "".join(
        f'<div class="side"><h3>{escape(side.name)}</h3><div class="soft">{escape(side.note)}</div>'
        f'<div class="answer" tabindex="0">{escape(side.text) or _NO_WORDS}</div></div>'
        for side in part.sides
    )
    return (
        f'<article class="pair card"><div class="prompt" tabindex="0">{_prompt(part.prompt, part.special)}</div>'
        f'<div class="sides many">{sides}</div></article>'
    )
