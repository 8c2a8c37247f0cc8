"""The HTML report: self-contained, safe with any text, and showing the numbers it was given."""

import math
import re
from html.parser import HTMLParser

import pytest

from tgdpo_megatron.report.page import Answer, Page, Sample, Table, TokenPair, build_page
from tgdpo_megatron.report.plots import Bars, Chart, Line, Series, Token, chart_svg, figure_svg, grid_svg, reward_colour

HOSTILE = "<script>alert('a & b')</script>"


@pytest.fixture(scope="module")
def html() -> str:
    line = Line("held out", [1, 2, 3], [0.7, 0.5, 0.4], held_out=True)
    pair = TokenPair(HOSTILE, [Token("42", 0.25)], [Token("43", -1.5, wrong=True), Token(HOSTILE, 0.0)])
    return build_page(
        Page(
            title=HOSTILE,
            summary=["Something was done.", "It went well & quickly."],
            tables=[("Before and after", Table(("model", "exact match"), [["after", "87.5%"]], note=HOSTILE))],
            charts=[
                Chart(HOSTILE, "optimizer step", "loss (nats)", [line]),
                Bars(HOSTILE, "points", [HOSTILE], [Series(HOSTILE, [1.0], [math.nan])]),
            ],
            token_pairs=[pair],
            token_notes=[HOSTILE],
            samples=[Sample(HOSTILE, "42.", [Answer("before", HOSTILE, False), Answer("after", "42.", True)])],
            data_notes=[HOSTILE],
            commands=["python -m recipes.train 'data.train=a b.jsonl'", HOSTILE],
            settings=[("torch", "2.13.0"), (HOSTILE, HOSTILE)],
        )
    )


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.opened: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append((tag, dict(attrs)))


def test_the_page_loads_nothing_from_elsewhere(html: str) -> None:
    parser = _Tags()
    parser.feed(html)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in parser.opened}
    loading = [value for _, attrs in parser.opened for name, value in attrs.items() if name in ("src", "href")]
    loading += [value for _, attrs in parser.opened for name, value in attrs.items() if name == "xlink:href"]
    assert all(value and value.startswith("#") for value in loading)
    assert not re.search(r"url\((?!#)|@import", html)
    # The only addresses left are the names of SVG's namespaces, which nothing fetches.
    assert set(re.findall(r'https?://[^"\s<]+', html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_every_text_is_escaped(html: str) -> None:
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 10


def test_the_page_shows_the_numbers_it_was_given(html: str) -> None:
    for shown in ("87.5%", "+0.250", "-1.500", "2.13.0", "Something was done. It went well &amp; quickly."):
        assert shown in html


def test_known_mistakes_are_marked(html: str) -> None:
    assert re.search(r'class="token wrong"[^>]*>43<', html)
    assert re.search(r'class="token"[^>]*>42<', html)


def test_an_empty_part_is_left_out() -> None:
    html = build_page(Page(title="a run", summary=["Nothing else is known."]))
    assert "<h2>" not in html


def test_more_lines_than_colours_are_told_apart_by_dashes() -> None:
    lines = [Line(str(place), [0, 1], [0, place], colour=place) for place in range(12)]
    svg = chart_svg(Chart("many", "step", "loss", lines))
    styles = set(re.findall(r'style="fill: none; stroke[^"]+"', svg))
    assert len([style for style in styles if "stroke-width: 1.3" in style]) == len(lines)


def test_a_grid_holds_every_chart_and_what_its_bars_are_called() -> None:
    bars = Bars("moved", "points", ["one way", "another"], [Series("wrong", [1.0, 2.0], [0.1, math.nan])])
    svg = grid_svg([bars, Chart("loss", "step", "nats", []), bars], columns=2)
    assert svg.startswith("<svg") and svg.count("<svg") == 1
    assert all(svg.count(f"<!-- {words} -->") == 2 for words in ("one way", "another", "moved"))


def test_positive_and_negative_rewards_have_colours_of_their_own_and_zero_none() -> None:
    assert reward_colour(0.0, 1.0) == reward_colour(0.0, 0.0) == "#ffffff"
    assert len({reward_colour(value, 1.0) for value in (-2.0, -0.5, 0.5, 2.0)}) == 4
    assert reward_colour(2.0, 1.0) == reward_colour(1.0, 1.0)


def test_the_figure_is_an_svg_with_its_tokens() -> None:
    chart = Chart("a", "step", "loss", [Line("training", [1, 2], [1.0, 0.5])])
    svg = figure_svg([chart, chart], [("sum", [Token("4", 0.1), Token("3", -0.2, wrong=True)])], 0.2, "token reward")
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
