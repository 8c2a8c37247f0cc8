"""One HTML page about a run. Everything is inline, so the page opens anywhere and can be sent by mail.

The page takes plain data and does not depend on where the data comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tgdpo_megatron.report.plots import Bars, Chart, Token, chart_svg, reward_colour


@dataclass(frozen=True)
class Table:
    """Rows of text under a header. The first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class TokenPair:
    """A prompt and its two responses, token by token."""

    prompt: str
    chosen: Sequence[Token]
    rejected: Sequence[Token]


@dataclass(frozen=True)
class Answer:
    """What one model answered, and whether the answer is the expected text."""

    model: str
    text: str
    right: bool


@dataclass(frozen=True)
class Sample:
    """A prompt, the expected answer, and what each model answered."""

    prompt: str
    expected: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Page:
    """Everything that the page shows, in this order. Empty parts are left out."""

    title: str
    summary: Sequence[str]
    """Sentences on what was done and what came out of it."""
    tables: Sequence[tuple[str, Table]] = ()
    """Heading and table."""
    charts: Sequence[Chart | Bars] = ()
    token_pairs: Sequence[TokenPair] = ()
    token_notes: Sequence[str] = ()
    """Sentences about the coloured tokens."""
    samples: Sequence[Sample] = ()
    data_notes: Sequence[str] = ()
    """Sentences on the data: what was read, how many rows were dropped and why."""
    commands: Sequence[str] = ()
    settings: Sequence[tuple[str, str]] = ()
    """Name and value: versions, seeds, sizes."""


def build_page(page: Page) -> str:
    """Return the whole HTML document."""
    sections = [
        f"<h1>{escape(page.title)}</h1>",
        f'<p class="summary">{escape(" ".join(page.summary))}</p>',
        *(f"<h2>{escape(heading)}</h2>{_table(table)}" for heading, table in page.tables),
        _section("Curves", _charts(page.charts)),
        _section("What the guidance says, token by token", _tokens(page.token_pairs, page.token_notes)),
        _section("Answers to held-out prompts", "".join(map(_sample, page.samples))),
        _section("Data", _paragraphs(page.data_notes)),
        _section("Commands", f"<pre>{escape(chr(10).join(page.commands))}</pre>" if page.commands else ""),
        _section("Versions and settings", _settings(page.settings)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def reward_limit(pairs: Sequence[TokenPair]) -> float:
    """The reward shown in the strongest colour: the largest magnitude among the pairs."""
    return max((abs(token.reward) for pair in pairs for token in (*pair.chosen, *pair.rejected)), default=0.0)


def _section(heading: str, body: str) -> str:
    return f"<h2>{escape(heading)}</h2>\n{body}" if body else ""


def _paragraphs(sentences: Sequence[str]) -> str:
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = []
    for first, *others in table.rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        rows.append(f"<tr><th>{escape(first)}</th>{cells}</tr>")
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{note}'


def _settings(settings: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in settings)
    return f'<table class="text"><tbody>{rows}</tbody></table>' if rows else ""


def _charts(charts: Sequence[Chart | Bars]) -> str:
    figures = "".join(f"<figure>{chart_svg(chart)}</figure>" for chart in charts)
    return f'<div class="charts">{figures}</div>' if figures else ""


def _tokens(pairs: Sequence[TokenPair], notes: Sequence[str]) -> str:
    if not pairs:
        return ""
    limit = reward_limit(pairs)
    rows = "".join(
        f'<p class="prompt">{escape(pair.prompt)}</p><div class="sides">'
        f'<div><span class="side">chosen</span>{_coloured(pair.chosen, limit)}</div>'
        f'<div><span class="side">rejected</span>{_coloured(pair.rejected, limit)}</div></div>'
        for pair in pairs
    )
    return _paragraphs(notes) + _legend(limit) + rows


def _coloured(tokens: Sequence[Token], limit: float) -> str:
    spans = []
    for token in tokens:
        kind = "token wrong" if token.wrong else "token"
        colour = reward_colour(token.reward, limit)
        title = f"{token.reward:+.3f}" + (" (known to be wrong)" if token.wrong else "")
        spans.append(
            f'<span class="{kind}" style="background:{colour}" title="{escape(title)}">{escape(token.text)}</span>'
        )
    return "".join(spans)


def _legend(limit: float) -> str:
    steps = [limit * place / 4 for place in range(-4, 5)]
    swatches = "".join(
        f'<span class="swatch" style="background:{reward_colour(step, limit)}">{step:+.2f}</span>' for step in steps
    )
    words = "less likely under the guidance", "more likely; underlined: known to be wrong; hover for the number"
    return f'<p class="legend">{words[0]} {swatches} {words[1]}</p>'


def _sample(sample: Sample) -> str:
    rows = [f"<tr><th>expected</th><td>{escape(sample.expected)}</td><td></td></tr>"]
    for answer in sample.answers:
        verdict = "right" if answer.right else "wrong"
        rows.append(
            f'<tr class="{verdict}"><th>{escape(answer.model)}</th><td>{escape(answer.text)}</td>'
            f"<td>{verdict}</td></tr>"
        )
    table = f'<table class="text sample"><tbody>{"".join(rows)}</tbody></table>'
    return f'<p class="prompt">{escape(sample.prompt)}</p>{table}'


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 66rem; margin: 2rem auto;
       padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .4rem; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
.summary { font-size: 1.08rem; max-width: 52rem; }
.note, .legend { color: #555; font-size: .88rem; max-width: 52rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: right; padding: .25rem .8rem; border-bottom: 1px solid #e5e5e5;
         font-variant-numeric: tabular-nums; }
thead th { border-bottom: 2px solid #999; vertical-align: bottom; }
th:first-child { text-align: left; font-weight: 600; }
.text th, .text td { text-align: left; vertical-align: top; }
.sample .right td:last-child { color: #00618f; }
.sample .wrong td:last-child { color: #a84800; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; }
.prompt { font-weight: 600; margin: 1.1rem 0 .3rem; }
.sides { line-height: 1.9; }
.side { display: inline-block; width: 4.6rem; color: #555; font-size: .85rem; }
.token, .swatch { font-family: ui-monospace, monospace; font-size: .9rem; white-space: pre; padding: .12rem 0;
                  border-right: 1px solid #fff; }
.wrong.token { text-decoration: underline; text-decoration-thickness: 2px; text-underline-offset: 3px; }
.swatch { padding: .12rem .4rem; font-size: .78rem; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .82rem; white-space: pre-wrap; }
"""
