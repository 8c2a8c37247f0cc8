"""Token scores on disk: reference and guidance log-probs of every response token.

A folder holds `manifest.json` (what made the scores) and `scores-*.safetensors`. Pairs are found by the hash of
their token ids, never by position, so the order of the data and the layout that wrote or reads the scores do not
matter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from tgdpo_megatron.errors import UserError

if TYPE_CHECKING:
    from tgdpo_megatron.data.prepare import PreparedPairs

FORMAT = 1
NAMES = ("reference", "guidance")


@dataclass(frozen=True)
class ScoresManifest:
    """What token scores depend on. Two stores with equal manifests hold the same numbers."""

    reference: str
    """Fingerprint of the reference weights."""
    guidance: str | None
    """Fingerprint of the guidance weights, or None where only the reference was scored."""
    tokenizer: str
    template: str
    max_length: int
    pairs_hash: str
    """Hash of all pairs scored."""
    precision: str
    format: int = FORMAT


@dataclass(frozen=True)
class TokenScores:
    """Scores of some pairs, in memory.

    Attributes:
        manifest: What they depend on.
        values: Name (`reference`, `guidance`) -> log-probs, nats, chosen then rejected of each pair. fp32.
        starts: Sample hash -> start of the pair's scores in `values`.
    """

    manifest: ScoresManifest
    values: dict[str, np.ndarray]
    starts: dict[bytes, int]

    def join(self, data: PreparedPairs, samples: Sequence[int], sides: Sequence[int]) -> dict[str, Tensor]:
        """Scores of the labelled tokens of some pairs, in batch order. Name -> [R] fp32."""
        pieces = []
        for sample in samples:
            start = self.starts[data.hashes[sample].tobytes()]
            lengths = [data.response_length(sample, side) for side in (0, 1)]
            begins = [start, start + lengths[0]]
            pieces += [slice(begins[side], begins[side] + lengths[side]) for side in sides]
        return {
            name: torch.from_numpy(np.concatenate([np.empty(0, np.float32), *(values[piece] for piece in pieces)]))
            for name, values in self.values.items()
        }


def write_shard(
    folder: Path, shard: int, hashes: np.ndarray, lengths: np.ndarray, values: dict[str, np.ndarray]
) -> None:
    """Write the scores of some pairs.

    Args:
        hashes: Sample hash of each pair. [n, 32] uint8.
        lengths: Scores of each pair. [n] int64.
        values: Name -> log-probs of the pairs, one after another. [sum of lengths] fp32.
    """
    save_file({"hashes": hashes, "lengths": lengths, **values}, folder / f"scores-{shard:05d}.safetensors")


def write_scores_manifest(folder: Path, manifest: ScoresManifest) -> None:
    """Write the manifest, last of all: a folder without one is not a store."""
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2))


def read_scores_manifest(folder: Path) -> ScoresManifest:
    """Read a store's manifest.

    Raises:
        UserError: Not a finished store, or of another format.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"{folder}: no finished token scores there; write them with python -m recipes.score.")
    try:
        return ScoresManifest(**json.loads(path.read_text()))
    except (TypeError, ValueError):
        raise UserError(f"{path}: not a manifest of token scores; score again.") from None


def check_belongs(found: ScoresManifest, expected: ScoresManifest, folder: Path) -> None:
    """Refuse scores that were made from something else, naming what differs.

    A field that is None in `expected` is not compared.

    Raises:
        UserError: With the differing field and both values.
    """
    names = {
        "format": "format",
        "reference": "reference weights",
        "guidance": "guidance weights",
        "tokenizer": "tokenizer",
        "template": "chat template",
        "max_length": "data.max_length",
        "pairs_hash": "pairs",
        "precision": "train.precision",
    }
    for field, words in names.items():
        have, want = getattr(found, field), getattr(expected, field)
        if want is not None and have != want:
            raise UserError(
                f"{folder}: these scores were made from another {words} "
                f"({_short(have)}, this run has {_short(want)}); score again with this run's settings."
            )


def load_scores(folder: Path, data: PreparedPairs, names: Sequence[str] = NAMES) -> TokenScores:
    """Read all shards of a store and check that every pair of `data` is in it, with finite scores.

    Args:
        names: Which scores to read, where the store has them.

    Raises:
        UserError: A missing or unreadable shard, a pair without scores, a score that is not finite.
    """
    manifest = read_scores_manifest(folder)
    stored = NAMES[:1] if manifest.guidance is None else NAMES
    starts: dict[bytes, int] = {}
    parts: dict[str, list[np.ndarray]] = {}
    lengths_of: dict[bytes, int] = {}
    offset = 0
    for path in sorted(folder.glob("scores-*.safetensors")):
        try:
            shard = load_file(path)
        except Exception as error:
            raise UserError(f"{path}: the scores cannot be read ({str(error).splitlines()[0]}).") from None
        counts = {name: len(values) for name, values in shard.items()}
        lengths = shard.get("lengths", np.empty(0))
        expected = {"hashes": len(lengths), "lengths": len(lengths), **dict.fromkeys(stored, int(lengths.sum()))}
        if counts != expected:
            raise UserError(f"{path}: not a file of these scores, or an altered one; score again.")
        for sample, length in zip(shard["hashes"], lengths, strict=True):
            starts[sample.tobytes()] = offset
            lengths_of[sample.tobytes()] = int(length)
            offset += int(length)
        for name in names:
            if name in stored:
                parts.setdefault(name, []).append(shard[name])
    for pair in range(len(data)):
        key = data.hashes[pair].tobytes()
        if lengths_of.get(key) != data.response_length(pair, 0) + data.response_length(pair, 1):
            raise UserError(f"{folder}: no scores for {data.name(pair)}; score this data again.")
    together = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    for name, array in together.items():
        if not np.isfinite(array).all():
            raise UserError(f"{folder}: the {name} scores hold numbers that are not finite; score again.")
    return TokenScores(manifest, together, starts)


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
