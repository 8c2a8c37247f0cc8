"""Train and measure one model of the token-credit benchmark with the product's engine, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.credit.measures import detection, exact_match, moved, preference_accuracy
from bench.credit.methods import GUIDANCE, LEARNING_RATE, SOURCES, Method
from bench.credit.world import PARTS, Effort, World, find_marks, make_world, right_spans
from recipes.tiny import dpo_tiny, sft_tiny
from tgdpo_megatron.checkpoint.manifest import describe, read_manifest
from tgdpo_megatron.checkpoint.state import save_checkpoint
from tgdpo_megatron.config import Config, LossConfig, complete
from tgdpo_megatron.data.batch import make_batch, rank_batches
from tgdpo_megatron.data.formats import read_pairs
from tgdpo_megatron.data.order import global_batch
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.token_scores import TokenScores
from tgdpo_megatron.engine import Engine, build_engine
from tgdpo_megatron.losses import CHOSEN, REJECTED
from tgdpo_megatron.pair_losses import PreferenceLoss
from tgdpo_megatron.report.metrics import averages
from tgdpo_megatron.scores.contrastive import PROMPT_KINDS, contrastive_sequences, read_prompts
from tgdpo_megatron.scores.reward_file import read_reward_file
from tools.demo.journal import SFT_LR

PROMPTS = Path(__file__).with_name("prompts.yaml")
_AT_ONCE = 64

Result = dict[str, Any]
"""JSON types."""


def prepare(folder: Path, seed: int, effort: Effort) -> Result:
    """Make a seed's world: fine-tune the start, train the guidance, score every token with every source.

    Returns:
        How good the start is, how well each source finds the wrong tokens, and the guidance's own run, as of `run`.
    """
    world = make_world(folder, seed, effort)
    config = sft_tiny()
    config.train.train_iters, config.train.seed, config.optimizer.lr = effort.sft_steps, seed, SFT_LR
    config.optimizer.lr_warmup_iters, config.optimizer.lr_warmup_fraction = min(10, effort.sft_steps - 1), None
    engine = _build(config, world.random_start, frozen=[])
    take_steps(engine, world.data("sft"), None)
    manifest = replace(read_manifest(world.random_start), iteration=effort.sft_steps)
    save_checkpoint(
        world.start, engine.chunks, engine.optimizer, engine.scheduler, companions=world.random_start, manifest=manifest
    )
    for part in PARTS:
        logps, likeliest = read_tokens(engine, world.data(part))
        scores = {"reference": logps, "likeliest": likeliest, **_contrastive(engine, world, part)}
        world.save(part, scores | {"reward": _known_mistakes(world, part)})

    more_sft = _config(replace(GUIDANCE, loss=LossConfig(type="sft")), seed, effort)
    engine = _build(more_sft, world.start, frozen=[])
    take_steps(engine, world.data("train"), None)
    _add_scores(engine, world, "sft_guidance")

    guided = run(folder, seed, GUIDANCE, effort, and_then=lambda engine: _add_scores(engine, world, "guidance"))
    marks = {part: find_marks(world, part) for part in PARTS}
    held_out = world.load("validation")
    return {
        "seed": seed,
        "wrong_share": float(marks["validation"].wrong.sum() / (marks["validation"].side == REJECTED).sum()),
        "start": {
            "accuracy": preference_accuracy(held_out["reference"], marks["validation"]),
            "exact": exact_match(held_out["likeliest"], marks["validation"]),
        },
        "sources": {
            source: {part: asdict(detection(_rewards(source, world.load(part), seed), marks[part])) for part in PARTS}
            for source in SOURCES
        },
        "run": guided,
    }


def run(
    folder: Path, seed: int, method: Method, effort: Effort, and_then: Callable[[Engine], None] | None = None
) -> Result:
    """Train with one method from the seed's start.

    Returns:
        Loss of every step; held-out preference accuracy and exact match of every evaluated one; what moved; how well
        the trained model's own log-ratio to the start finds the wrong tokens.
    """
    world = World(folder)
    config = _config(method, seed, effort)
    engine = _build(config, world.start, frozen=[world.start] if _is_live(config) else [])
    data, scores = world.data("train"), None
    if config.scores.cached:
        kept = world.load("train")
        if method.only_wrong:
            kept["reward"] = np.minimum(kept["reward"], 0)
        scores = TokenScores.of(data, {name: kept[name] for name in config.loss.scores})
    validation, marks, before = world.data("validation"), find_marks(world, "validation"), world.load("validation")
    accuracy = {0: preference_accuracy(before["reference"], marks)}
    exact = {0: exact_match(before["likeliest"], marks)}
    after = before["reference"]

    def evaluate(step: int) -> None:
        nonlocal after
        if step % effort.eval_interval == 0 or step == effort.steps:
            after, likeliest = read_tokens(engine, validation)
            accuracy[step], exact[step] = preference_accuracy(after, marks), exact_match(likeliest, marks)

    steps = take_steps(engine, data, scores, evaluate)
    if and_then:
        and_then(engine)
    return {
        "seed": seed,
        "method": method.name,
        "losses": [step["loss"] for step in steps],
        "accuracy": accuracy,
        "exact": exact,
        "moved": moved(before["reference"], after, marks),
        "own_credit": asdict(detection(after - before["reference"], marks)),
    }


def read_tokens(
    engine: Engine, data: PreparedPairs, sides: tuple[int, ...] = (CHOSEN, REJECTED)
) -> tuple[np.ndarray, np.ndarray]:
    """Log-prob of every response token under the policy, nats, and whether no other token is likelier. Both [N]."""
    (model,) = engine.chunks
    logps, likeliest = [], []
    with torch.no_grad():
        for first in range(0, len(data), _AT_ONCE):
            batch = make_batch(data, range(first, min(first + _AT_ONCE, len(data))), sides=sides)
            states = model.decode(batch, None)[:, 0][batch.predictors]
            logits = states @ model.output_weight()[: model.description.vocab_size].T
            logps.append(logits.log_softmax(-1).gather(1, batch.labels[:, None])[:, 0])
            likeliest.append(logits.argmax(-1) == batch.labels)
    return torch.cat(logps).numpy(), torch.cat(likeliest).numpy()


def _config(method: Method, seed: int, effort: Effort) -> Config:
    config = dpo_tiny()
    config.loss, config.optimizer.lr = method.loss, LEARNING_RATE
    config.train.train_iters, config.train.seed, config.train.micro_batch_size = effort.steps, seed, 32
    config.optimizer.lr_warmup_iters, config.optimizer.lr_warmup_fraction = min(5, effort.steps - 1), None
    config.scores.source = "cached" if config.loss.scores and not _is_live(config) else "live"
    return complete(config, where="bench.credit")


def _is_live(config: Config) -> bool:
    """Whether the reference must ride along: where no cache could hold what is read of it."""
    return "divergence" in config.loss.method.reads


def _build(config: Config, start: Path, *, frozen: list[Path]) -> Engine:
    return build_engine(config, describe(start), loss=PreferenceLoss(config), start=start, frozen=frozen)


def take_steps(
    engine: Engine,
    data: PreparedPairs,
    scores: TokenScores | None,
    after_step: Callable[[int], None] = lambda step: None,
    *,
    find_scales: bool = False,
) -> list[dict[str, float]]:
    """All steps, as recipes.train takes them. Returns the metrics of each.

    Args:
        find_scales: Before the first step, as recipes.train does for delayed FP8 scaling.
    """
    config, metrics = engine.config, []
    sides, device = config.loss.method.sides, engine.device
    for iteration in range(config.train.train_iters):
        picked = global_batch(
            iteration,
            num_pairs=len(data),
            global_batch_size=config.train.global_batch_size,
            seed=config.train.seed,
            shuffle=True,
        )
        made = rank_batches(data, picked, config, sides=sides, rank=0, ranks=1, device=device, scores=scores)
        if find_scales and iteration == 0:
            engine.find_scales(made)
        engine.zero_grad()
        totals = engine.forward_backward(made)
        engine.update()
        metrics.append(averages(totals))
        after_step(iteration + 1)
    return metrics


def _add_scores(engine: Engine, world: World, name: str) -> None:
    for part in PARTS:
        world.save(part, world.load(part) | {name: read_tokens(engine, world.data(part))[0]})


def _contrastive(engine: Engine, world: World, part: str) -> dict[str, np.ndarray]:
    """Log-probs of every response under both prompts, as recipes.score computes them. Each [N]."""
    data = world.data(part)
    texts = {text.row: text for text in read_pairs(world.folder / f"{part}.jsonl", None).pairs}
    sequences, keys, too_long = contrastive_sequences(
        data,
        range(len(data)),
        [texts[int(row)] for row in data.rows],
        world.tokenizer(),
        read_prompts(PROMPTS),
        longest=1024,
    )
    assert not too_long
    logps, _ = read_tokens(engine, sequences, sides=(CHOSEN,))
    lengths = [sequences.response_length(sample, CHOSEN) for sample in range(len(sequences))]
    pieces = np.split(logps, np.cumsum(lengths)[:-1])
    # Pair after pair, chosen before rejected, as in the data; both prompts of a response follow each other.
    return {
        name: np.concatenate([piece for key, piece in zip(keys, pieces, strict=True) if key.name == name])
        for name in PROMPT_KINDS
    }


def _known_mistakes(world: World, part: str) -> np.ndarray:
    """−1 on what is wrong, 1 on what stands there in the chosen response, 0 elsewhere. [N]

    Through a reward file, the way a user gives rewards.
    """
    path = world.folder / f"{part}-rewards.jsonl"
    lines = [
        {
            "row": number,
            "chosen": [[*span, 1.0] for span in right_spans(row)],
            "rejected": [[*span, -1.0] for span in row.wrong],
        }
        for number, row in enumerate(world.rows(part), start=1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return read_reward_file(path, world.data(part), world.tokenizer())


def _rewards(source: str, scores: Mapping[str, np.ndarray], seed: int) -> np.ndarray:
    """r̂ of a source but for its scale, which changes no ranking. [N]"""
    if source == "random":
        return np.random.default_rng(seed).normal(size=len(scores["reference"]))
    if source == "surprise":
        return scores["reference"]
    if source == "contrastive":
        return scores["better"] - scores["worse"]
    if source == "file":
        return scores["reward"]
    return scores[source] - scores["reference"]
