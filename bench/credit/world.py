"""One seed of the token-credit benchmark: pairs whose wrong tokens are known, and the model every method starts from.

A folder holds everything, so that any process can train on it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.credit.measures import Marks
from tgdpo_megatron.checkpoint.convert import hf_to_megatron
from tgdpo_megatron.checkpoint.manifest import HF
from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.data.prepare import PreparedPairs, is_prepared, load_prepared, prepare_pairs
from tgdpo_megatron.data.tokenizer import load_tokenizer
from tgdpo_megatron.losses import CHOSEN, REJECTED
from tools.marked_pairs import Row, make_splits, read_rows, write_rows

NOISE = 0.45
VOCAB_SIZE = 1000
PARTS = ("train", "validation")
DATA = DataConfig(max_length=256)


@dataclass(frozen=True)
class Effort:
    """How much data, how many steps. Batches are 32 pairs."""

    seeds: tuple[int, ...]
    train: int = 2000
    validation: int = 200
    sft: int = 4000
    sft_steps: int = 600
    steps: int = 60
    eval_interval: int = 4


@dataclass(frozen=True)
class World:
    """A seed's folder."""

    folder: Path

    @property
    def random_start(self) -> Path:
        """Megatron checkpoint before anything was learned."""
        return self.folder / "random"

    @property
    def start(self) -> Path:
        """Megatron checkpoint of the fine-tuned model: the start of every method, and its reference."""
        return self.folder / "start"

    def tokenizer(self) -> Any:
        """Of all models of this seed."""
        return load_tokenizer(self.random_start / HF)

    def rows(self, part: str) -> list[Row]:
        """The pairs as text."""
        return read_rows(self.folder / f"{part}.jsonl")

    def data(self, part: str) -> PreparedPairs:
        """The pairs as tokens."""
        folder = self.folder / "tokens" / part
        if is_prepared(folder):
            return load_prepared(folder)
        return prepare_pairs(DATA, self.folder / f"{part}.jsonl", self.tokenizer(), folder)

    def save(self, name: str, values: dict[str, np.ndarray]) -> None:
        """Keep per-token numbers."""
        np.savez(self.folder / f"{name}.npz", **values)  # type: ignore[arg-type]

    def load(self, name: str) -> dict[str, np.ndarray]:
        """What was kept under a name."""
        with np.load(self.folder / f"{name}.npz") as kept:
            return dict(kept)


def make_world(folder: Path, seed: int, effort: Effort) -> World:
    """Write the pairs, train a tokenizer on them, make a random model."""
    from tools.make_tiny_model import make_model, train_tokenizer

    folder.mkdir(parents=True)
    splits = make_splits(
        seed=seed, num_train=effort.train, num_validation=effort.validation, num_sft=effort.sft, noise=NOISE
    )
    for part in ("train", "validation", "sft"):
        write_rows(getattr(splits, part), folder / f"{part}.jsonl")
    texts = [text for row in splits.train for text in (row.prompt, row.chosen, row.rejected)]
    # Digits apart, so that a wrong digit is a token of its own.
    make_model(folder / "hf", train_tokenizer(texts, vocab_size=VOCAB_SIZE, merge_digits=False), seed=seed)
    world = World(folder)
    hf_to_megatron(folder / "hf", world.random_start)
    return world


def find_marks(world: World, part: str) -> Marks:
    """Find the marked tokens of all pairs, in the order of the data, chosen before rejected."""
    data, rows, tokenizer = world.data(part), world.rows(part), world.tokenizer()
    pairs, sides, marked, opening = [], [], [], []
    for pair in range(len(data)):
        row = rows[int(data.rows[pair]) - 1]
        for side, spans in ((CHOSEN, right_spans(row)), (REJECTED, row.wrong)):
            end = 0
            for token in data.sequence(pair, side)[data.prompt_lengths[pair] :]:
                start, end = end, end + len(tokenizer.decode([token]))
                marked.append(any(first < end and start < last for first, last in spans))
                opening.append(any(start <= first < end for first, _ in spans))
                pairs.append(pair)
                sides.append(side)
    is_marked, on_rejected = np.array(marked), np.array(sides) == REJECTED
    return Marks(
        pair=np.array(pairs),
        side=np.array(sides),
        wrong=is_marked & on_rejected,
        first_wrong=np.array(opening) & on_rejected,
        kept=~is_marked & on_rejected,
        right=is_marked & ~on_rejected,
    )


def right_spans(row: Row) -> list[list[int]]:
    """Characters of `chosen` that stand where `rejected` is wrong: [start, end) of each."""
    pieces, end = [], 0
    for first, last in row.wrong:
        pieces.append(row.rejected[end:first])
        end = last
    found = re.fullmatch("(.+)".join(map(re.escape, [*pieces, row.rejected[end:]])), row.chosen)
    assert found, row
    return [list(found.span(group)) for group in range(1, 1 + len(row.wrong))]
