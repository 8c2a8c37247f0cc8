"""The pairs that a run trains on and those that it holds out, put together from one file or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.data.prepare import (
    PreparedPairs,
    Summary,
    is_prepared,
    measured,
    save_prepared,
    source_hash,
    tokenised,
)
from tgdpo_megatron.errors import UserError


def prepare_parts(config: DataConfig, tokenizer: Any, folder: Path, *, quiet: bool = False) -> dict[str, Path]:
    """Tokenise `train` and, where pairs are held out, `validation`; say how each file was read, unless quiet.

    Returns:
        The folder of each part's prepared pairs: made in `folder`, or the one that the configuration names.

    Raises:
        UserError: A source that prepare_pairs refuses, or nothing left to train on or to hold out.
    """
    places: dict[str, Path] = {}
    sources = {"train": config.sources} | ({"validation": [config.validation]} if config.validation else {})
    for name, files in sources.items():
        read = [tokenised(config, file, tokenizer) for file in files]
        for pairs in read if not quiet else ():
            print(f"data.{name}: {pairs.summary.read_as()}", flush=True)
            print(f"data.{name}: {pairs.summary.sentences()}", flush=True)
        if len(files) > 1 or config.validation_share is not None:
            places |= _put_together(config, join(read), folder)
        elif is_prepared(files[0]):
            places[name] = files[0]
        else:
            places[name] = folder / f"{name}-{source_hash(config, files[0], tokenizer)[:12]}"
            save_prepared(read[0], places[name])
    return places


def _put_together(config: DataConfig, pairs: PreparedPairs, folder: Path) -> dict[str, Path]:
    """Hold out the share of pairs that is asked for, and write the parts."""
    parts = {"train": pairs}
    if config.validation_share is not None:
        held_out = choose_held_out(pairs.prompts, config.validation_share)
        if held_out.all():
            raise UserError(
                f"data.validation_share={config.validation_share}: pairs with the same prompt are held out together, "
                f"which leaves none of the {len(pairs)} pairs to train on; give data.validation."
            )
        parts = {"train": take(pairs, np.flatnonzero(~held_out)), "validation": take(pairs, np.flatnonzero(held_out))}
        summary = parts["validation"].summary
        summary.rows, summary.dropped = summary.pairs, {}
        words = f"{summary.pairs} of {len(pairs)} pairs are held out"
        print(f"data.validation_share={config.validation_share}: {words}.", flush=True)
    places = {}
    for name, part in parts.items():
        places[name] = folder / f"{name}-{part.summary.pairs_hash[:12]}"
        save_prepared(part, places[name])
    return places


def choose_held_out(prompts: np.ndarray, share: float) -> np.ndarray:
    """Which pairs are held out: all pairs of some prompts, as few prompts as reach the share.

    The prompts with the smallest hashes are taken. So the choice depends on their text alone, not on the order of the
    pairs, and more pairs change little of it.

    Args:
        prompts: Hashes of the prompts. [N, 8] uint8.

    Returns:
        True for held-out pairs. [N] bool.
    """
    _, number, pairs_of = np.unique(prompts, axis=0, return_inverse=True, return_counts=True)
    enough = int(np.searchsorted(np.cumsum(pairs_of), max(1, round(share * len(prompts)))))
    return number.reshape(-1) <= enough


def join(parts: Sequence[PreparedPairs]) -> PreparedPairs:
    """The pairs of several files, one file after another."""
    if len(parts) == 1:
        return parts[0]
    files = [file for part in parts for file in part.files]
    summary = replace(
        files[0],
        source=", ".join(file.source for file in files),
        commit=", ".join(file.commit for file in files if file.commit),
        rows=sum(file.rows for file in files),
        format=", ".join(dict.fromkeys(file.format for file in files)),
        columns=list(dict.fromkeys(column for file in files for column in file.columns)),
        dropped={
            f"{reason} in {Path(file.source).name}": rows for file in files for reason, rows in file.dropped.items()
        },
        prompts_cut=sum(file.prompts_cut for file in files),
        responses_cut=sum(file.responses_cut for file in files),
        parts=files,
    )
    return _of_sequences([(part, pair) for part in parts for pair in range(len(part))], summary)


def take(pairs: PreparedPairs, chosen: np.ndarray) -> PreparedPairs:
    """Some of the pairs, in ascending order. [n] int64."""
    ends = np.cumsum([file.pairs for file in pairs.files])
    counts = np.bincount(np.searchsorted(ends, chosen, side="right"), minlength=len(ends)).tolist()
    files = [replace(file, pairs=count) for file, count in zip(pairs.files, counts, strict=True)]
    summary = replace(pairs.summary, parts=files if pairs.summary.parts else [])
    return _of_sequences([(pairs, pair) for pair in chosen.tolist()], summary)


def _of_sequences(chosen: Sequence[tuple[PreparedPairs, int]], summary: Summary) -> PreparedPairs:
    """Pairs of prepared pairs, in the order given."""
    sequences = [pairs.sequence(pair, side) for pairs, pair in chosen for side in (0, 1)]
    rest = {
        name: np.stack([getattr(pairs, name)[pair] for pairs, pair in chosen])
        for name in ("prompt_lengths", "hashes", "rows", "prompts")
    }
    starts = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
    return measured(PreparedPairs(tokens=np.concatenate(sequences), starts=starts, summary=summary, **rest))
