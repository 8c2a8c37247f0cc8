"""Whole training jobs in one set of ranks: Python start-up is paid once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.settings import RECIPES
from tgdpo_megatron.config import load
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.platform.processes import Ranks


def train_all(ranks: Ranks, *, recipe: str, jobs: list[dict[str, Any]]) -> list[list[dict[str, float]]]:
    """Run training jobs one after another; return the metrics of each."""
    import json

    from megatron.core import parallel_state

    from tgdpo_megatron.train import train

    metrics = []
    for changes in jobs:
        train(load(RECIPES[recipe](), changes, where="test"), ranks)
        parallel_state.destroy_model_parallel()
        lines = (Path(changes["train"]["output"]) / "metrics.jsonl").read_text().splitlines()
        steps = [line for line in map(json.loads, lines) if line["iteration"]]  # 0: held-out pairs before the first
        metrics.append(steps)
    return metrics


def train_each(ranks: Ranks, *, recipe: str, jobs: list[dict[str, Any]]) -> list[str]:
    """Run training jobs one after another, refused ones too; return the sentence each was refused with, or "".

    Beside its settings a job may have `altered`, a checkpoint in which one bit is flipped first, `lost`, a file that is
    deleted first, and `no_room_for`, the name of a file that finds the disk full.
    """
    from megatron.core import parallel_state

    from tgdpo_megatron.train import train

    said = []
    for job in jobs:
        settings = dict(job)
        if altered := settings.pop("altered", None):
            flip_a_bit(Path(altered))
        if lost := settings.pop("lost", None):
            Path(lost).unlink()
        try:
            with _full_disk(settings.pop("no_room_for", None)):
                train(load(RECIPES[recipe](), settings, where="test"), ranks)
            said.append("")
        except (UserError, OSError) as refusal:
            said.append(str(refusal))
        parallel_state.destroy_model_parallel()
    return said


def flip_a_bit(checkpoint: Path) -> None:
    """Change the last bit of one weight, wherever it is stored. The file stays readable, the weight finite."""
    import torch
    import torch.distributed.checkpoint as dcp

    from tgdpo_megatron.checkpoint.manifest import describe

    name, weights = "decoder.final_layernorm.weight", checkpoint / "weights"
    stored = {name: torch.empty(describe(checkpoint).hidden_size)}
    dcp.load(stored, storage_reader=dcp.FileSystemReader(weights), no_dist=True)
    before = stored[name].numpy().tobytes()
    after = bytes([before[0] ^ 1]) + before[1:]
    for file in weights.glob("*.distcp"):
        file.write_bytes(file.read_bytes().replace(before, after))


@contextlib.contextmanager
def _full_disk(name: str | None) -> Iterator[None]:
    """No file of that name can be written."""
    write = Path.write_text

    def refuse(self: Path, *arguments: Any, **settings: Any) -> int:
        if self.name == name:
            raise OSError(28, "No space left on device")
        return write(self, *arguments, **settings)

    Path.write_text = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        Path.write_text = write  # type: ignore[method-assign]


def distribution(
    ranks: Ranks, *, folder: str, ids: list[int], parallel: dict[str, Any], output: str, precision: str = "fp32"
) -> None:
    """Save a checkpoint's log-probs of the whole vocabulary after each of some tokens, [tokens, vocabulary]."""
    import torch
    from megatron.core import parallel_state

    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.checkpoint.state import load_weights
    from tgdpo_megatron.config import Config
    from tgdpo_megatron.data.attention_plan import AttentionPlan
    from tgdpo_megatron.data.batch import Batch
    from tgdpo_megatron.engine import token_logps
    from tgdpo_megatron.losses import Pairs
    from tgdpo_megatron.model.build import build_model, transformer_config
    from tgdpo_megatron.platform.processes import initialize_model_parallel

    config = load(Config(), {"parallel": parallel, "train": {"precision": precision}}, where="test")
    initialize_model_parallel(config.parallel, seed=1)
    description = describe(Path(folder))
    chunks = build_model(description, transformer_config(description, config))
    load_weights(chunks, Path(folder))
    vocab = description.vocab_size
    predictors = torch.arange(len(ids)).repeat_interleave(vocab)  # each place has every token as a label
    batch = Batch(
        tokens=torch.tensor(ids),
        positions=torch.arange(len(ids)),
        plan=AttentionPlan.plain([len(ids)]),
        predictors=predictors,
        labels=torch.arange(vocab).repeat(len(ids)),
        pairs=Pairs(torch.zeros_like(predictors), torch.zeros_like(predictors), num_pairs=1),
        scores={},
        samples=(0,),
    )
    outputs = token_logps(chunks, [batch.to(ranks.device)], config)
    if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
        torch.save(outputs[0][0].cpu().view(len(ids), vocab), output)
    parallel_state.destroy_model_parallel()


