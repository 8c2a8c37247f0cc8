"""Token scores on disk: log-probs of every response token under frozen models, computed once.

A folder holds `manifest.json`, which says how the scores were made, and shards `scores-<CHECKSUM>.safetensors`, where
CHECKSUM is the first 32 digits of the file's SHA-256. A shard holds the scores of some responses. A response is found
by the hash of its pair's token ids, so the order of the data does not matter, nor the parallel layout that wrote the
scores. Scoring that was stopped continues where it stopped, and new pairs are added to the pairs scored before.
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

from tgdpo_megatron.bounded import read_json
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.token_scores import FORMAT, ScoresManifest, TokenScores, response_starts
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.losses.rewards import SCORE_NAMES


class Key(NamedTuple):
    """Names one kind of scores of one response.

    Attributes:
        pair: Hash of the pair's token ids.
        side: CHOSEN or REJECTED.
        name: One of SCORE_NAMES.
    """

    pair: bytes
    side: int
    name: str


def write_shard(folder: Path, scores: Mapping[Key, np.ndarray]) -> None:
    """Write the scores of some responses as one shard. The file appears whole or not at all.

    Args:
        scores: Key -> scores of the response's tokens. Each [tokens] fp32.
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
    """Read the scores of all responses in a folder, shard by shard.

    Raises:
        UserError: A shard that was altered or damaged.
    """
    for path in sorted(folder.glob("scores-*.safetensors")):
        content = path.read_bytes()
        if path.stem != f"scores-{_checksum(content)}":
            raise UserError(
                f"{path}: was altered or damaged since it was written (its checksum differs); delete the file and run "
                "python -m recipes.score again, which computes only the scores that it held."
            )
        shard = load(content)
        ends = np.cumsum(shard["lengths"])
        starts = ends - shard["lengths"]
        for pair, side, name, start, end in zip(
            shard["pairs"], shard["sides"].tolist(), shard["names"].tolist(), starts, ends, strict=True
        ):
            yield Key(pair.tobytes(), side, SCORE_NAMES[name]), shard["values"][start:end]


def load_scores(folder: Path, data: PreparedPairs, names: Sequence[str]) -> TokenScores:
    """Read a folder of scores, and check that every pair of `data` has all its scores.

    Args:
        names: Which scores to read.

    Raises:
        UserError: No scores in the folder, a damaged shard, a pair without scores, or a score that is not finite.
    """
    manifest = read_scores_manifest(folder)
    starts = response_starts(data)
    values, missing = _collect(folder, data, names)
    for name in names:
        if missing[name].any():
            pair = int(missing[name].argmax()) // 2
            raise UserError(
                f"{folder}: no {name} scores for {data.name(pair)}; run python -m recipes.score again, which adds "
                "what is missing."
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
    """Scores of all responses in the order of `data`, and which responses have none. Reads one shard at a time."""
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
    """Write the manifest. It is written before any shard, so that scores added later must be made in the same way."""
    _write_whole(folder / "manifest.json", json.dumps(asdict(manifest), indent=2).encode())


def remove_parts(folder: Path) -> None:
    """Delete the unfinished files of a scoring that was killed."""
    for path in (*folder.glob("scores-*.tmp"), *folder.glob("manifest.tmp")):
        path.unlink(missing_ok=True)


def read_scores_manifest(folder: Path) -> ScoresManifest:
    """Read the manifest of a folder of scores.

    Raises:
        UserError: No scores in the folder, or scores of another format.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"{folder}: no token scores there; write them with python -m recipes.score.")
    content = read_json(path, what="manifest of token scores")
    try:
        if content.get("format", FORMAT) != FORMAT:
            raise UserError(
                f"{folder}: the token scores have format {content['format']}, but this version reads format {FORMAT}; "
                "score again into another folder."
            )
        return ScoresManifest(**content)
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{path}: not a manifest of token scores; score again into another folder.") from None


def check_belongs(found: ScoresManifest, expected: ScoresManifest, folder: Path) -> ScoresManifest:
    """Refuse scores that were made with other settings or models than this run has.

    A field that is None in `expected` is not compared.

    Returns:
        `found`, with the fields that are None in it taken from `expected`.

    Raises:
        UserError: A field differs; the sentence names it and both values.
    """
    words = {
        "tokenizer": "another tokenizer",
        "chat_template_kwargs": "other data.chat_template_kwargs",
        "template": "another chat template",
        "max_length": "another data.max_length",
        "precision": "another train.precision",
        "reference": "other weights of the reference",
        "guidance": "other weights of the guidance",
        "prompts": "other contrastive prompts",
    }
    lacks = {}
    for field, name in words.items():
        have, want = getattr(found, field), getattr(expected, field)
        if have is None:
            lacks[field] = want
        elif want is not None and have != want:
            raise UserError(
                f"{folder}: these scores were made with {name} ({_short(have)}, this run has {_short(want)}); "
                "score again with this run's settings, into another folder."
            )
    return replace(found, **lacks)


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it appears under its name only when it is whole."""
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
