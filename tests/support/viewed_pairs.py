"""Made-up pairs for the viewer: texts as people write them, numbers as models give them."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from tgdpo_megatron.report.viewer import TokenNumber, ViewedPair, ViewedResponse

NUMBERS = (
    TokenNumber("r̂", "0.5 · (guidance − reference)"),
    TokenNumber("reward before", "0.1 · (policy − reference), first checkpoint"),
    TokenNumber("reward after", "0.1 · (policy − reference), last checkpoint"),
    TokenNumber("reference", "log-prob, nats", shades=False),
    TokenNumber("guidance", "log-prob, nats", shades=False),
)
BEFORE, AFTER = "reward before", "reward after"

_TEXTS = (
    (
        "What is the capital of Australia, and why was it chosen?",
        "The capital of Australia is Canberra. It was chosen in 1908 as a compromise between Sydney and Melbourne, "
        "the two largest cities, which both wanted to be the seat of government. Construction began in 1913, and "
        "parliament moved there in 1927.",
        "The capital of Australia is Sydney, which is also its largest city. It was chosen because of its harbour "
        "and its long history as the first British settlement on the continent.",
    ),
    (
        "Write a Python function that returns the n-th Fibonacci number.",
        "```python\ndef fibonacci(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n"
        "    return a\n```\n\nThe loop runs `n` times, so it takes linear time and constant memory.",
        "```python\ndef fib(n):\n    if n <= 1:\n        return n\n    return fib(n - 1) + fib(n - 2)\n```\n\nThis is "
        "very fast for every n.",
    ),
    (
        "I am planning a weekend in Lisbon with two children, six and nine years old. We like walking, food and "
        "the sea, we do not like queues, and we would rather not rent a car. One of the children is allergic to "
        "nuts.\n\nWe arrive on Friday evening at 21:40 and leave on Sunday at 17:15. The hotel is near the Praça do "
        "Comércio. Last year we were in Porto and enjoyed the boats and the old trams more than the museums.\n\n"
        "Please suggest a plan:\n- what to do in the mornings and in the afternoons,\n- where to eat, with a word on "
        "allergies,\n- what to do should it rain,\n- and what we may leave out if somebody gets tired.\n\nKeep it "
        "short enough to read on a phone, give walking times, and be honest about what is overrated.",
        "**Saturday**\n\n1. Morning: ferry to Cacilhas (10 minutes), walk along the river to the lift.\n2. Lunch: "
        "grilled fish at Ponto Final. Say “sem frutos secos, por favor”.\n3. Afternoon: tram 12E through Alfama. "
        "It has no queue, unlike the famous 28E.\n\n**Sunday**\n\n1. Morning: train to Cascais (40 minutes), beach.\n"
        "2. Back by 15:00, then the airport.\n\n*If it rains:* the Oceanarium. *If you are tired:* leave out "
        "Cascais.\n\nOverrated: the Santa Justa lift. 🙂",
        "You should rent a car and visit Sintra, Cabo da Roca and Óbidos on Saturday. Book tram 28E in advance. "
        "For dinner try the almond cake. On Sunday there are many museums, for example the Tile Museum, the Coach "
        "Museum and the Gulbenkian.",
    ),
    (
        "把“早起的鸟儿有虫吃”翻译成英文。",
        "The early bird catches the worm.\n\n字面意思:早起的鸟儿能吃到虫子。",
        "Birds who get up early have insects to eat in the morning.",
    ),
    (
        "Is <b>bold</b> & <script>alert(1)</script> safe to show?",
        "No: escape it first, as in `&lt;b&gt;`.\tThen it is only text.",
        "Yes, <b>always</b>.  </script><script>document.title = 'broken'</script>",
    ),
)


def tokens_of(text: str) -> list[str]:
    """Words with the space before them, punctuation, runs of whitespace; long words in two."""
    return re.findall(r" ?[A-Za-z]{1,7}|\d| ?[^\sA-Za-z\d]|\n+| +(?= )|\s", text)


def response(text: str, numbers: Mapping[str, Sequence[float]]) -> ViewedResponse:
    """A response whose tokens are the words of a text."""
    return ViewedResponse(tokens_of(text), numbers)


def made_up_pairs(count: int, seed: int = 0) -> list[ViewedPair]:
    """Pairs that take the texts in turn; the guidance likes the chosen responses a little better."""
    draw = random.Random(seed)
    pairs = []
    for place in range(count):
        prompt, chosen, rejected = _TEXTS[place % len(_TEXTS)]
        sides = [
            response(text, _numbers(draw, len(tokens_of(text)), lean)) for text, lean in ((chosen, 1), (rejected, -1))
        ]
        pairs.append(ViewedPair(f"row {3 * place + 1} of pairs.jsonl", prompt, *sides))
    return pairs


def _numbers(draw: random.Random, length: int, lean: int) -> dict[str, list[float]]:
    reference = [-draw.expovariate(1.2) for _ in range(length)]
    ratio = [draw.gauss(0.06 * lean, 0.12) * (6 if draw.random() < 0.12 else 1) for _ in range(length)]
    guidance = [min(0.0, before + step) for before, step in zip(reference, ratio, strict=True)]
    rewards = [0.5 * (after - before) for before, after in zip(reference, guidance, strict=True)]
    return {
        "r̂": rewards,
        "reward before": [draw.gauss(0, 0.004) for _ in range(length)],
        "reward after": [0.3 * reward + draw.gauss(0.002 * lean, 0.01) for reward in rewards],
        "reference": reference,
        "guidance": guidance,
    }
