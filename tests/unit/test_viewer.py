"""The pair viewer as a document: what is put in comes out again, whatever it is, and nothing is loaded."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.support.viewed_pairs import AFTER, BEFORE, NUMBERS, made_up_pairs
from tgdpo_megatron.report.look import beginnings
from tgdpo_megatron.report.viewer import TokenNumber, ViewedPair, ViewedResponse, shade_limit, viewer_page

ROOT = Path(__file__).resolve().parents[2]
REWARD = (TokenNumber("r̂"),)
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "{{data}} {{title}}",
    "\u2028\u2029\n\r\n\t \x00\x7f",
    "\\u003c \\ \" ' & &lt;",
    "\ud83d",  # half of an emoji, as a careless slice makes
    "👩\u200d👧 العربية \u202e",
    "",
    " ",
)


class _Document(HTMLParser):
    """Tags with their attributes, and the text of the elements with an id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.opened: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("id") or tag

    def handle_data(self, data: str) -> None:
        self.texts[self.inside] = self.texts.get(self.inside, "") + data


def one_pair(chosen: list[float], rejected: list[float]) -> ViewedPair:
    sides = [ViewedResponse(["x"] * len(values), {"r̂": values}) for values in (chosen, rejected)]
    return ViewedPair("row 1", "a prompt", *sides)


def embedded(html: str) -> Any:
    return json.loads(_Document(html).texts["data"])


def tokens(data: Any, side: Any) -> list[str]:
    return [data["texts"][place] for place in side["tokens"]]


def test_any_text_comes_back_from_the_page_as_it_was() -> None:
    response = ViewedResponse(HOSTILE, {"r̂": [0.0] * len(HOSTILE)})
    pairs = [ViewedPair(text, text, response, response) for text in HOSTILE]
    html = viewer_page("title", "subtitle", pairs, REWARD).encode("utf-8").decode("utf-8")
    data = embedded(html)
    assert [pair["prompt"] for pair in data["pairs"]] == [pair["name"] for pair in data["pairs"]] == list(HOSTILE)
    assert tokens(data, data["pairs"][0]["chosen"]) == list(HOSTILE)


def test_no_text_opens_or_ends_an_element() -> None:
    harmless, hostile = (
        viewer_page(
            text, text, [ViewedPair(text, text, *[ViewedResponse([text], {text: [1.0]})] * 2)], (TokenNumber(text),)
        )
        for text in ("word", " ".join(HOSTILE[:5]))
    )
    assert [tag for tag, _ in _Document(hostile).opened] == [tag for tag, _ in _Document(harmless).opened]
    assert _Document(hostile).texts["title"].strip() == " ".join(HOSTILE[:5])


