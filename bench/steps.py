"""Whole steps: ours against the authors' computation, cached against live, scoring against training, our model
against HuggingFace's.

    python -m bench.steps

Process CPU seconds at one thread, because wall-clock time on a shared machine measures the others. Both sides of a
ratio run one after the other on the same batch with the same weights; the row is the median of the ratios. Losses
are asserted equal. fp32, a body-heavy model (bench.ours.BODY), 4 real pairs to a step, sequences up to 512 tokens.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.ours import LEARNING_RATE, LOSS, PAIRS_PER_STEP, ROLES, Checkpoints, Ours, make_checkpoints, one_rank
from bench.pairs import NO_DATA, VOCABULARY, real_file, real_pairs, real_tokenizer
from bench.rows import Row, paired, program, skipped
from bench.theirs import Theirs, padded
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.losses import CHOSEN, REJECTED

BATCHES, LOSS_LIMIT = 5, 2e-5
SEQUENCES, LENGTH, MODEL_REPEATS = 8, 256, 7


def measure() -> list[Row]:
    """All timed rows."""
    with tempfile.TemporaryDirectory() as name, one_rank():
        folder = Path(name)
        checkpoints = make_checkpoints(folder)
        rows = []
        source = real_file()
        if source is None:
            rows.append(skipped("TGDPO step, ours against the authors' computation", NO_DATA))
        else:
            data = real_pairs(source, real_tokenizer(source), 512, folder / "pairs")
            rows += _steps(data, checkpoints)
        return [*rows, _model(checkpoints)]


def _steps(data: PreparedPairs, checkpoints: Checkpoints) -> list[Row]:
    """Rows of whole steps. The first batch warms up and is not counted."""
    batches = [list(range(first, first + PAIRS_PER_STEP)) for first in range(0, PAIRS_PER_STEP * (BATCHES + 1), 4)]
    cached, live = (Ours(data, checkpoints, cached=cached) for cached in (True, False))
    cached.cache_scores([pair for batch in batches for pair in batch])
    frozen = cached.frozen_model("reference")
    theirs = {
        size: Theirs(
            [checkpoints.hf[role] for role in ROLES],
            beta=LOSS.beta,
            alpha=LOSS.alpha,
            beta_r=LOSS.token_reward_scale,
            lr=LEARNING_RATE,
        )
        for size in (4, 1)
    }
    programs: dict[str, Callable[[list[int]], Any]] = {
        "cached": cached.step,
        "live": live.step,
        "theirs 4": lambda pairs: theirs[4].step(data, pairs, micro_batch=4),
        "theirs 1": lambda pairs: theirs[1].step(data, pairs, micro_batch=1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*programs, "score")}
    difference = 0.0
    for batch in batches:
        losses = []
        for name, step in programs.items():
            spent, loss = cpu_seconds(step, batch)
            seconds[name].append(spent)
            losses.append(loss)
        seconds["score"].append(cpu_seconds(cached.score, frozen, batch)[0])
        difference = max(difference, max(losses) - min(losses))
    assert difference <= LOSS_LIMIT, f"losses differ by {difference:.1e}"

    seconds = {name: values[1:] for name, values in seconds.items()}
    counted = batches[1:]
    waste = {size: sum(_waste(data, batch, size) for batch in counted) / len(counted) for size in (4, 1)}
    tokens = sum(int(data.lengths((CHOSEN, REJECTED))[batch].sum()) for batch in counted) / len(counted)
    rows = [
        paired(
            f"TGDPO step, authors' at micro-batch {size} / ours cached and packed",
            seconds[f"theirs {size}"],
            seconds["cached"],
            target=target,
            at_most=False,
            limit=f"(10/6) / (1 − {waste[size]:.0%} padding) = {10 / 6 / (1 - waste[size]):.2f}",
            note=f"losses equal to {difference:.0e}",
            details={"tokens per step": tokens},
        )
        for size, target in ((4, 2.8), (1, 1.8))
    ]
    return [
        *rows,
        paired("our step, cached / live", seconds["cached"], seconds["live"], target=0.63, limit="6/10 = 0.60"),
        paired(
            "scoring / training, tokens per second",
            seconds["cached"],
            seconds["score"],
            target=2.6,
            at_most=False,
            limit="(2+4)/2 = 3.0",
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
        spent, mine = cpu_seconds(run_ours)
        spent_hf, theirs = cpu_seconds(run_hf)
        assert abs(mine - theirs) < LOSS_LIMIT, (mine, theirs)
        if repeat:
            seconds["ours"].append(spent)
            seconds["hf"].append(spent_hf)
    return paired(
        f"model forward and backward, Megatron / HuggingFace, {SEQUENCES} × {LENGTH} tokens",
        seconds["ours"],
        seconds["hf"],
        target=1.05,
        limit="the same products: 1",
    )


def cpu_seconds(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Process CPU seconds of some work, and its result."""
    began = time.process_time()
    result = work(*arguments)
    return time.process_time() - began, result


def _waste(data: PreparedPairs, pairs: Sequence[int], micro_batch: int) -> float:
    """Share of padding in what the authors' computation runs over."""
    parts = [padded(data, pairs[first : first + micro_batch])[1] for first in range(0, len(pairs), micro_batch)]
    return 1 - sum(int(mask.sum()) for mask in parts) / sum(mask.numel() for mask in parts)


def _sequences(tokens: torch.Tensor) -> PreparedPairs:
    """Sequences as pairs whose first token is the prompt, so that all others are labelled."""
    from dataclasses import replace

    from bench.pairs import ultrafeedback_like

    number, length = tokens.shape
    return replace(
        ultrafeedback_like(number),
        tokens=tokens.repeat_interleave(2, dim=0).flatten().int().numpy(),
        starts=length * torch.arange(2 * number + 1).numpy(),
        prompt_lengths=torch.ones(number, dtype=torch.int32).numpy(),
    )


if __name__ == "__main__":
    program(__doc__, measure)
