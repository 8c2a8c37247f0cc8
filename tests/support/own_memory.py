"""How much memory of its own a rank takes to read its share of a large set of pairs with cached scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tgdpo_megatron.data.batch import make_batch
from tgdpo_megatron.data.prepare import PreparedPairs, Summary, load_prepared, save_prepared
from tgdpo_megatron.data.token_scores import ScoresManifest
from tgdpo_megatron.platform.processes import Ranks
from tgdpo_megatron.scores.store import Key, load_scores, write_scores_manifest, write_shard

NAMES = ("reference", "guidance")
PROMPT, RESPONSE = 200, 800
SHARD = 128
"""Pairs of a shard, as scoring writes them."""


def own_bytes() -> int:
    """Memory that this process shares with no other and with no file."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def write_set(folder: Path, pairs: int) -> int:
    """Made-up pairs and their scores, each a function of its place. Returns their bytes."""
    random = np.random.default_rng(0)
    prepared = PreparedPairs(
        tokens=np.arange(2 * pairs * (PROMPT + RESPONSE), dtype=np.int32),
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


def read_share(ranks: Ranks, *, folder: str, per_batch: int = 16) -> list[dict[str, int]]:
    """Each rank opens the set, and makes micro-batches of its share of the pairs. By how many bytes it grows, at most.

    Returns:
        For each rank: `opened`, `read` and, for comparison, `copied`: after a copy of all tokens.
    """
    import torch.distributed as dist

    before = own_bytes()
    data = load_prepared(Path(folder) / "pairs")
    scores = load_scores(Path(folder) / "scores", data, NAMES)
    found = {"opened": own_bytes() - before, "read": 0}
    share = np.random.default_rng(1).permutation(len(data))[ranks.rank :: ranks.world_size].tolist()
    for first in range(0, len(share), per_batch):
        samples = share[first : first + per_batch]
        batch = make_batch(data, samples, scores=scores)
        for name in NAMES:
            expected = np.concatenate([score_of(pair, side, name) for pair in samples for side in (0, 1)])
            assert np.array_equal(batch.scores[name].numpy(), expected)
        found["read"] = max(found["read"], own_bytes() - before)
    copy = data.tokens.copy()
    found["copied"] = own_bytes() - before
    del copy
    everywhere: list[dict[str, int]] = [{}] * ranks.world_size
    dist.all_gather_object(everywhere, found)
    return everywhere
