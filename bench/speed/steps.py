"""Whole steps: ours against the authors' computation, cached against live, scoring against training, our model
against HuggingFace's.

    python -m bench.speed.steps

Process CPU seconds at one thread, because wall-clock time on a shared machine measures the others. Both sides of a
ratio run one after the other on the same batch with the same weights; the row is the median of the ratios, and its
limit the same ratio of the operations that both sides execute, counted. Losses are asserted equal. fp32, a body-heavy
model (bench.ours.BODY), 4 real pairs to a step, sequences up to 512 tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.files import program
from bench.ours import BODY, LEARNING_RATE, LOSS, PAIRS_PER_STEP, ROLES, Checkpoints, Ours, make_checkpoints
from bench.pairs import VOCABULARY, real_file, real_pairs, real_tokenizer, ultrafeedback_like
from bench.process import cpu_seconds, one_rank
from bench.rows import Row, paired
from bench.speed.flops import counted_flops
from bench.theirs import Theirs, read_models
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.losses import CHOSEN, REJECTED

BATCHES, LONGEST, LOSS_LIMIT = 6, 512, 2e-5
AUTHORS = {PAIRS_PER_STEP: 2.8, 1: 1.8}
"""Their micro-batch, in pairs -> how many times as long their step must take."""
COUNTED = "operations counted"
SEQUENCES, LENGTH, MODEL_REPEATS = 8, 256, 7


def measure() -> list[Row]:
    """All timed rows."""
    with tempfile.TemporaryDirectory() as name, one_rank():
        folder = Path(name)
        checkpoints = make_checkpoints(folder)
        source = real_file()
        if source is None:
            data, words = ultrafeedback_like(PAIRS_PER_STEP * (BATCHES + 1), longest=LONGEST), "UltraFeedback-like"
        else:
            data, words = real_pairs(source, real_tokenizer(source), LONGEST, folder / "pairs"), "real pairs"
        return [*_steps(data, checkpoints, words), _model(checkpoints)]


def _steps(data: PreparedPairs, checkpoints: Checkpoints, words: str) -> list[Row]:
    """Rows of whole steps. The first batch warms up and is not counted."""
    starts = range(0, PAIRS_PER_STEP * (BATCHES + 1), PAIRS_PER_STEP)
    batches = [list(range(first, first + PAIRS_PER_STEP)) for first in starts]
    cached, live = (Ours(data, checkpoints, cached=cached) for cached in (True, False))
    cached.cache_scores([pair for batch in batches for pair in batch])
    frozen = cached.frozen_model("reference")
    theirs = {
        size: Theirs(
            read_models([checkpoints.hf[role] for role in ROLES]),
            beta=LOSS.beta,
            alpha=LOSS.alpha,
            beta_r=LOSS.reward_options["beta_r"],
            lr=LEARNING_RATE,
        )
        for size in AUTHORS
    }
    programs: dict[str | int, Callable[[list[int]], Any]] = {"cached": cached.step, "live": live.step}
    programs |= {size: partial(theirs[size].step, data, micro_batch=size) for size in AUTHORS}
    seconds: dict[str | int, list[float]] = {name: [] for name in (*programs, "score")}
    difference = 0.0
    for number, batch in enumerate(batches):
        losses = []
        in_turn = list(programs) if number % 2 else list(programs)[::-1]  # no side is always the first
        for name in in_turn:
            spent, loss = cpu_seconds(programs[name], batch)
            seconds[name].append(spent)
            losses.append(loss)
        seconds["score"].append(cpu_seconds(cached.score, frozen, batch)[0])
        difference = max(difference, max(losses) - min(losses))
    assert difference <= LOSS_LIMIT, f"losses differ by {difference:.1e}"

    seconds = {name: values[1:] for name, values in seconds.items()}
    counted = batches[1:]
    flops = {name: sum(counted_flops(step, batch) for batch in counted) for name, step in programs.items()}
    flops["score"] = sum(counted_flops(cached.score, frozen, batch) for batch in counted)
    least = sum(_least_flops(data, batch) for batch in counted)
    rows = [
        paired(
            f"TGDPO step, authors' at micro-batch {size} / ours cached and packed",
            seconds[size],
            seconds["cached"],
            target=target,
            at_most=False,
            limit=f"{COUNTED}: {flops[size] / flops['cached']:.2f}",
            note=f"{words}, losses equal to {difference:.0e}",
        )
        for size, target in AUTHORS.items()
    ]
    return [
        *rows,
        paired(
            "our step, cached / live",
            seconds["cached"],
            seconds["live"],
            target=0.63,
            limit=f"{COUNTED}: {flops['cached'] / flops['live']:.3f}",
            note="the making of the cache not counted",
        ),
        paired(
            "scoring one frozen model / training, tokens per second",
            seconds["cached"],
            seconds["score"],
            target=2.6,
            at_most=False,
            limit=f"{COUNTED}: {flops['cached'] / flops['score']:.2f}",
            note="forward passes alone, without writing",
        ),
        Row(
            "operations of our cached step / what its tokens need",
            flops["cached"] / least,
            target=1.01,
            limit="1: 3 products a weight and token, 7 an attended pair of tokens",
            note=f"{flops['cached'] / len(counted) / 1e9:.0f} GFLOP a step",
        ),
    ]


def _model(checkpoints: Checkpoints) -> Row:
    """Forward and backward of mean cross-entropy over the same sequences, without optimizer."""
    from transformers import LlamaForCausalLM

    from tgdpo_megatron.data.batch import make_batch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    data = _sequences(tokens)
    hf: Any = LlamaForCausalLM.from_pretrained(
        checkpoints.hf["policy"], dtype=torch.float32, attn_implementation="sdpa"
    )
    ours = Ours(data, checkpoints, cached=True)
    policy = ours.engine.chunks[0]
    batch = make_batch(data, range(SEQUENCES), sides=(CHOSEN,))

    def run_hf() -> float:
        hf.zero_grad()
        loss = hf(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    def run_ours() -> float:
        ours.engine.zero_grad()
        policy.set_input_tensor([None])
        loss = -policy(batch)[0].mean()
        loss.backward()
        return float(loss.detach())

    seconds: dict[str, list[float]] = {"ours": [], "hf": []}
    for repeat in range(1 + MODEL_REPEATS):
        losses = []
        for name in list(seconds) if repeat % 2 else list(seconds)[::-1]:
            spent, loss = cpu_seconds(run_ours if name == "ours" else run_hf)
            losses.append(loss)
            if repeat:  # the first warms up
                seconds[name].append(spent)
        assert abs(losses[0] - losses[1]) < LOSS_LIMIT, losses
    flops = counted_flops(run_ours) / counted_flops(run_hf)
    return paired(
        f"model forward and backward, Megatron / HuggingFace, {SEQUENCES} × {LENGTH} tokens",
        seconds["ours"],
        seconds["hf"],
        target=1.05,
        limit=f"{COUNTED}: {flops:.3f}",
        note="the logits fit one tile of our head, which keeps them",
    )


def _least_flops(data: PreparedPairs, pairs: Sequence[int]) -> int:
    """What a step needs: every token that predicts another through the body, labelled ones through the head.

    A product goes forward, and back to inputs and to weights. Causal attention is two products forward and, since
    its weights are not kept, five backward, over half of the square.
    """
    hidden, layers = BODY["hidden_size"], BODY["num_hidden_layers"]
    lengths = [len(data.sequence(pair, side)) - 1 for pair in pairs for side in (CHOSEN, REJECTED)]
    labels = sum(data.response_length(pair, side) for pair in pairs for side in (CHOSEN, REJECTED))
    body = layers * (4 * hidden**2 + 3 * hidden * BODY["intermediate_size"])
    attention = layers * hidden * sum(length**2 for length in lengths)
    return 3 * 2 * (body * sum(lengths) + hidden * VOCABULARY * labels) + 7 * attention


def _sequences(tokens: torch.Tensor) -> PreparedPairs:
    """Sequences as pairs whose first token is the prompt, so that all others are labelled."""
    number, length = tokens.shape
    return replace(
        ultrafeedback_like(number),
        tokens=tokens.repeat_interleave(2, dim=0).flatten().int().numpy(),
        starts=length * torch.arange(2 * number + 1).numpy(),
        prompt_lengths=torch.ones(number, dtype=torch.int32).numpy(),
    )


if __name__ == "__main__":
    program(__doc__, measure)
