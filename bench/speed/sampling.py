"""Sampling in batches against one prompt at a time: the same model, prompts and seeds, in this process.

    python -m bench.speed.sampling

Both sides are the sampler that tools.sample has, once with its batches and once with batches of one answer, measured
one after the other in each round. Prompts have many lengths, and answers end where the model ends them or at the
longest, so that a batch pads prompts and waits for its longest answer. CPU seconds of one thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.files import program
from bench.process import cpu_seconds
from bench.rows import Row, paired
from tgdpo_megatron.data.formats import read_pairs

PAIRS = Path(__file__).resolve().parents[2] / "docs" / "example" / "pairs.jsonl"
"""Their texts make the tokenizer."""
SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 6}
PROMPTS, SAMPLES, LONGEST = 16, 5, 64
ROUNDS = 3
FASTER = 3.0


def measure() -> Iterator[Row]:
    """Tokens per second of one over the other."""
    from tgdpo_megatron.sampling.engine import Answer, Engine, Request, Sampling, open_engine

    torch.set_num_threads(1)
    settings = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=LONGEST)
    random = np.random.default_rng(0)

    def sampled(engine: Engine, requests: list[Request]) -> list[Answer]:
        return list(engine.answers(requests))

    with tempfile.TemporaryDirectory() as folder:
        _make_model(Path(folder))
        batched, alone = (open_engine(folder, batch_size=size) for size in (32, 1))
        prompts = [tuple(random.integers(6, 280, length).tolist()) for length in random.integers(20, 200, PROMPTS)]
        rates: dict[str, list[float]] = {"batched": [], "alone": []}
        same = []
        for seed in range(ROUNDS):
            requests = [Request(ids, sample, seed, settings) for ids in prompts for sample in range(SAMPLES)]
            answers = {}
            for name, engine in (("batched", batched), ("alone", alone)):
                sampled(engine, [replace(requests[0], settings=replace(settings, max_new_tokens=2))])
                seconds, answers[name] = cpu_seconds(sampled, engine, requests)
                rates[name].append(sum(answer.num_tokens for answer in answers[name]) / seconds)
            same += [one.ids == other.ids for one, other in zip(*answers.values(), strict=True)]
    yield paired(
        "tokens per second: answers in batches of 32 over one at a time",
        rates["batched"],
        rates["alone"],
        target=FASTER,
        at_most=False,
        limit="32 where a step takes as long for a batch as for one answer, as on a GPU; less where it computes",
        note=f"{max(rates['batched']):.0f} against {max(rates['alone']):.0f} tokens per second at best; "
        f"{np.mean(same):.1%} of the answers are the same tokens",
    )


def _make_model(folder: Path) -> None:
    from tools.make_tiny_model import make_model, train_tokenizer

    texts = [text for pair in read_pairs(PAIRS).pairs for text in pair.texts]
    make_model(folder, train_tokenizer(texts, vocab_size=1000), **SHAPE)


if __name__ == "__main__":
    program(__doc__, measure)
