"""Whole steps: ours against the authors' computation, cached against live, scoring against training, our model
against HuggingFace's.

    python -m bench.speed.steps

Process CPU seconds at one thread, because wall-clock time on a shared machine measures the others. Both sides of a
ratio run one after the other on the same batch with the same weights. On every batch each program first runs while its
operations are counted, which warms it up. Then all are timed, ours before and after the authors'. Losses are asserted
equal. Ours computes the prompt of a pair once, and the authors' twice, which the operations count. fp32, a body-heavy
model (bench.ours.BODY), 4 pairs to a step with the lengths of real ones, sequences up to 512 tokens.
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
from bench.pairs import VOCABULARY, ultrafeedback_like, with_real_lengths
from bench.process import cpu_seconds, one_rank
from bench.rows import Row
from bench.speed.flops import causal_scores, counted_flops, masked_scores
from bench.speed.limits import COUNTED, NEAR, Timed, within_limit
from bench.theirs import Theirs, read_models
from tgdpo_megatron.data.batch import Batch
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.losses import CHOSEN, REJECTED
from tgdpo_megatron.model.vocabulary import VocabShard

BATCHES, LONGEST, LOSS_LIMIT = 6, 512, 2e-5
AUTHORS = (PAIRS_PER_STEP, 1)
"""Micro-batches of their step, in pairs."""
NEAR_AUTHORS = 0.92
"""Share of the limit that is the target against the authors' computation."""
NEARER = 0.95
"""Share of a limit that is the target for cached against live steps, which hardly differ in what is not counted."""
SEQUENCES, LENGTH, MODEL_REPEATS = 4, 256, 15


def measure() -> list[Row]:
    """All timed rows."""
    with tempfile.TemporaryDirectory() as name, one_rank():
        checkpoints = make_checkpoints(Path(name))
        return [*_steps(with_real_lengths(LONGEST), checkpoints), _model(checkpoints)]


def _steps(data: PreparedPairs, checkpoints: Checkpoints) -> list[Row]:
    """Rows of whole steps."""
    batches = [
        list(range(first, first + PAIRS_PER_STEP)) for first in range(0, PAIRS_PER_STEP * BATCHES, PAIRS_PER_STEP)
    ]
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
    ours: dict[str, Callable[[list[int]], Any]] = {
        "live": live.step,
        "score": partial(cached.score, frozen),
        "cached": cached.step,
    }
    authors = {str(size): partial(one.step, data, micro_batch=size) for size, one in theirs.items()}
    programs = ours | authors
    timed = {name: Timed() for name in programs}
    difference, needed = 0.0, 0
    for batch in batches:
        cost = {name: counted_flops(run, batch) for name, run in programs.items()}
        losses = []
        for name in (*ours, *authors, *reversed(ours)):
            spent, loss = cpu_seconds(programs[name], batch)
            timed[name].seconds.append(spent)
            timed[name].cost.append(cost[name])
            losses += [loss] if name != "score" else []
        difference = max(difference, max(losses) - min(losses))
        needed += _needed_operations(data, batch, cached.batches(batch))
    assert difference <= LOSS_LIMIT, f"losses differ by {difference:.1e}"

    around = timed["cached"].mean_of_two()  # of what ran before and after the authors'
    executed = sum(around.cost)
    return [
        *(
            within_limit(
                f"TGDPO step, CPU time: the authors' computation with {_pairs(size)} to a micro-batch, against ours",
                timed[str(size)],
                around,
                at_most=False,
                share=NEAR_AUTHORS,
                limit=COUNTED,
                note=f"ours: cached scores, packed, shared prompts; losses equal to {difference:.0e}",
            )
            for size in AUTHORS
        ),
        within_limit(
            "our TGDPO step, CPU time: cached scores against live frozen models",
            timed["cached"],
            timed["live"],
            at_most=True,
            share=NEARER,
            limit=COUNTED,
            note="the making of the cache is not counted",
        ),
        within_limit(
            "tokens per second: scoring with one frozen model against training with cached scores",
            timed["cached"],
            timed["score"],
            at_most=False,
            share=NEAR,
            limit=COUNTED,
            note="forward passes alone, without writing files",
        ),
        Row(
            "operations of our cached TGDPO step against what its tokens need",
            executed / needed,
            target=1.01,
            limit="1: three products for each weight and token, seven of attention, and the logits once more where "
            "they are too many to keep",
            note=f"{executed / BATCHES / 1e9:.0f} billion operations in a step",
        ),
    ]


def _pairs(number: int) -> str:
    return f"{number} pair{'s' if number > 1 else ''}"


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

    programs = {"ours": run_ours, "hf": run_hf}
    cost = {name: counted_flops(run) for name, run in programs.items()}  # warms up
    timed = {name: Timed(cost=[cost[name]] * MODEL_REPEATS) for name in programs}
    for repeat in range(MODEL_REPEATS):
        losses = []
        for name in list(programs) if repeat % 2 else list(programs)[::-1]:
            spent, loss = cpu_seconds(programs[name])
            losses.append(loss)
            timed[name].seconds.append(spent)
        assert abs(losses[0] - losses[1]) < LOSS_LIMIT, losses
    return within_limit(
        f"model forward and backward, CPU time: Megatron's modules against HuggingFace's, {SEQUENCES} sequences of "
        f"{LENGTH} tokens",
        timed["ours"],
        timed["hf"],
        at_most=True,
        share=NEAR,
        limit=COUNTED,
        note="the logits fit one tile of our head, which keeps them",
    )


def _needed_operations(data: PreparedPairs, pairs: Sequence[int], micro_batches: Sequence[Batch]) -> int:
    """What a step needs: every token that predicts another through the body, labelled ones through the head.

    The prompt of a pair goes through the body once, and the rejected response sees it. A product goes forward, and back
    to inputs and to weights. Attention is two products forward and, since its weights are not kept, five backward, over
    the queries and keys that torch's kernel is given to compute. Where the logits of a micro-batch are too many to
    keep, the head computes them a second time in backward.
    """
    hidden, layers = BODY["hidden_size"], BODY["num_hidden_layers"]
    tokens = scores = 0
    for pair in pairs:
        chosen, rejected = (len(data.sequence(pair, side)) - 1 for side in (CHOSEN, REJECTED))
        own = rejected - int(data.prompt_lengths[pair])
        tokens += chosen + own
        scores += causal_scores(chosen) + masked_scores(own, rejected)
    body = layers * (4 * hidden**2 + 3 * hidden * BODY["intermediate_size"])
    vocabulary = VocabShard(0, VOCABULARY)
    head = 0
    for batch in micro_batches:
        labels = len(batch.labels)
        kept = len(list(vocabulary.tiles(labels, batch.labels.device))) == 1
        head += (3 if kept else 4) * hidden * VOCABULARY * labels
    return 2 * (3 * body * tokens + head + 7 * layers * hidden * scores)


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
