"""Token scores on disk: log-probs of every response token under frozen models, written once.

A folder holds `manifest.json`, what made the scores, and shards `scores-<SHA-256 of the file>.safetensors`. A shard
holds responses, each found by the hash of its pair's token ids: the order of the data and the layout that wrote or
reads the scores do not matter, a build that was stopped goes on where it was, and new pairs are added to old ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load, save

from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.token_scores import FORMAT, ScoresManifest, TokenScores, response_starts
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.losses.rewards import SCORE_NAMES


class Key(NamedTuple):
    """Which scores of which response: the pair's hash, the side, the name."""

    pair: bytes
    side: int
    name: str


def write_shard(folder: Path, scores: Mapping[Key, np.ndarray]) -> None:
    """Write some responses' scores, whole or not at all.

    Args:
        scores: Scores of a response's tokens. Each [tokens] fp32.
    """
    keys = list(scores)
    content = save(
        {
            "pairs": np.frombuffer(b"".join(key.pair for key in keys), dtype=np.uint8).reshape(-1, 32),
            "sides": np.array([key.side for key in keys], dtype=np.uint8),
            "names": np.array([SCORE_NAMES.index(key.name) for key in keys], dtype=np.uint8),
            "lengths": np.array([len(scores[key]) for key in keys], dtype=np.int64),
            "values": np.concatenate([scores[key] for key in keys]).astype(np.float32),
        }
    )
    _write_whole(folder / f"scores-{_checksum(content)}.safetensors", content)


def read_shards(folder: Path) -> Iterator[tuple[Key, np.ndarray]]:
    """Every response's scores.

    Raises:
        UserError: A shard that was altered or damaged.
    """
    for path in sorted(folder.glob("scores-*.safetensors")):
        content = path.read_bytes()
        if path.stem != f"scores-{_checksum(content)}":
            raise UserError(
                f"{path}: was altered or damaged since it was written (another checksum); delete it and score again: "
                "only what it held is computed anew."
            )
        shard = load(content)
        ends = np.cumsum(shard["lengths"])
        starts = ends - shard["lengths"]
        for pair, side, name, start, end in zip(
            shard["pairs"], shard["sides"].tolist(), shard["names"].tolist(), starts, ends, strict=True
        ):
            yield Key(pair.tobytes(), side, SCORE_NAMES[name]), shard["values"][start:end]


def load_scores(folder: Path, data: PreparedPairs, names: Sequence[str]) -> TokenScores:
    """Read a store and check that every pair of `data` has all its scores.

    Args:
        names: Which scores to read.

    Raises:
        UserError: No store, a damaged shard, a pair without scores, a score that is not finite.
    """
    manifest = read_scores_manifest(folder)
    starts = response_starts(data)
    values, missing = _collect(folder, data, names)
    for name in names:
        if missing[name].any():
            pair = int(missing[name].argmax()) // 2
            raise UserError(
                f"{folder}: no {name} scores for {data.name(pair)}; run python -m recipes.score again, it adds what "
                "is missing."
            )
        if not (finite := np.isfinite(values[name])).all():
            pair = (int(np.searchsorted(starts, finite.argmin(), side="right")) - 1) // 2
            raise UserError(
                f"{folder}: the {name} scores of {data.name(pair)} are not finite; score into another folder."
            )
    return TokenScores(values, starts, manifest)


def missing_scores(folder: Path, data: PreparedPairs, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Which responses have no scores in a folder. Name -> [2N] bool, chosen before rejected.

    Raises:
        UserError: A shard that was altered or damaged.
    """
    return _collect(folder, data, names)[1]


def _collect(
    folder: Path, data: PreparedPairs, names: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Scores of all responses, laid out as `data` is, and which responses have none. One shard at a time."""
    starts = response_starts(data)
    values = {name: np.full(starts[-1], np.nan, np.float32) for name in names}
    missing = {name: np.ones(2 * len(data), bool) for name in names}
    places: dict[bytes, list[int]] = {}
    for pair in range(len(data)):
        places.setdefault(data.hashes[pair].tobytes(), []).append(pair)
    for key, scores in read_shards(folder):
        for pair in places.get(key.pair, []) if key.name in names else []:
            response = 2 * pair + key.side
            begin, end = starts[response], starts[response + 1]
            if len(scores) != end - begin:
                raise UserError(
                    f"{folder}: {len(scores)} {key.name} scores for the {end - begin} tokens of a response of "
                    f"{data.name(pair)}; score into another folder."
                )
            values[key.name][begin:end] = scores
            missing[key.name][response] = False
    return values, missing


def write_scores_manifest(folder: Path, manifest: ScoresManifest) -> None:
    """Write the manifest, before any shard: what is added later must be made in the same way."""
    _write_whole(folder / "manifest.json", json.dumps(asdict(manifest), indent=2).encode())


def remove_parts(folder: Path) -> None:
    """Delete what a build that was killed was about to write."""
    for path in (*folder.glob("scores-*.tmp"), *folder.glob("manifest.tmp")):
        path.unlink(missing_ok=True)


def read_scores_manifest(folder: Path) -> ScoresManifest:
    """Read a store's manifest.

    Raises:
        UserError: Not a store, or one of another version.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"{folder}: no token scores there; write them with python -m recipes.score.")
    try:
        content = json.loads(path.read_text())
        if content.get("format", FORMAT) != FORMAT:
            raise UserError(
                f"{folder}: token scores of format {content['format']}, this version has {FORMAT}; score again into "
                "another folder."
            )
        return ScoresManifest(**content)
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{path}: not a manifest of token scores; score again into another folder.") from None


def check_belongs(found: ScoresManifest, expected: ScoresManifest, folder: Path) -> ScoresManifest:
    """Refuse scores that were made from something else, naming what differs.

    A field that is None in `expected` is not compared.

    Returns:
        `found`, with what it lacks taken from `expected`.

    Raises:
        UserError: With the differing field and both values.
    """
    words = {
        "tokenizer": "tokenizer",
        "template": "chat template",
        "max_length": "data.max_length",
        "precision": "train.precision",
        "reference": "weights of the reference",
        "guidance": "weights of the guidance",
        "prompts": "contrastive prompts",
    }
    lacks = {}
    for field, name in words.items():
        have, want = getattr(found, field), getattr(expected, field)
        if have is None:
            lacks[field] = want
        elif want is not None and have != want:
            raise UserError(
                f"{folder}: these scores were made with other {name} ({_short(have)}, this run has {_short(want)}); "
                "score again with this run's settings, into another folder."
            )
    return replace(found, **lacks)


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file so that no part of it is ever seen under its name."""
    part = path.with_suffix(".tmp")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
