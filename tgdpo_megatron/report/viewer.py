"""One HTML page to read preference pairs token by token: both responses side by side, shaded by a number per token.

The page takes plain data and knows nothing of how it came about. What it looks like and how it answers to keys is in
`viewer.html` beside this file; this module puts the data into it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

_TEMPLATE = Path(__file__).with_name("viewer.html")
_PERCENTILE = 99
"""Of the magnitudes of a number; what lies beyond is drawn in the strongest colour."""


@dataclass(frozen=True)
class TokenNumber:
    """A number known of every token, such as r̂.

    Attributes:
        name: What it is called everywhere on the page.
        meaning: A few words or a formula with the unit.
        shades: Whether tokens can be shaded by it; the first that can is the default.
    """

    name: str
    meaning: str = ""
    shades: bool = True


@dataclass(frozen=True)
class ViewedResponse:
    """A response token by token.

    Attributes:
        tokens: Their texts; any Unicode, whitespace included.
        numbers: Name of a TokenNumber -> one value per token. A number that is not known is left out.
    """

    tokens: Sequence[str]
    numbers: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class ViewedPair:
    """A prompt and its two responses; the name says where it came from, such as "row 12 of pairs.jsonl"."""

    name: str
    prompt: str
    chosen: ViewedResponse
    rejected: ViewedResponse


def viewer_page(
    title: str,
    subtitle: str,
    pairs: Sequence[ViewedPair],
    numbers: Sequence[TokenNumber],
    *,
    before: str | None = None,
    after: str | None = None,
) -> str:
    """The whole HTML document: nothing in it is loaded from elsewhere.

    Args:
        numbers: In the order they are listed in.
        before, after: Names of the numbers that are the policy's implicit reward per token before and after training;
            their sums are shown as rewards and, chosen − rejected, as margins.

    Raises:
        ValueError: A name is not among `numbers`, none of them shades, or a response has more or fewer values than
            tokens.
    """
    _check(pairs, numbers, before, after)
    names = [number.name for number in numbers]
    counts = Counter(text for pair in pairs for side in (pair.chosen, pair.rejected) for text in side.tokens)
    # Frequent texts first, so that most tokens are short numbers.
    places = {text: place for place, (text, _) in enumerate(counts.most_common())}
    data = {
        "numbers": [asdict(number) | {"limit": shade_limit(pairs, number.name)} for number in numbers],
        "percentile": _PERCENTILE,
        "before": None if before is None else names.index(before),
        "after": None if after is None else names.index(after),
        "texts": list(places),
        "pairs": [
            {
                "name": pair.name,
                "prompt": pair.prompt,
                "chosen": _response(pair.chosen, places, names),
                "rejected": _response(pair.rejected, places, names),
            }
            for pair in pairs
        ],
    }
    return _fill({"title": escape(title), "subtitle": escape(subtitle), "data": _json_for_html(data)})


def shade_limit(pairs: Sequence[ViewedPair], name: str) -> float:
    """The magnitude drawn in the strongest colour: the 99th percentile over all tokens, to three digits.

    The largest magnitude where that percentile is 0, and 0 where every value is.
    """
    values = [side.numbers[name] for pair in pairs for side in (pair.chosen, pair.rejected) if name in side.numbers]
    magnitudes = np.abs(np.concatenate([np.asarray(some, dtype=np.float64) for some in values] or [np.zeros(0)]))
    magnitudes = magnitudes[np.isfinite(magnitudes)]
    if not magnitudes.size:
        return 0.0
    limit = float(np.percentile(magnitudes, _PERCENTILE)) or float(magnitudes.max())
    return float(f"{limit:.3g}")


def _check(pairs: Sequence[ViewedPair], numbers: Sequence[TokenNumber], before: str | None, after: str | None) -> None:
    names = [number.name for number in numbers]
    if not any(number.shades for number in numbers):
        raise ValueError(f"none of the numbers {names} shades tokens; at least one must.")
    for name in (before, after):
        if name is not None and name not in names:
            raise ValueError(f"{name!r} is not among the numbers {names}.")
    for pair in pairs:
        for words, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            for name, values in side.numbers.items():
                if name not in names:
                    raise ValueError(f"{pair.name}, {words}: {name!r} is not among the numbers {names}.")
                if len(values) != len(side.tokens):
                    raise ValueError(
                        f"{pair.name}, {words}: {len(values)} values of {name!r} for {len(side.tokens)} tokens."
                    )


def _response(response: ViewedResponse, places: Mapping[str, int], names: Sequence[str]) -> dict[str, Any]:
    """Texts as places in the list of texts; None for a number that is not known."""
    columns = [response.numbers.get(name) for name in names]
    return {
        "tokens": [places[text] for text in response.tokens],
        "numbers": [None if column is None else [_rounded(value, 4) for value in column] for column in columns],
        # Summed before rounding.
        "sums": [None if column is None else _rounded(math.fsum(column), 6) for column in columns],
    }


def _rounded(value: float, digits: int) -> float | None:
    """A number that is short in JSON, which knows no infinities: those become None."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() else rounded


def _json_for_html(data: object) -> str:
    """JSON that can stand in a <script> element and be written as UTF-8, whatever its strings hold."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # "<" could end the element or open a comment; lone surrogates have no UTF-8; U+2028 and U+2029 are line ends to
    # some tools. All of them can only be inside strings.
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _fill(parts: Mapping[str, str]) -> str:
    """The template with its {{names}} replaced, in one pass: what is filled in is not looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _TEMPLATE.read_text(encoding="utf-8"))
