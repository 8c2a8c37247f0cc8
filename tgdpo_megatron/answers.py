"""Greedy answers of the policy to held-out prompts, at the layout at which it is trained, for the report of a run.

Nothing is cached between tokens: each new token costs a forward pass over the prompts and all tokens before it. That
is slow, and right for a handful of prompts of a model that may fit on no single device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from tgdpo_megatron.config import Config
from tgdpo_megatron.data.batch import Batch, make_batch
from tgdpo_megatron.data.prepare import PreparedPairs, Summary
from tgdpo_megatron.data.tokenizer import special_ids, text_of
from tgdpo_megatron.engine import run_pipeline
from tgdpo_megatron.losses import CHOSEN
from tgdpo_megatron.model.gpt import PreferenceGPT
from tgdpo_megatron.run_folder import ANSWERS


@torch.no_grad()
def greedy_answers(
    chunks: Sequence[PreferenceGPT],
    prompts: Sequence[Sequence[int]],
    config: Config,
    *,
    ends: set[int],
    device: torch.device,
) -> list[list[int]]:
    """The likeliest continuation of each prompt, token by token. Collective.

    Args:
        chunks: This rank's chunks of the policy.
        prompts: Token ids.
        ends: Tokens that end an answer. They are not part of it.

    Returns:
        The answers' token ids, on every rank. An answer ends after report.max_new_tokens, or at the model's last
        position.
    """
    positions = chunks[0].description.max_position_embeddings
    answers: list[list[int]] = [[] for _ in prompts]
    open_ones = [place for place, prompt in enumerate(prompts) if len(prompt) < positions]
    for _ in range(config.report.max_new_tokens):
        if not open_ones:
            break
        batch = _batch([[*prompts[place], *answers[place]] for place in open_ones], config).to(device)
        for place, token in zip(list(open_ones), _next_tokens(chunks, batch, config), strict=True):
            if token in ends:
                open_ones.remove(place)
                continue
            answers[place].append(token)
            if len(prompts[place]) + len(answers[place]) >= positions:
                open_ones.remove(place)
    return answers


def _batch(sequences: Sequence[Sequence[int]], config: Config) -> Batch:
    """Sequences one after another. Each predicts one token, whose label here is only a placeholder."""
    lengths = np.array([[len(sequence) + 1, 0] for sequence in sequences], dtype=np.int64).reshape(-1)
    made = PreparedPairs(
        tokens=np.concatenate([np.asarray([*sequence, 0], dtype=np.int32) for sequence in sequences]),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=np.asarray([len(sequence) for sequence in sequences], dtype=np.int32),
        hashes=np.empty((len(sequences), 0), dtype=np.uint8),
        rows=np.arange(len(sequences), dtype=np.int64),
        summary=Summary(source="", pairs=len(sequences)),
    )
    return make_batch(
        made,
        range(len(sequences)),
        sides=(CHOSEN,),
        align=config.token_multiple,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_ranks=config.parallel.context_parallel_size,
    )


def _next_tokens(chunks: Sequence[PreferenceGPT], batch: Batch, config: Config) -> list[int]:
    """The likeliest next token of each sequence of a batch, on every rank. Collective."""

    def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[..., Tensor]]:
        return model.next_tokens(next(batches)), lambda tokens, non_loss_data: tokens

    stages = config.parallel.pipeline_model_parallel_size
    # The interleaved schedule needs a multiple of the stages; each copy gives the same tokens.
    copies = stages if config.parallel.virtual_pipeline_model_parallel_size else 1
    found = run_pipeline(
        chunks, forward_step, [batch] * copies, config, forward_only=True, collect_non_loss_data=True, alone=True
    )
    tokens: Tensor = found[0].contiguous() if found else torch.empty_like(batch.pairs.pair)
    if stages > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(tokens, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return [int(token) for token in tokens.tolist()]


def _within_budget(prompts: Sequence[Sequence[int]], config: Config) -> Iterator[list[Sequence[int]]]:
    """Prompts in their order, as many together as training puts into a micro-batch; at least one."""
    train = config.train
    budget = train.micro_batch_tokens or 2 * train.micro_batch_size * config.data.max_length
    some: list[Sequence[int]] = []
    for prompt in prompts:
        if some and sum(map(len, [*some, prompt])) + (len(some) + 1) * config.report.max_new_tokens > budget:
            yield some
            some = []
        some.append(prompt)
    if some:
        yield some


def answer_held_out(
    chunks: Sequence[PreferenceGPT], held_out: PreparedPairs, tokenizer: Any, config: Config, device: torch.device
) -> list[dict[str, str]]:
    """Answers to the first held-out prompts: `prompt`, `chosen` and `answer` of each, as text. Collective."""
    count = min(config.report.samples, len(held_out))
    sequences = [held_out.sequence(pair, CHOSEN).tolist() for pair in range(count)]
    prompts = [ids[: int(held_out.prompt_lengths[pair])] for pair, ids in enumerate(sequences)]
    ends = special_ids(tokenizer)
    made = [
        answer
        for some in _within_budget(prompts, config)
        for answer in greedy_answers(chunks, some, config, ends=ends, device=device)
    ]

    def text(ids: list[int]) -> str:
        decoded: str = tokenizer.decode(ids, skip_special_tokens=True)
        return decoded.strip()

    return [
        {"prompt": text_of(tokenizer, prompt), "chosen": text(ids[len(prompt) :]), "answer": text(answer)}
        for ids, prompt, answer in zip(sequences, prompts, made, strict=True)
    ]


def keep_answers(output: Path, answers: Sequence[dict[str, str]], when: str) -> None:
    """Write answers into the folder of a run, beside those that were given to the same prompts before.

    Args:
        when: `before` or `after` training.
    """
    path = output / ANSWERS
    known: dict[str, dict[str, str]] = {}
    if path.is_file():
        known = {answer["prompt"]: answer for answer in json.loads(path.read_text(encoding="utf-8"))}
    kept = [
        known.get(answer["prompt"], {})
        | {"prompt": answer["prompt"], "chosen": answer["chosen"], when: answer["answer"]}
        for answer in answers
    ]
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(kept, indent=2, ensure_ascii=False), encoding="utf-8")
    os.replace(part, path)
