"""Make preference pairs whose wrong words are known, and noisy examples to fine-tune on first.

There are three families of questions: sums, formats (dates, lists, capital letters) and small facts. A rejected answer
is the chosen answer with one typical mistake, so what differs between the two is exactly what is wrong. The pairs are
written as JSON lines with `prompt`, `chosen`, `rejected`, `kind` and `wrong` (character spans of `rejected`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from tgdpo_megatron.errors import CommandLine, one_sentence_errors

_CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Japan Tokyo, Egypt Cairo, Norway Oslo, Greece Athens, Peru Lima, "
    "Kenya Nairobi, Cuba Havana, Poland Warsaw, Austria Vienna, Portugal Lisbon, Chile Santiago"
)
_YOUNG = (
    "dog puppy, cat kitten, cow calf, horse foal, sheep lamb, hen chick, goat kid, bear cub, frog tadpole, "
    "swan cygnet, deer fawn, kangaroo joey"
)
_OPPOSITES = (
    "hot cold, big small, fast slow, light dark, early late, full empty, hard soft, high low, new old, rich poor, "
    "strong weak, wet dry"
)
_LIST_WORDS = (
    "apple bridge candle dragon engine flower garden hammer island jacket kettle ladder mirror needle orange pencil"
)
_MORE_WORDS = (
    "rabbit silver ticket window anchor basket carpet desert eagle feather guitar harbour jungle kitchen lemon market "
    "napkin ocean pillow rocket saddle tunnel valley wagon"
)

# Questions in several wordings and, for facts, the sentence that answers them.
_SUM = ("What is {} plus {}?", "Add {} and {}.", "{} + {} =", "Find the sum of {} and {}.")
_DATE = ("Write as day/month/year: {}", "Give this date with the day first: {}", "In the order day, month, year: {}")
_LIST = ("Reverse this list: {}, {}, {}.", "Say backwards: {}, {}, {}.", "From last to first: {}, {}, {}.")
_UPPER = (
    "Write {} in capital letters.",
    "Put {} in capitals.",
    "Make {} upper case.",
    "How is {} written in capitals?",
)
_FACTS = (
    (
        _CAPITALS,
        ("What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?", "Capital of {}?"),
        "The capital of {} is {} and no other city.",
    ),
    (
        _YOUNG,
        ("What is a young {} called?", "Name the young of a {}.", "How do we call a baby {}?", "Young of a {}?"),
        "A young {} is called a {} by most people.",
    ),
    (
        _OPPOSITES,
        ("What is the opposite of {}?", "Name the opposite of {}.", "Which word is contrary to {}?", "Opposite of {}?"),
        "The opposite of {} is {} as a rule.",
    ),
)
_SAMPLED = 900
"""Number of dates, and of lists, that are drawn. There are too many of each to use all."""


@dataclass(frozen=True)
class Question:
    """A question in several wordings, with its right answer and a typical mistake.

    Attributes:
        kind: `sum`, `date`, `list`, `capitals` or `fact`.
        prompts: The wordings.
        answer: The answer's sentence with a `{}` for each value.
        right, wrong: The values of the right and of the wrong answer.
    """

    kind: str
    prompts: tuple[str, ...]
    answer: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One line of a file. `wrong` holds the spans [start, end) of characters of `rejected` that are wrong."""

    prompt: str
    chosen: str
    rejected: str
    kind: str
    wrong: list[list[int]]


@dataclass(frozen=True)
class Splits:
    """Training and validation pairs, with different prompts, and examples for supervised fine-tuning.

    An `sft` row whose `chosen` is the wrong answer has the right one as `rejected`, and an empty `wrong`.
    """

    train: list[Row]
    validation: list[Row]
    sft: list[Row]


