"""The HTML report: self-contained, safe with any text, and showing the numbers it was given."""

import math
import re
from html import unescape
from html.parser import HTMLParser

import pytest

from tgdpo_megatron.report.look import reward_colour
from tgdpo_megatron.report.page import (
    Answer,
    Commands,
    Curves,
    Facts,
    Page,
    Sample,
    Section,
    Side,
    SideBySide,
    Table,
    TokenPair,
    TokenPairs,
    build_page,
)
from tgdpo_megatron.report.plots import Bars, Chart, Line, Mark, Series, Token, chart_svg, figure_svg, grid_svg

HOSTILE = "<script>alert('a & b')</script>"


@pytest.fixture(scope="module")
def html() -> str:
    line = Line("held out", [1, 2, 3], [0.7, 0.5, 0.4], held_out=True)
    pair = TokenPair(HOSTILE, [Token("42", 0.25)], [Token("43", -1.5, wrong=True), Token(HOSTILE, 0.0)], name=HOSTILE)
    chart = Chart(HOSTILE, HOSTILE, HOSTILE, [line, Line(HOSTILE, [1], [0.5])], [Mark(1, 0.0, HOSTILE)], note=HOSTILE)
    return build_page(
        Page(
            title=HOSTILE,
            summary=["Something was done.", "It went well & quickly."],
            sections=[
                Section("Before and after", [Table(("model", HOSTILE), [["after", "87.5%"]], note=HOSTILE)]),
                Section(
                    "Curves",
                    [Curves([chart]), Curves([Bars(HOSTILE, "x", [HOSTILE], [Series(HOSTILE, [1.0], [math.nan])])])],
                ),
                Section("Tokens", [HOSTILE, TokenPairs([pair], special=["alert"])]),
                Section(
                    "Answers", [Sample(HOSTILE, "42.", [Answer(HOSTILE, HOSTILE, False), Answer("after", "42.", True)])]
                ),
                Section("Side by side", [SideBySide(HOSTILE, [Side(HOSTILE, HOSTILE, HOSTILE), Side("b", "", "42.")])]),
                Section(
                    HOSTILE, [Commands(["python -m recipes.train 'data.train=a b.jsonl'", HOSTILE, f"# {HOSTILE}"])]
                ),
                Section("Versions", [Facts([("torch", "2.13.0"), (HOSTILE, HOSTILE)])]),
            ],
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
    assert html.count("&lt;script&gt;") >= 20


def test_the_page_shows_the_numbers_it_was_given(html: str) -> None:
    for shown in ("87.5%", "+0.25", "−1.5", "2.13.0", "Something was done. It went well &amp; quickly."):
        assert shown in html


def test_known_mistakes_are_marked(html: str) -> None:
    assert re.search(r'class="token wrong less"[^>]*>43<', html)
    assert re.search(r'class="token more"[^>]*>42<', html)


def test_special_tokens_are_set_apart_in_prompts_and_nothing_of_a_prompt_is_lost(html: str) -> None:
    prompt = re.search(r'<article class="pair.*?<div class="prompt"[^>]*>(.*?)</div>', html, re.DOTALL)
    assert prompt and '<span class="special">alert</span>' in prompt[1]
    assert unescape(re.sub("</?span[^>]*>", "", prompt[1])) == HOSTILE


def test_the_page_has_a_light_and_a_dark_look(html: str) -> None:
    light, dark = (
        dict(re.findall(r"--([\w-]+): ([^;]+);", rule)) for rule in re.findall(r":root \{(.*?)\}", html, re.S)
    )
    assert "@media screen and (prefers-color-scheme: dark)" in html
    assert set(dark) <= set(light) and all(light[name] != dark[name] for name in ("page", "card", "ink", "line-0"))
    used = set(re.findall(r"var\(--([\w-]+)\)", html))
    assert used <= set(light) | {"s", "end"}


def test_a_chart_has_no_colour_of_its_own() -> None:
    """Every colour is one of the page's, so that a chart is as readable in the dark."""
    lines = [Line(str(place), [0, 1, 2], [0, place, 1], held_out=place % 2 == 1, colour=place) for place in range(9)]
    for small in (False, True):
        svg = chart_svg(Chart("title", "step", "loss", lines, [Mark(1, 0.0, "all ties")], shares=True), small=small)
        assert not re.findall(r"#[0-9a-fA-F]{3,6}\b", re.sub(r'(id|href)="[^"]*"|url\([^)]*\)', "", svg))
        assert "var(--line-8)" not in svg and "var(--line-6)" in svg and "all ties" in svg


def test_the_colours_of_curves_in_pictures_are_those_of_the_light_page(html: str) -> None:
    svg = grid_svg([Chart("title", "step", "loss", [Line("", [0, 1], [0, 1], colour=place)]) for place in range(7)], 7)
    for place in range(7):
        found = re.search(rf"--line-{place}: (#\w+);", html)
        assert found and found[1] in svg


def test_an_empty_part_is_left_out() -> None:
    empty = [Section("Curves", [Curves([])]), Section("Tokens", [TokenPairs([])]), Section("Data", ["", Facts([])])]
    html = build_page(Page(title="a run", summary=["Nothing else is known."], sections=empty))
    assert "<h2>" not in html


def test_an_answer_without_words_is_no_gap() -> None:
    sample = Sample("Why?", "Because.", [Answer("after", "")])
    assert "(no words)" in build_page(Page("a run", [], [Section("Answers", [sample])]))
    beside = SideBySide("Why?", [Side("start", "0 tokens", "")])
    assert "(no words)" in build_page(Page("a comparison", [], [Section("Answers", [beside])]))


def test_more_lines_than_colours_are_told_apart_by_dashes() -> None:
    lines = [Line(str(place), [0, 1], [0, place], colour=place) for place in range(12)]
    svg = chart_svg(Chart("many", "step", "loss", lines))
    styles = set(re.findall(r'style="fill: none; stroke[^"]+"', svg))
    assert len([style for style in styles if "stroke-width: 1.3" in style]) == len(lines)


def test_very_small_numbers_on_an_axis_leave_their_power_of_ten_to_its_label() -> None:
    rates = Line("training", [1, 2, 3], [1e-7, 5e-7, 7e-7])
    svg = chart_svg(Chart("Learning rate", "optimizer step", "", [rates]))
    words = re.findall(r"<text[^>]*>(.*?)</text>", svg, re.DOTALL)
    assert "10⁻⁷" in words and {"2", "4", "6"} <= {word.removesuffix(".0") for word in words}
    assert "5e" not in "".join(words)


def test_a_grid_holds_every_chart_and_what_its_bars_are_called() -> None:
    bars = Bars("moved", "points", ["one way", "another"], [Series("wrong", [1.0, 2.0], [0.1, math.nan])])
    svg = grid_svg([bars, Chart("loss", "step", "nats", []), bars], columns=2)
    assert svg.startswith("<svg") and svg.count("<svg") == 1
    assert all(svg.count(f"<!-- {words} -->") == 2 for words in ("one way", "another", "moved"))


def test_a_whisker_reaches_as_far_to_either_side_as_its_interval() -> None:
    """From 20 to 55 around 50, in the units of a bar that is 50 long."""
    svg = chart_svg(Bars("wins", "%", ["a"], [Series("a", [50.0], [(30.0, 5.0)])]))

    def ends(name: str) -> list[float]:
        (found,) = re.findall(rf'id="{name}">\s*<path d="M ([\d.]+) [\d.]+ \s*L ([\d.]+)', svg)
        return [float(end) for end in found]

    left, right = ends("patch_3")
    assert [(end - left) / (right - left) * 50 for end in ends("LineCollection_1")] == pytest.approx([20, 55], abs=0.01)


def test_positive_and_negative_rewards_have_colours_of_their_own_and_zero_none() -> None:
    assert reward_colour(0.0, 1.0) == reward_colour(0.0, 0.0) == "#ffffff"
    assert len({reward_colour(value, 1.0) for value in (-2.0, -0.5, 0.5, 2.0)}) == 4
    assert reward_colour(2.0, 1.0) == reward_colour(1.0, 1.0)


def test_the_figure_is_an_svg_with_its_tokens() -> None:
    chart = Chart("a", "step", "loss", [Line("training", [1, 2], [1.0, 0.5])])
    svg = figure_svg([chart, chart], [("sum", [Token("4", 0.1), Token("3", -0.2, wrong=True)])], 0.2, "token reward")
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