def test_nothing_is_loaded_from_elsewhere() -> None:
    html = viewer_page("a run", "", made_up_pairs(5), NUMBERS, before=BEFORE, after=AFTER)
    document = _Document(html)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in document.opened}
    assert not [attrs for _, attrs in document.opened if {"src", "href", "srcset", "action"} & set(attrs)]
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|import\(", html)
    policy = next(attrs["content"] for tag, attrs in document.opened if tag == "meta" and "http-equiv" in attrs)
    assert policy and policy.startswith("default-src 'none'")


def test_the_strongest_colour_is_the_99th_percentile_of_the_size_over_the_whole_file() -> None:
    values = [float(value) for value in range(-50, 51)]
    pairs = [one_pair(values[:60], values[60:]), one_pair([math.nan, math.inf], [])]
    assert shade_limit(pairs, *REWARD) == 50.0
    assert shade_limit([one_pair([0.1] * 999, [-7.0])], *REWARD) == 0.1
    assert shade_limit([one_pair([0.123456], [])], *REWARD) == 0.123


def test_the_limit_falls_back_to_the_largest_value_and_then_to_nothing() -> None:
    assert shade_limit([one_pair([0.0] * 999, [-7.0])], *REWARD) == 7.0
    assert shade_limit([one_pair([0.0], [0.0])], *REWARD) == 0.0
    assert shade_limit([], *REWARD) == 0.0


def test_text_has_a_contrast_of_4_5_on_both_ends_of_the_scale_in_light_and_dark() -> None:
    style = viewer_page("", "", [], REWARD)
    themes = [
        dict(re.findall(r"--(ink|card|more|less): (#\w+)", rule))
        for rule in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(themes) == 2
    for theme in themes:
        for under in ("card", "more", "less"):
            low, high = sorted((luminance(theme["ink"]), luminance(theme[under])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (theme, under)


def luminance(colour: str) -> float:
    """Relative luminance as in WCAG 2, of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_values_are_rounded_to_four_digits_and_sums_are_taken_before() -> None:
    data = embedded(viewer_page("", "", [one_pair([0.123456] * 1000, [-123456.0, 2e-9])], REWARD))
    chosen, rejected = data["pairs"][0]["chosen"], data["pairs"][0]["rejected"]
    assert chosen["numbers"][0][0] == 0.1235
    assert chosen["sums"] == [123.456]
    assert rejected["numbers"][0] == [-123500, 2e-9]


def test_what_rounding_leaves_of_zero_is_shown_as_0() -> None:
    """Rewards of a policy that is its own reference; a real number beside them stays what it is."""
    number = TokenNumber("r̂", resolution=2e-6)
    noise = [5.7e-7, -1.9e-6, 1e-6] * 3
    data = embedded(viewer_page("", "", [one_pair(noise, [3e-6, -5.7e-7])], (number,)))
    chosen, rejected = data["pairs"][0]["chosen"], data["pairs"][0]["rejected"]
    assert chosen["numbers"] == [[0] * 9] and chosen["sums"] == [0]
    assert rejected["numbers"] == [[3e-6, 0]]
    assert shade_limit([one_pair(noise, [])], number) == 0.0
    assert embedded(viewer_page("", "", [one_pair(noise, [])], REWARD))["pairs"][0]["chosen"]["numbers"][0][0] == 5.7e-7


def test_the_list_names_pairs_by_what_their_prompts_do_not_share() -> None:
    header, end = "<|start|>user<|end_of_header|>\n\n", "<|eot|><|start|>assistant<|end_of_header|>\n\n"
    special = ["<|start|>", "<|end_of_header|>", "<|eot|>"]
    prompts = [f"{header}{question}{end}" for question in ("Three steps.", "Two steps.")]
    pairs = [ViewedPair("row", prompt, *[ViewedResponse(["x"], {"r̂": [1.0]})] * 2) for prompt in prompts]
    data = embedded(viewer_page("", "", pairs, REWARD, special=special))
    assert [pair["begin"] for pair in data["pairs"]] == ["Three steps.", "Two steps."]
    assert [pair["prompt"] for pair in data["pairs"]] == prompts
    assert data["special"] == ["<|end_of_header|>", "<|start|>", "<|eot|>"]


@pytest.mark.parametrize(
    ("prompts", "shown"),
    [
        (["<s>[a] Same", "<s>[a] Same"], ["[a] Same", "[a] Same"]),  # nothing tells them apart
        (["<s>One", "<s>Other"], ["One", "Other"]),  # letters are no header
        (["only\n one"], ["only one"]),
        (["", "<s>"], ["", ""]),
        (["Rules:\nbe kind\nOne", "Rules:\nbe kind\nTwo"], ["One", "Two"]),
    ],
)
def test_what_tells_prompts_apart_is_never_empty_for_a_prompt_with_words(prompts: list[str], shown: list[str]) -> None:
    assert beginnings(prompts, ["<s>"]) == shown


def test_what_is_not_known_and_what_is_not_finite_are_told_apart() -> None:
    side = ViewedResponse(["a", "b"], {"r̂": [1.0, math.nan]})
    numbers = (*REWARD, TokenNumber("reference"))
    data = embedded(viewer_page("", "", [ViewedPair("row 1", "", side, side)], numbers))
    assert data["pairs"][0]["chosen"]["numbers"] == [[1, None], None]
    assert data["pairs"][0]["chosen"]["sums"] == [None, None]


def test_a_value_costs_few_bytes_and_a_token_text_is_stored_once() -> None:
    small, large = (
        len(viewer_page("", "", made_up_pairs(count), NUMBERS, before=BEFORE, after=AFTER)) for count in (10, 50)
    )
    some = made_up_pairs(50)[10:]
    values = sum(len(side.tokens) * len(NUMBERS) for pair in some for side in (pair.chosen, pair.rejected))
    texts = sum(len(pair.prompt) for pair in some)
    assert (large - small - texts) / values < 10


def test_mistakes_of_the_caller_are_refused_by_name() -> None:
    pair = one_pair([1.0], [2.0])
    with pytest.raises(ValueError, match="2 values of 'r̂' for 1 tokens"):
        viewer_page("", "", [ViewedPair("row 1", "", pair.chosen, ViewedResponse(["x"], {"r̂": [1, 2]}))], REWARD)
    with pytest.raises(ValueError, match="row 1, chosen: 'r̂' is not among"):
        viewer_page("", "", [pair], (TokenNumber("reference"),))
    with pytest.raises(ValueError, match="'reward after' is not among"):
        viewer_page("", "", [pair], REWARD, after="reward after")
    with pytest.raises(ValueError, match="at least one must"):
        viewer_page("", "", [pair], (TokenNumber("r̂", shades=False),))