def train_and_look(ranks: Ranks, *, recipe: str, job: dict[str, Any], looks: list[dict[str, Any]]) -> None:
    """Train, then save distributions of the result and of other checkpoints."""
    train_all(ranks, recipe=recipe, jobs=[job])
    for look in looks:
        distribution(ranks, **look)


def loading_says(ranks: Ranks, *, folders: list[str]) -> list[str]:
    """The sentence with which each checkpoint of a model is refused where training loads it; "" where it is loaded."""
    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.checkpoint.state import load_weights
    from tgdpo_megatron.config import Config
    from tgdpo_megatron.model.build import build_model, transformer_config
    from tgdpo_megatron.platform.processes import initialize_model_parallel

    config = load(Config(), {"train": {"precision": "fp32"}}, where="test")
    initialize_model_parallel(config.parallel, seed=1)
    description = describe(Path(folders[0]))
    chunks, said = build_model(description, transformer_config(description, config)), []
    for folder in folders:
        try:
            load_weights(chunks, Path(folder))
            said.append("")
        except UserError as refusal:
            said.append(str(refusal))
    return said


def packed_logps(
    ranks: Ranks, *, folder: str, packs: list[list[list[int]]], precision: str = "fp32"
) -> list[list[list[float]]]:
    """Log-probs of every token of some sequences, packed as asked. Pack -> sequence -> token."""
    import numpy as np

    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.checkpoint.state import load_weights
    from tgdpo_megatron.config import Config
    from tgdpo_megatron.data.batch import make_batch
    from tgdpo_megatron.data.prepare import PreparedPairs, Summary
    from tgdpo_megatron.engine import token_logps
    from tgdpo_megatron.losses import CHOSEN
    from tgdpo_megatron.model.build import build_model, transformer_config
    from tgdpo_megatron.platform.processes import initialize_model_parallel

    config = load(Config(), {"train": {"precision": precision}}, where="test")
    initialize_model_parallel(config.parallel, seed=1)
    description = describe(Path(folder))
    chunks = build_model(description, transformer_config(description, config))
    load_weights(chunks, Path(folder))
    found = []
    for pack in packs:
        twice = [sequence for sequence in pack for _ in range(2)]
        data = PreparedPairs(
            tokens=np.concatenate(twice).astype(np.int32),
            starts=np.cumsum([0, *map(len, twice)]).astype(np.int64),
            prompt_lengths=np.ones(len(pack), dtype=np.int32),
            hashes=np.zeros((len(pack), 32), dtype=np.uint8),
            rows=np.arange(len(pack)),
            summary=Summary(source="test"),
        )
        batch = make_batch(data, range(len(pack)), sides=(CHOSEN,)).to(ranks.device)
        (logps,) = token_logps(chunks, [batch], config)
        found.append([logps[0][batch.pairs.pair == place].tolist() for place in range(len(pack))])
    return found


def score_all(ranks: Ranks, *, recipe: str, jobs: list[dict[str, Any]]) -> list[list[str]]:
    """Run scoring jobs one after another; return the shards of the training pairs that are there after each."""
    from megatron.core import parallel_state

    from tgdpo_megatron.score import score

    shards = []
    for changes in jobs:
        score(load(RECIPES[recipe](), changes, where="test"), ranks)
        parallel_state.destroy_model_parallel()
        shards.append(sorted(path.name for path in Path(changes["scores"]["path"]).glob("train/scores-*")))
    return shards


def score_and_train(ranks: Ranks, *, recipe: str, scoring: list[dict[str, Any]], jobs: list[dict[str, Any]]) -> Any:
    """Score, then train; return the metrics of each training job."""
    score_all(ranks, recipe=recipe, jobs=scoring)
    return train_all(ranks, recipe=recipe, jobs=jobs)
