"""The page of a comparison in a browser: nothing is cut off on a phone, a tablet or a screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.browser import assert_nothing_is_clipped, needs_chromium
from tgdpo_megatron.evaluation.comparison import PairNumbers, compared
from tgdpo_megatron.evaluation.comparison_page import page
from tgdpo_megatron.evaluation.gathering import answer_numbers
from tgdpo_megatron.sampling.answers import Answered

pytestmark = needs_chromium
LONG = "Donaudampfschifffahrtsgesellschaftskapitän" * 4


def answered(prompt: str, text: str) -> Answered:
    given: dict[str, Any] = {"prompt": prompt, "format_prompt": f"<|user|>\n{prompt}<|end|>", "prompt_id": "0"}
    of_answers = {"all_generated_responses": [text], "finish_reasons": ["length"], "num_tokens": [40], "seeds": [0]}
    return Answered(**given, **of_answers, model={"name": LONG}, sampling={"temperature": 1.0}, source={})


@pytest.mark.parametrize(("models", "width"), [(2, 360), (4, 768), (4, 1400)])
def test_nothing_is_clipped(models: int, width: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"runs/{LONG}/hf", *(f"model-{number}" for number in range(1, models))]
    texts = [LONG, f"A line.\n\n\tAnother one.\n{'word ' * 200}", ""]
    answers = {name: [answered(f"{place} {LONG}", text) for place, text in enumerate(texts)] for name in names}
    numbers = {name: answer_numbers(some, scores=rng.normal(size=(3, 1))) for name, some in answers.items()}
    pairs = {name: PairNumbers(rng.normal(size=(8, 2)), np.arange(8) // 2) for name in names}
    html = page(
        compared(pairs, numbers, is_bradley_terry=True),
        made_with={f"model {name}": LONG for name in names},
        notes=["A sentence on what was left out."],
        answers=answers,
        numbers=numbers,
        special=["<|user|>", "<|end|>"],
    )
    assert_nothing_is_clipped(html, width, tmp_path)