def make_splits(*, seed: int, num_train: int, num_validation: int, num_sft: int, noise: float) -> Splits:
    """Make all three sets.

    Validation asks the questions of training in other words (sums, capital letters, facts), or asks for other values in
    the same words (dates, lists). Kinds have equal shares. Within a kind, rows repeat only after all were used.

    Args:
        noise: Share of `sft` rows whose chosen answer is the wrong one, in 0..1. The number of such rows is exact.
    """
    rng = random.Random(seed)
    training: dict[str, list[Row]] = {}
    held_out: dict[str, list[Row]] = {}
    for question in _questions(rng):
        rows = [_row(question, prompt) for prompt in question.prompts]
        if len(rows) > 1:
            held_out.setdefault(question.kind, []).append(rows.pop(rng.randrange(len(rows))))
        elif rng.random() < 0.2:
            held_out.setdefault(question.kind, []).append(rows.pop())
        training.setdefault(question.kind, []).extend(rows)
    train = _draw(rng, training, num_train)
    validation = _draw(rng, held_out, num_validation)
    sft = _draw(rng, training, num_sft)
    swapped = set(rng.sample(range(num_sft), round(noise * num_sft)))
    return Splits(train, validation, [_swap(row) if place in swapped else row for place, row in enumerate(sft)])


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Read what write_rows wrote."""
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _questions(rng: random.Random) -> Iterator[Question]:
    """All questions, with a random selection of dates and lists."""
    for first, second in product(range(3, 13), range(2, 9)):
        right = first + second
        wrong = right + rng.choice([-2, -1, 1, 2, 10])
        prompts = tuple(prompt.format(first, second) for prompt in _SUM)
        yield Question("sum", prompts, f"{first} plus {second} makes {{}} in total.", (str(right),), (str(wrong),))
    for table, prompts, answer in _FACTS:
        pairs = [tuple(pair.split()) for pair in table.split(", ")]
        for asked, right_word in pairs:
            wrong_word = rng.choice([word for _, word in pairs if word not in (right_word, asked)])
            asking = tuple(prompt.format(asked) for prompt in prompts)
            yield Question("fact", asking, answer.format(asked, "{}"), (right_word,), (wrong_word,))
    words = _LIST_WORDS.split()
    for word in words + _MORE_WORDS.split():
        asking = tuple(prompt.format(word) for prompt in _UPPER)
        answer = f"In capitals it is {word[0].upper()}{{}} of course."
        yield Question("capitals", asking, answer, (word[1:].upper(),), (word[1:],))
    every_date = [date for date in product(range(2000, 2030), range(1, 13), range(1, 29)) if date[1] != date[2]]
    for year, month, day in rng.sample(every_date, _SAMPLED):
        asking = (rng.choice(_DATE).format(f"{year}-{month:02}-{day:02}"),)
        parts = (f"{day:02}", f"{month:02}")
        yield Question("date", asking, f"The date is {{}}/{{}}/{year} in that form.", parts, parts[::-1])
    every_list = [items for items in product(words, repeat=3) if len(set(items)) == 3]
    for items in rng.sample(every_list, _SAMPLED):
        asking = (rng.choice(_LIST).format(*items),)
        one, two, three = items
        answer = "Backwards it reads {}, {}, {} as asked."
        yield Question("list", asking, answer, (three, two, one), (three, one, two))


def _row(question: Question, prompt: str) -> Row:
    """The pair of one wording, with the spans where the wrong values stand."""
    rejected, spans = "", []
    pieces = question.answer.split("{}")
    for piece, right, wrong in zip(pieces, question.right, question.wrong, strict=False):
        rejected += piece
        spans += [[len(rejected) + start, len(rejected) + end] for start, end in _differences(right, wrong)]
        rejected += wrong
    return Row(
        prompt, question.answer.format(*question.right), rejected + pieces[-1], question.kind, _join_adjacent(spans)
    )


def _differences(right: str, wrong: str) -> list[list[int]]:
    """Spans of `wrong` that differ from `right`: digit by digit for numbers of equal length, else the whole value."""
    if right == wrong:
        return []
    if len(right) == len(wrong) and right.isdigit() and wrong.isdigit():
        return [[place, place + 1] for place in range(len(wrong)) if wrong[place] != right[place]]
    return [[0, len(wrong)]]


def _join_adjacent(spans: list[list[int]]) -> list[list[int]]:
    joined: list[list[int]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1][1] = end
        else:
            joined.append([start, end])
    return joined


def _swap(row: Row) -> Row:
    return Row(row.prompt, row.rejected, row.chosen, row.kind, [])


def _draw(rng: random.Random, rows: dict[str, list[Row]], count: int) -> list[Row]:
    """Draw `count` rows in random order, with equal shares of all kinds."""
    drawn: list[Row] = []
    for place, kind in enumerate(rows):
        share = count // len(rows) + (place < count % len(rows))
        while share:
            shuffled = rng.sample(rows[kind], len(rows[kind]))
            drawn += shuffled[:share]
            share -= len(shuffled[:share])
    rng.shuffle(drawn)
    return drawn


def main() -> None:
    with one_sentence_errors():
        parser = CommandLine(prog="python -m tools.marked_pairs", description=__doc__)
        parser.add_argument("folder", type=Path, help="folder for train.jsonl, validation.jsonl and sft.jsonl")
        parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: %(default)s)")
        parser.add_argument("--train", type=int, default=2000, help="number of training pairs (default: %(default)s)")
        parser.add_argument(
            "--validation", type=int, default=200, help="number of validation pairs (default: %(default)s)"
        )
        parser.add_argument(
            "--sft", type=int, default=4000, help="number of examples for supervised fine-tuning (default: %(default)s)"
        )
        parser.add_argument(
            "--noise", type=float, default=0.45, help="share of wrong answers among the examples (default: %(default)s)"
        )
        parsed = parser.parse_args()
        splits = make_splits(
            seed=parsed.seed,
            num_train=parsed.train,
            num_validation=parsed.validation,
            num_sft=parsed.sft,
            noise=parsed.noise,
        )
        parsed.folder.mkdir(parents=True, exist_ok=True)
        for name in ("train", "validation", "sft"):
            rows = getattr(splits, name)
            write_rows(rows, parsed.folder / f"{name}.jsonl")
            print(f"{parsed.folder / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
