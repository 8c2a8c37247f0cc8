"""Token scores on disk: joined by content, refused where they do not belong or are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tgdpo_megatron.data.batch import make_batch
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.token_scores import ScoresManifest
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.losses import CHOSEN
from tgdpo_megatron.losses.rewards import SCORE_NAMES
from tgdpo_megatron.scores.store import (
    Key,
    check_belongs,
    load_scores,
    missing_scores,
    read_scores_manifest,
    read_shards,
    remove_parts,
    write_scores_manifest,
    write_shard,
)

MANIFEST = ScoresManifest(
    reference="a" * 64,
    guidance="b" * 64,
    prompts="e" * 64,
    tokenizer="c" * 64,
    template="d" * 64,
    max_length=512,
    precision="fp32",
)
NAMES = ("reference", "guidance")
PAIRS = [([1, 2], [4, 5], [6]), ([11], [13, 14, 15], [16, 17]), ([21], [22], [23, 24, 25])]


@pytest.fixture
def data(prepared_by_hand: Callable[..., Any]) -> PreparedPairs:
    return prepared_by_hand(PAIRS)


def scores_of(data: PreparedPairs, pairs: Any) -> dict[Key, np.ndarray]:
    """A score that is a function of the token: −label / 100 for the reference, −label / 50 for the guidance."""
    return {
        Key(data.hashes[pair].tobytes(), side, name): np.float32(
            -data.sequence(pair, side)[data.prompt_lengths[pair] :] / divisor
        )
        for pair in pairs
        for side in (0, 1)
        for name, divisor in zip(NAMES, (100, 50), strict=True)
    }


def write_store(folder: Path, data: PreparedPairs, shards: Any = ((2, 0), (1,))) -> Path:
    """Scores of `data` as ranks would write them: each shard its own pairs, in its own order."""
    folder.mkdir(exist_ok=True)
    write_scores_manifest(folder, MANIFEST)
    for pairs in shards:
        write_shard(folder, scores_of(data, pairs))
    return folder


@pytest.mark.parametrize("shards", [((0, 1, 2),), ((2, 0), (1,)), ((1,), (0, 2))], ids=str)
def test_scores_meet_their_tokens_whatever_the_order(shards: Any, data: PreparedPairs, tmp_path: Path) -> None:
    scores = load_scores(write_store(tmp_path / "scores", data, shards), data, NAMES)
    for samples in ([0, 1, 2], [2, 1], [1]):
        batch = make_batch(data, samples, scores=scores)
        labels = batch.labels.tolist()
        assert batch.scores["reference"].tolist() == pytest.approx([-label / 100 for label in labels])
        assert batch.scores["guidance"].tolist() == pytest.approx([-label / 50 for label in labels])


def test_scores_of_one_side_meet_their_tokens(data: PreparedPairs, tmp_path: Path) -> None:
    scores = load_scores(write_store(tmp_path / "scores", data), data, NAMES)
    batch = make_batch(data, [1, 0], sides=(CHOSEN,), scores=scores)
    assert batch.scores["reference"].tolist() == pytest.approx([-label / 100 for label in batch.labels.tolist()])


def test_scores_are_kept_bit_for_bit(data: PreparedPairs, tmp_path: Path) -> None:
    awkward = {key: np.float32(-1) / (values - np.float32(7)) for key, values in scores_of(data, range(3)).items()}
    write_scores_manifest(tmp_path, MANIFEST)
    write_shard(tmp_path, awkward)
    assert {key: values.tobytes() for key, values in read_shards(tmp_path)} == {
        key: values.tobytes() for key, values in awkward.items()
    }


def test_an_empty_batch_joins_no_scores(data: PreparedPairs, tmp_path: Path) -> None:
    batch = make_batch(data, [], scores=load_scores(write_store(tmp_path / "scores", data), data, NAMES))
    assert len(batch.scores["reference"]) == 0


def test_a_pair_that_is_there_twice_has_its_scores_twice(
    prepared_by_hand: Callable[..., Any], data: PreparedPairs, tmp_path: Path
) -> None:
    twice = prepared_by_hand([PAIRS[0], PAIRS[0]])
    batch = make_batch(twice, [0, 1], scores=load_scores(write_store(tmp_path / "scores", data), twice, NAMES))
    assert batch.scores["reference"].tolist() == pytest.approx([-label / 100 for label in batch.labels.tolist()])


def test_shards_add_up_and_old_ones_stay_as_they_were(data: PreparedPairs, tmp_path: Path) -> None:
    folder = write_store(tmp_path / "scores", data, ((0,),))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="no reference scores for row 2"):
        load_scores(folder, data, NAMES)
    write_shard(folder, scores_of(data, (1, 2)))
    load_scores(folder, data, NAMES)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_manifest_is_read_back_as_it_was(data: PreparedPairs, tmp_path: Path) -> None:
    assert read_scores_manifest(write_store(tmp_path / "scores", data)) == MANIFEST


def test_the_places_of_names_in_old_stores_stay_theirs() -> None:
    """A store holds a name as its place; new names may only come after these."""
    assert SCORE_NAMES[:5] == ("reference", "guidance", "better", "worse", "reward")


# ---------------------------------------------------------------- scores that do not belong


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("reference", "f" * 64, "other weights of the reference"),
        ("guidance", "f" * 64, "other weights of the guidance"),
        ("prompts", "f" * 64, "other contrastive prompts"),
        ("tokenizer", "f" * 64, "another tokenizer"),
        ("template", "f" * 64, "another chat template"),
        ("max_length", 256, "another data.max_length"),
        ("precision", "bf16", "another train.precision"),
    ],
)
def test_scores_of_another_run_are_refused_by_what_differs(field: str, value: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        check_belongs(MANIFEST, replace(MANIFEST, **{field: value}), tmp_path)
    assert f"were made with {words} (" in str(refused.value)
    assert str(value)[:12] in str(refused.value) and str(getattr(MANIFEST, field))[:12] in str(refused.value)


def test_scores_that_belong_are_accepted(tmp_path: Path) -> None:
    assert check_belongs(MANIFEST, replace(MANIFEST), tmp_path) == MANIFEST


def test_a_run_without_guidance_takes_scores_with_any(tmp_path: Path) -> None:
    check_belongs(MANIFEST, replace(MANIFEST, guidance=None), tmp_path)


def test_what_a_store_lacks_is_taken_from_the_run_that_adds_it(tmp_path: Path) -> None:
    assert check_belongs(replace(MANIFEST, guidance=None, prompts=None), MANIFEST, tmp_path) == MANIFEST


# ---------------------------------------------------------------- damaged scores


def test_a_folder_without_a_manifest_is_not_a_store(data: PreparedPairs, tmp_path: Path) -> None:
    folder = write_store(tmp_path / "scores", data)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="no token scores there"):
        load_scores(folder, data, NAMES)


def test_scores_of_another_version_are_refused_as_such(data: PreparedPairs, tmp_path: Path) -> None:
    """What the first version wrote; its manifest has other fields."""
    folder = write_store(tmp_path / "scores", data)
    old = {"reference": "a", "guidance": None, "tokenizer": "c", "template": "d", "max_length": 512, "pairs_hash": "p"}
    (folder / "manifest.json").write_text(json.dumps({**old, "precision": "fp32", "format": 1}))
    with pytest.raises(UserError, match="token scores have format 1, but this version reads format 2; score again"):
        load_scores(folder, data, NAMES)


@pytest.mark.parametrize("number", [2, 4])
def test_scores_of_the_wrong_length_are_refused_by_name(number: int, data: PreparedPairs, tmp_path: Path) -> None:
    folder = write_store(tmp_path / "scores", data, ((0, 2),))
    key = Key(data.hashes[1].tobytes(), 0, "reference")
    write_shard(folder, scores_of(data, (1,)) | {key: np.full(number, -1.0, np.float32)})
    with pytest.raises(UserError, match=f"{number} reference scores for the 3 tokens of a response of row 2 of by-ha"):
        load_scores(folder, data, NAMES)


def test_a_shard_that_cannot_be_written_leaves_no_part_of_itself(
    data: PreparedPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path, scores_of(data, (0,)))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_build_left_is_cleared_away_and_nothing_else(data: PreparedPairs, tmp_path: Path) -> None:
    folder = write_store(tmp_path / "scores", data)
    kept = {path.name for path in folder.iterdir()} | {"notes.tmp"}
    for name in ("scores-0123.tmp", "manifest.tmp", "notes.tmp"):
        (folder / name).write_bytes(b"half")
    remove_parts(folder)
    assert {path.name for path in folder.iterdir()} == kept


def test_what_a_store_lacks_is_found(prepared_by_hand: Callable[..., Any], data: PreparedPairs, tmp_path: Path) -> None:
    folder = write_store(tmp_path / "scores", data, ((2, 0),))
    twice = prepared_by_hand([PAIRS[1], PAIRS[0], PAIRS[1]])
    missing = missing_scores(folder, twice, ("reference", "better"))
    assert missing["reference"].tolist() == [True, True, False, False, True, True]
    assert missing["better"].all()


@pytest.mark.parametrize("content", ["{}", "[1]", "7", '{"reference": "a", "unknown": 1}'])
def test_a_foreign_manifest_is_refused(content: str, data: PreparedPairs, tmp_path: Path) -> None:
    folder = write_store(tmp_path / "scores", data)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="not a manifest of token scores"):
        load_scores(folder, data, NAMES)


def test_a_missing_shard_names_a_pair_without_scores(data: PreparedPairs, tmp_path: Path) -> None:
    folder = write_store(tmp_path / "scores", data, ((0, 2),))
    kept = set(folder.iterdir())
    write_shard(folder, scores_of(data, (1,)))
    (added,) = set(folder.iterdir()) - kept
    added.unlink()
    with pytest.raises(UserError, match="no reference scores for row 2 of by-hand.jsonl"):
        load_scores(folder, data, NAMES)


def test_a_store_without_any_shard_is_refused(data: PreparedPairs, tmp_path: Path) -> None:
    write_scores_manifest(tmp_path, MANIFEST)
    with pytest.raises(UserError, match="no reference scores for row 1"):
        load_scores(tmp_path, data, NAMES)


def test_scores_of_another_name_do_not_stand_in(data: PreparedPairs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no better scores for row 1"):
        load_scores(write_store(tmp_path / "scores", data), data, ("reference", "better"))


@pytest.mark.parametrize("place", [0, 8, 200, -1])
def test_one_changed_byte_of_a_shard_is_noticed(place: int, data: PreparedPairs, tmp_path: Path) -> None:
    folder = write_store(tmp_path / "scores", data)
    shard = next(folder.glob("scores-*"))
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"{shard.name}: was altered or damaged"):
        load_scores(folder, data, NAMES)


def test_a_truncated_shard_is_noticed(data: PreparedPairs, tmp_path: Path) -> None:
    shard = next(write_store(tmp_path / "scores", data).glob("scores-*"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(UserError, match=rf"{shard.name}: was altered or damaged"):
        load_scores(tmp_path / "scores", data, NAMES)


@pytest.mark.parametrize("side", [0, 1])
def test_one_changed_token_id_has_no_scores(
    side: int, prepared_by_hand: Callable[..., Any], data: PreparedPairs, tmp_path: Path
) -> None:
    other = [list(part) for part in PAIRS[1]]
    other[1 + side][-1] += 1
    changed = prepared_by_hand([PAIRS[0], tuple(other), PAIRS[2]])
    with pytest.raises(UserError, match="no reference scores for row 2"):
        load_scores(write_store(tmp_path / "scores", data), changed, NAMES)


def test_a_moved_border_between_prompt_and_response_has_no_scores(
    prepared_by_hand: Callable[..., Any], data: PreparedPairs, tmp_path: Path
) -> None:
    """The same ids, the last token of the prompt taken for the first of the response: another mask."""
    prompt, chosen, rejected = PAIRS[0]
    changed = prepared_by_hand([(prompt[:-1], prompt[-1:] + chosen, prompt[-1:] + rejected), *PAIRS[1:]])
    with pytest.raises(UserError, match="no reference scores for row 1"):
        load_scores(write_store(tmp_path / "scores", data), changed, NAMES)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused_by_name(value: float, data: PreparedPairs, tmp_path: Path) -> None:
    folder = write_store(tmp_path / "scores", data, ((0, 2),))
    bad = scores_of(data, (1,))
    bad[Key(data.hashes[1].tobytes(), 1, "guidance")][0] = value
    write_shard(folder, bad)
    with pytest.raises(UserError, match="the guidance scores of row 2 of by-hand.jsonl are not finite"):
        load_scores(folder, data, NAMES)
