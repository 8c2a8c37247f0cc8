"""Token scores on disk: joined by content, refused where they do not belong or are damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tgdpo_megatron.data.batch import make_batch
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.losses import CHOSEN
from tgdpo_megatron.scores.store import (
    ScoresManifest,
    check_belongs,
    load_scores,
    read_scores_manifest,
    write_scores_manifest,
    write_shard,
)

MANIFEST = ScoresManifest(
    reference="a" * 64,
    guidance="b" * 64,
    tokenizer="c" * 64,
    template="d" * 64,
    max_length=512,
    pairs_hash="e" * 64,
    precision="fp32",
)


@pytest.fixture
def data(prepared_by_hand: Callable[..., Any]) -> PreparedPairs:
    return prepared_by_hand([([1, 2], [4, 5], [6]), ([11], [13, 14, 15], [16, 17]), ([21], [22], [23, 24, 25])])


def write_store(folder: Path, data: PreparedPairs, shards: tuple[tuple[int, ...], ...] = ((2, 0), (1,))) -> Path:
    """Scores of `data` as ranks would write them: each shard its own pairs, in its own order."""
    folder.mkdir()
    for rank, pairs in enumerate(shards):
        responses = [data.sequence(pair, side)[data.prompt_lengths[pair] :] for pair in pairs for side in (0, 1)]
        labels = np.concatenate(responses)
        lengths = np.array([sum(map(len, responses[place : place + 2])) for place in range(0, len(responses), 2)])
        values = {"reference": -labels.astype(np.float32) / 100, "guidance": -labels.astype(np.float32) / 50}
        write_shard(folder, rank, data.hashes[list(pairs)], lengths, values)
    write_scores_manifest(folder, MANIFEST)
    return folder


@pytest.mark.parametrize("shards", [((0, 1, 2),), ((2, 0), (1,)), ((1,), (), (0, 2))], ids=str)
def test_scores_meet_their_tokens_whatever_the_order(shards: Any, data: PreparedPairs, tmp_path: Path) -> None:
    shards = tuple(shard for shard in shards if shard)
    scores = load_scores(write_store(tmp_path / "scores", data, shards), data)
    for samples in ([0, 1, 2], [2, 1], [1]):
        batch = make_batch(data, samples, scores=scores)
        assert batch.reference is not None and batch.guidance is not None
        assert batch.reference.tolist() == pytest.approx([-label / 100 for label in batch.labels.tolist()])
        assert batch.guidance.tolist() == pytest.approx([-label / 50 for label in batch.labels.tolist()])


def test_scores_of_one_side_meet_their_tokens(data: PreparedPairs, tmp_path: Path) -> None:
    batch = make_batch(data, [1, 0], sides=(CHOSEN,), scores=load_scores(write_store(tmp_path / "scores", data), data))
    assert batch.reference is not None
    assert batch.reference.tolist() == pytest.approx([-label / 100 for label in batch.labels.tolist()])


def test_scores_are_kept_bit_for_bit(data: PreparedPairs, tmp_path: Path) -> None:
    values = np.float32(-1) / np.arange(3, 15, dtype=np.float32)
    lengths = np.array([3, 5, 4])
    (tmp_path / "scores").mkdir()
    write_shard(tmp_path / "scores", 0, data.hashes, lengths, {"reference": values, "guidance": values})
    write_scores_manifest(tmp_path / "scores", MANIFEST)
    assert load_scores(tmp_path / "scores", data).values["reference"].tobytes() == values.tobytes()


def test_an_empty_batch_joins_no_scores(data: PreparedPairs, tmp_path: Path) -> None:
    batch = make_batch(data, [], scores=load_scores(write_store(tmp_path / "scores", data), data))
    assert batch.reference is not None and len(batch.reference) == 0


def test_a_manifest_is_read_back_as_it_was(data: PreparedPairs, tmp_path: Path) -> None:
    assert read_scores_manifest(write_store(tmp_path / "scores", data)) == MANIFEST


# ---------------------------------------------------------------- scores that do not belong


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("reference", "f" * 64, "reference weights"),
        ("guidance", "f" * 64, "guidance weights"),
        ("tokenizer", "f" * 64, "tokenizer"),
        ("template", "f" * 64, "chat template"),
        ("max_length", 256, "data.max_length"),
        ("pairs_hash", "f" * 64, "pairs"),
        ("precision", "bf16", "train.precision"),
        ("format", 99, "format"),
    ],
)
def test_scores_of_another_run_are_refused_by_what_differs(field: str, value: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        check_belongs(MANIFEST, replace(MANIFEST, **{field: value}), tmp_path)
    assert f"were made from another {words} (" in str(refused.value)
    assert str(value)[:12] in str(refused.value) and str(getattr(MANIFEST, field))[:12] in str(refused.value)


def test_scores_that_belong_are_accepted(tmp_path: Path) -> None:
    check_belongs(MANIFEST, replace(MANIFEST), tmp_path)


def test_a_run_without_guidance_takes_scores_with_any(tmp_path: Path) -> None:
    check_belongs(MANIFEST, replace(MANIFEST, guidance=None), tmp_path)


# ---------------------------------------------------------------- damaged scores


def test_an_unfinished_store_is_refused(data: PreparedPairs, tmp_path: Path) -> None:
    folder = write_store(tmp_path / "scores", data)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="no finished token scores there"):
        load_scores(folder, data)


@pytest.mark.parametrize("content", ["{}", "[1]", "not json", '{"reference": "a", "unknown": 1}'])
def test_a_foreign_manifest_is_refused(content: str, data: PreparedPairs, tmp_path: Path) -> None:
    folder = write_store(tmp_path / "scores", data)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="not a manifest of token scores"):
        load_scores(folder, data)


def test_a_missing_shard_names_a_pair_without_scores(data: PreparedPairs, tmp_path: Path) -> None:
    folder = write_store(tmp_path / "scores", data)
    (folder / "scores-00001.safetensors").unlink()
    with pytest.raises(UserError, match="no scores for row 2 of by-hand.jsonl"):
        load_scores(folder, data)


def test_a_pair_that_was_not_scored_is_named(data: PreparedPairs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no scores for row 1 of by-hand.jsonl"):
        load_scores(write_store(tmp_path / "scores", data, ((1, 2),)), data)


def test_a_store_without_any_shard_is_refused(data: PreparedPairs, tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    write_scores_manifest(tmp_path / "scores", MANIFEST)
    with pytest.raises(UserError, match="no scores for row 1"):
        load_scores(tmp_path / "scores", data)


def test_a_truncated_shard_is_named(data: PreparedPairs, tmp_path: Path) -> None:
    shard = write_store(tmp_path / "scores", data) / "scores-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"scores-00001.safetensors: the scores cannot be read"):
        load_scores(tmp_path / "scores", data)


def test_a_foreign_shard_is_refused(data: PreparedPairs, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3, np.float32)}, write_store(tmp_path / "scores", data) / "scores-00001.safetensors")
    with pytest.raises(UserError, match=r"scores-00001.safetensors"):
        load_scores(tmp_path / "scores", data)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused_by_name(value: float, data: PreparedPairs, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = write_store(tmp_path / "scores", data) / "scores-00000.safetensors"
    shard = load_file(path)
    shard["guidance"][1] = value
    save_file(shard, path)
    with pytest.raises(UserError, match="the guidance scores hold numbers that are not finite"):
        load_scores(tmp_path / "scores", data)


def test_a_shard_with_a_number_too_few_is_refused(data: PreparedPairs, tmp_path: Path) -> None:
    """A shard whose guidance is one number short would shift all that follow."""
    from safetensors.numpy import load_file, save_file

    path = write_store(tmp_path / "scores", data) / "scores-00000.safetensors"
    shard = load_file(path)
    shard["guidance"] = shard["guidance"][:-1].copy()
    save_file(shard, path)
    with pytest.raises(UserError):
        load_scores(tmp_path / "scores", data)
