"""How much memory of its own a rank takes to read its share of a large set of pairs with cached scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tgdpo_megatron.config import Config, LossConfig, ScoresConfig, TrainConfig
from tgdpo_megatron.data.batch import rank_batches
from tgdpo_megatron.data.prepare import PreparedPairs, Summary, load_prepared, save_prepared
from tgdpo_megatron.data.token_scores import ScoresManifest
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.platform.processes import Ranks
from tgdpo_megatron.report.pace import Pace
from tgdpo_megatron.scores.store import Key, load_scores, write_scores_manifest, write_shard

NAMES = ("reference", "guidance")
PROMPT, RESPONSE = 10, 90
MODEL = ModelDescription(3, 64, 160, 4, 2, 16, 512, 256, 1e-5, False, 10000.0, None)
SHARD = 1024
"""Pairs of a shard."""


def own_bytes() -> int:
    """Memory that this process shares with no other and with no file."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def write_set(folder: Path, pairs: int) -> int:
    """Made-up pairs that share their prompts, and their scores, each a function of its place. Returns their bytes."""
    random = np.random.default_rng(0)
    tokens = np.arange(2 * pairs * (PROMPT + RESPONSE), dtype=np.int32).reshape(pairs, 2, -1)
    tokens[:, 1, :PROMPT] = tokens[:, 0, :PROMPT]
    prepared = PreparedPairs(
        tokens=tokens.ravel(),
        starts=np.arange(2 * pairs + 1) * (PROMPT + RESPONSE),
        prompt_lengths=np.full(pairs, PROMPT, np.int32),
        hashes=random.integers(0, 256, (pairs, 32), np.uint8),
        rows=np.arange(1, pairs + 1),
        prompts=np.zeros((pairs, 8), np.uint8),
        summary=Summary(source="made-up.jsonl", pairs=pairs),
    )
    save_prepared(prepared, folder / "pairs")
    (folder / "scores").mkdir()
    manifest = ScoresManifest(tokenizer="", template="", max_length=PROMPT + RESPONSE, precision="fp32")
    write_scores_manifest(folder / "scores", manifest)
    order = random.permutation(pairs)
    for first in range(0, pairs, SHARD):
        scores = {
            Key(prepared.hashes[pair].tobytes(), side, name): score_of(pair, side, name)
            for pair in order[first : first + SHARD].tolist()
            for side in (0, 1)
            for name in NAMES
        }
        write_shard(folder / "scores", scores)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def score_of(pair: int, side: int, name: str) -> np.ndarray:
    """The scores of a response. [RESPONSE] fp32."""
    return np.float32(pair + side / 2) + np.arange(RESPONSE, dtype=np.float32) * (NAMES.index(name) + 1) / 2**12


def read_share(ranks: Ranks, *, folder: str, per_batch: int = 128) -> list[dict[str, int]]:
    """Each rank opens the set, and lays out and counts steps as training does. By how many bytes it grows, at most.

    Args:
        per_batch: Pairs of a micro-batch, of which each rank has one in a step.

    Returns:
        For each rank: `opened`, `read` and, for comparison, `copied`: after a copy of all tokens.
    """
    import torch.distributed as dist

    before = own_bytes()
    data = load_prepared(Path(folder) / "pairs")
    scores = load_scores(Path(folder) / "scores", data, NAMES)
    found = {"opened": own_bytes() - before, "read": 0}
    config = Config(
        loss=LossConfig(type="tgdpo"),
        scores=ScoresConfig(source="cached"),
        train=TrainConfig(micro_batch_size=per_batch),
    )
    sides, size = config.loss.method.sides, ranks.world_size
    pace = Pace(config, MODEL, data, ranks=size, gpu=None)
    order = np.random.default_rng(1).permutation(len(data))
    for first in range(0, len(order), per_batch * size):
        picked = order[first : first + per_batch * size]
        (batch,) = rank_batches(
            data, picked, config, sides=sides, rank=ranks.rank, ranks=size, device=ranks.device, scores=scores
        )
        for name in NAMES:
            expected = np.concatenate([score_of(pair, side, name) for pair in batch.samples for side in sides])
            assert np.array_equal(batch.scores[name].numpy(), expected)
        read = len(picked) * (PROMPT + 2 * (RESPONSE - 1))
        assert pace.of_step(picked, 1.0)["perf/tokens_per_second"] == read, "prompts are shared"
        found["read"] = max(found["read"], own_bytes() - before)
    copy = data.tokens.copy()
    found["copied"] = own_bytes() - before
    del copy
    everywhere: list[dict[str, int]] = [{}] * ranks.world_size
    dist.all_gather_object(everywhere, found)
    return everywhere
