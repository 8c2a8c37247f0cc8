"""The HTML page of a comparison: its tables, what each number means, and answers side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tgdpo_megatron.evaluation.bootstrap import DRAWS, LEVEL, Measured
from tgdpo_megatron.evaluation.comparison import QUANTITIES, AnswerNumbers, Comparison, rows, rows_of_differences
from tgdpo_megatron.report.page import Curves, Facts, Page, Section, Side, SideBySide, Table, build_page
from tgdpo_megatron.report.plots import Bars, Series
from tgdpo_megatron.report.words import number, percent
from tgdpo_megatron.sampling.answers import Answered

SHOWN = 50
"""Most prompts whose answers are shown."""
_CHARTED = [name for name in QUANTITIES if name.startswith(("accuracy", "win_rate"))]
INTERVALS = (
    f"In brackets: {LEVEL:.0%} intervals by bootstrap over prompts ({DRAWS:,} draws). Models are compared draw by draw."
)


def page(
    comparison: Comparison,
    *,
    made_with: Mapping[str, str],
    notes: Sequence[str],
    answers: Mapping[str, Sequence[Answered]],
    numbers: Mapping[str, AnswerNumbers],
    special: Sequence[str],
) -> str:
    """The whole HTML document.

    Args:
        made_with: What was compared, and how: names and values in words.
        notes: Sentences on what was left out.
        answers, numbers: Of every model, to the same prompts; empty where there are none.
        special: Texts of the tokenizer's special tokens.
    """
    start, *models = comparison.models
    found, differences = rows(comparison), rows_of_differences(comparison)
    return build_page(
        Page(
            f"{', '.join(models)} against {start}",
            [_summary(comparison, name, start) for name in models],
            [
                Section("What was measured", [Table(found[0], found[1:], INTERVALS), *notes]),
                Section("Differences", [Table(differences[0], differences[1:], INTERVALS)] if differences else []),
                Section("Shares", [Curves(_charts(comparison))]),
                Section("Answers side by side", _side_by_side(answers, numbers, special)),
                Section("What the numbers mean", [Facts(_meanings(comparison))]),
                Section("How they were made", [Facts(list(made_with.items()))]),
            ],
        )
    )


def _summary(comparison: Comparison, name: str, start: str) -> str:
    """The most telling number of a model, in a sentence."""
    found = comparison.models[name]
    for quantity in ("win_rate", "accuracy_reward"):
        if quantity in found:
            low, high = found[quantity].interval
            share, between = percent(found[quantity].value), f"{percent(low)} to {percent(high)}"
            if quantity == "win_rate":
                return f"{name} wins {share} ({between}) of its comparisons with {start}."
            return f"{name} gives the chosen response the higher implicit reward in {share} ({between}) of the pairs."
    return f"{name} is compared with {start}."


def _charts(comparison: Comparison) -> list[Bars]:
    """Bars of all shares that were measured of any model beside the start."""
    models = dict(list(comparison.models.items())[1:])
    names = [name for name in _CHARTED if all(name in found for found in models.values())]
    if not names:
        return []
    series = [
        Series(
            model,
            [100 * found[name].value for name in names],
            [_whiskers(found[name]) for name in names],
        )
        for model, found in models.items()
    ]
    headings = [QUANTITIES[name].heading for name in names]
    note = "Whiskers: the intervals of the table. The line is at one half."
    return [Bars("Against the start", "%", headings, series, mark=50.0, note=note)]


def _whiskers(share: Measured) -> tuple[float, float]:
    """How far the interval reaches below the value and above it, in percent; 0 where the value is outside of it."""
    low, high = share.interval
    return 100 * max(0.0, share.value - low), 100 * max(0.0, high - share.value)


def _side_by_side(
    answers: Mapping[str, Sequence[Answered]], numbers: Mapping[str, AnswerNumbers], special: Sequence[str]
) -> list[str | SideBySide]:
    """The first answer of every model to each of the first prompts."""
    if not answers:
        return []
    first, *_ = answers.values()
    shown = [
        SideBySide(
            answered.format_prompt,
            [
                Side(name, _known(numbers[name], place), some[place].all_generated_responses[0])
                for name, some in answers.items()
            ],
            special,
        )
        for place, answered in enumerate(first[:SHOWN])
    ]
    several = len(first[0].num_tokens) > 1
    words = (
        f"The first {len(shown)} of {len(first)} prompts" if len(shown) < len(first) else f"All {len(first)} prompts"
    )
    return [f"{words}{', each with the first answer of every model' if several else ''}.", *shown]


def _known(numbers: AnswerNumbers, place: int) -> str:
    """What is known of the first answer to a prompt."""
    words = [f"{numbers.tokens[place, 0]:.0f} tokens"]
    if numbers.scores is not None:
        score = float(numbers.scores[place, 0])
        words.insert(0, "no score" if math.isnan(score) else f"score {number(score)}")
    return ", ".join([*words, "unfinished"] if numbers.unfinished[place, 0] else words)


def _meanings(comparison: Comparison) -> list[tuple[str, str]]:
    return [(QUANTITIES[name].heading, QUANTITIES[name].meaning) for name in comparison.quantities]
