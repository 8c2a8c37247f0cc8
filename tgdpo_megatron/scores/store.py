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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from tgdpo_megatron.bounded import read_json
from tgdpo_megatron.data.mapped import Scattered
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.token_scores import FORMAT, ScoresManifest, TokenScores, response_starts
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.losses.rewards import SCORE_NAMES

_DIGITS = 32
"""Digits of a shard's checksum in its name."""


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
    _write_whole(folder / f"scores-{hashlib.sha256(content).hexdigest()[:_DIGITS]}.safetensors", content)


@dataclass(frozen=True)
class _Shard:
    """What a shard says of its n responses.

    Attributes:
        pairs: Hash of the pair of each, as text of fixed width, which can be sorted. [n] S32.
        sides: CHOSEN or REJECTED. [n] uint8.
        names: Place in SCORE_NAMES. [n] uint8.
        starts: The scores of response i are values[starts[i]:starts[i + 1]]. [n + 1] int64.
        values: All scores, of which a slice can be read from the file. fp32.
    """

    pairs: np.ndarray
    sides: np.ndarray
    names: np.ndarray
    starts: np.ndarray
    values: Any


def _open_shards(folder: Path) -> Iterator[_Shard]:
    """Check and open the shards of a folder, one after another.

    Raises:
        UserError: A shard that was altered or damaged.
    """
    for path in sorted(folder.glob("scores-*.safetensors")):
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        if path.stem != f"scores-{checksum[:_DIGITS]}":
            raise UserError(
                f"{path}: was altered or damaged since it was written (its checksum differs); delete the file and run "
                "python -m recipes.score again, which computes only the scores that it held."
            )
        shard = safe_open(path, framework="numpy")  # maps the file, and keeps it mapped as long as a slice lives
        pairs, sides, names, lengths = map(shard.get_tensor, ("pairs", "sides", "names", "lengths"))
        starts = np.concatenate([[0], np.cumsum(lengths)])
        yield _Shard(_sortable(pairs), sides, names, starts, shard.get_slice("values"))


def _sortable(hashes: np.ndarray) -> np.ndarray:
    """Hashes, [n, 32] uint8, as text that NumPy can sort and search. [n] S32."""
    return np.ascontiguousarray(hashes).view("S32").reshape(-1)


def read_shards(folder: Path) -> Iterator[tuple[Key, np.ndarray]]:
    """Read the scores of all responses in a folder, shard by shard.

    Raises:
        UserError: A shard that was altered or damaged.
    """
    for shard in _open_shards(folder):
        for place, (side, name) in enumerate(zip(shard.sides.tolist(), shard.names.tolist(), strict=True)):
            key = Key(shard.pairs[place : place + 1].tobytes(), side, SCORE_NAMES[name])
            yield key, shard.values[shard.starts[place] : shard.starts[place + 1]]


def load_scores(folder: Path, data: PreparedPairs, names: Sequence[str]) -> TokenScores:
    """Open a folder of scores, and check that every pair of `data` has all its scores. They stay on disk.

    Args:
        names: Which scores to read.

    Raises:
        UserError: No scores in the folder, a damaged shard, a pair without scores, or a score that is not finite.
    """
    manifest = read_scores_manifest(folder)
    found = _find(folder, data, names)
    for name in names:
        if found.missing[name].any():
            pair = int(found.missing[name].argmax()) // 2
            raise UserError(
                f"{folder}: no {name} scores for {data.name(pair)}; run python -m recipes.score again, which adds "
                "what is missing."
            )
        if not found.finite[name].all():
            pair = int(found.finite[name].argmin()) // 2
            raise UserError(
                f"{folder}: the {name} scores of {data.name(pair)} are not finite; score into another folder."
            )
    return TokenScores.of(data, found.values, manifest)


def missing_scores(folder: Path, data: PreparedPairs, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Which responses have no scores in a folder. Name -> [2N] bool, chosen before rejected.

    Raises:
        UserError: A shard that was altered or damaged.
    """
    return _find(folder, data, names).missing


@dataclass(frozen=True)
class _Found:
    """The scores of all responses of a data set: for each name where they lie, and what is wrong with them.

    Attributes:
        values: The scores of responses that are not missing, in the order of the data.
        missing: Whether a response has no scores. [2N] bool.
        finite: Whether all its scores are finite. [2N] bool.
    """

    values: dict[str, np.ndarray | Scattered]
    missing: dict[str, np.ndarray]
    finite: dict[str, np.ndarray]


def _find(folder: Path, data: PreparedPairs, names: Sequence[str]) -> _Found:
    """Find the scores of all responses of `data`. One shard is in memory at a time.

    Raises:
        UserError: A shard that was altered or damaged, or another number of scores than a response has tokens.
    """
    starts = response_starts(data)
    lengths = np.diff(starts).reshape(-1, 2)
    pairs, first, which = np.unique(_sortable(data.hashes), return_index=True, return_inverse=True)
    places = {name: np.full((len(pairs), 2), -1) for name in names}  # of different pairs, in all shards' values
    finite = {name: np.ones((len(pairs), 2), bool) for name in names}
    parts: list[Any] = []
    sizes: list[int] = []
    filled = 0
    for shard in _open_shards(folder):
        nearest = np.searchsorted(pairs, shard.pairs).clip(max=len(pairs) - 1)
        known = pairs[nearest] == shard.pairs
        bad_before = np.concatenate([[0], np.cumsum(~np.isfinite(shard.values[:]))])
        is_finite = np.diff(bad_before[shard.starts]) == 0
        for name in names:
            rows = np.flatnonzero(known & (shard.names == SCORE_NAMES.index(name)))
            response = nearest[rows], shard.sides[rows]
            there, expected = np.diff(shard.starts)[rows], lengths[first[response[0]], response[1]]
            if (there != expected).any():
                row = int((there != expected).argmax())
                raise UserError(
                    f"{folder}: {there[row]} {name} scores for the {expected[row]} tokens of a response of "
                    f"{data.name(int(first[response[0][row]]))}; score into another folder."
                )
            places[name][response] = filled + shard.starts[rows]
            finite[name][response] = is_finite[rows]
        parts.append(shard.values)
        sizes.append(int(shard.starts[-1]))
        filled += sizes[-1]
    of_responses = {name: place[which].reshape(-1) for name, place in places.items()}
    return _Found(
        values={name: Scattered(parts, sizes, starts, place) for name, place in of_responses.items()},
        missing={name: place < 0 for name, place in of_responses.items()},
        finite={name: good[which].reshape(-1) for name, good in finite.items()},
    )


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


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
