"""Which checkpoints are kept, and how much disk they take."""

from __future__ import annotations

import pickletools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.test_memory import LLAMA_8B
from tgdpo_megatron.checkpoint.index import MAX_BLOCKS, MAX_BYTES
from tgdpo_megatron.checkpoint.manifest import CheckpointManifest, write_manifest
from tgdpo_megatron.checkpoint.pickled import MAX_INSTRUCTIONS
from tgdpo_megatron.checkpoint.sums import first_damage, read_sums, write_sums
from tgdpo_megatron.checkpoint.torch_dist import StoredBox, write_index_of_boxes
from tgdpo_megatron.config import Config, complete, load
from tgdpo_megatron.errors import NonFiniteError, UserError
from tgdpo_megatron.planning.disk import check_disk, disk_need
from tgdpo_megatron.platform import life
from tgdpo_megatron.run_folder import checkpoint_folders, newest_checkpoint
from tgdpo_megatron.saves import Saves, _link, best_checkpoint, kept

BYTES_8B = 8_030_261_248
"""Parameters of Llama-3-8B, as its authors count them."""


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[list[float | None]], list[Path]]:
    """A function that makes the checkpoints of a run, one for each held-out accuracy; the steps are 1, 2, …"""

    def make(accuracies: list[float | None]) -> list[Path]:
        folders = []
        for step, accuracy in enumerate(accuracies, start=1):
            folder = tmp_path / "checkpoints" / f"iter-{step:07d}"
            (folder / "weights").mkdir(parents=True)
            (folder / "weights" / ".metadata").touch()
            held_out = None if accuracy is None else {"eval/rewards/accuracies": accuracy, "eval/loss": accuracy}
            write_manifest(folder, CheckpointManifest("", "float32", None, None, iteration=step, held_out=held_out))
            folders.append(folder)
        return folders

    return make


@pytest.mark.parametrize(
    ("keep_last", "best", "stay"),
    [
        (2, None, [3, 4]),
        (1, None, [4]),
        (0, None, [1, 2, 3, 4]),
        (2, 1, [1, 3, 4]),
        (2, 4, [3, 4]),
        (9, 1, [1, 2, 3, 4]),
    ],
)
def test_the_newest_and_the_best_are_kept(keep_last: int, best: int | None, stay: list[int]) -> None:
    found = [Path(f"iter-{step}") for step in (1, 2, 3, 4)]
    chosen = found[best - 1] if best else None
    assert kept(found, keep_last, chosen) == [found[step - 1] for step in stay]


@pytest.mark.parametrize(("metric", "step"), [("eval/rewards/accuracies", 2), ("eval/loss", 1), (None, None)])
def test_the_best_is_the_highest_accuracy_or_the_lowest_loss_and_the_earliest_of_equals(
    saved: Callable[..., list[Path]], metric: str | None, step: int | None
) -> None:
    """A checkpoint that was saved without an evaluation is never the best."""
    found = saved([0.1, 0.9, None, 0.9, 0.1])
    assert best_checkpoint(found, metric) == (found[step - 1] if step else None)


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(saved: Callable[..., list[Path]], tmp_path: Path) -> None:
    """Also where its name has a digit more than the others; what is unfinished, damaged or a link does not count."""
    first, second = saved([None, None])
    second.rename(second.with_name("iter-10000000"))
    for name in ("iter-9999999999.tmp", "iter-9999999999.damaged", "best"):
        shutil.copytree(first, first.with_name(name))
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "iter-10000000"
    assert len(checkpoint_folders(tmp_path)) == 2


def settings(**train: Any) -> Config:
    return complete(load(Config(), {"loss": {"type": "dpo"}, "train": train}, where="test"), where="test")


@pytest.mark.parametrize(
    ("train", "bytes_each", "at_once", "exports"),
    [
        ({}, 14, 3, 0),
        ({"precision": "fp32"}, 16, 3, 0),
        ({"save_optimizer": False}, 2, 3, 0),
        ({"keep_last": 0, "save_interval": 100}, 14, 11, 0),
        ({"save_interval": 1000, "save_minutes": 0}, 14, 2, 0),
        ({"save_minutes": 0}, 14, 1, 0),
        ({"export_interval": 300, "keep_last": 0, "save_interval": 500}, 14, 6, 4),
    ],
)
def test_the_disk_that_a_run_of_1050_steps_needs(
    train: dict[str, Any], bytes_each: int, at_once: int, exports: int
) -> None:
    """By hand: bf16 weights, their fp32 copy and two moments; as many as are kept, and the one that is written."""
    config = settings(**({"precision": "bf16", "train_iters": 1050} | train))
    need = disk_need(config, LLAMA_8B)
    assert need.checkpoint == bytes_each * BYTES_8B
    assert (need.checkpoints, need.exports) == (at_once, exports)
    assert need.at_a_stop == (12 * BYTES_8B if train.get("save_optimizer") is False else 0)
    assert need.export == (4 if train.get("precision") == "fp32" else 2) * BYTES_8B


def free_are(monkeypatch: pytest.MonkeyPatch, amount: int) -> None:
    """Let every file system seem to have so many bytes left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=amount))


def test_a_run_whose_checkpoints_find_no_room_is_refused_and_what_is_there_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparse files have their size without taking the disk. One more always needs room, before an old one goes."""
    checkpoint = 14 * BYTES_8B
    free_are(monkeypatch, checkpoint)
    two = settings(precision="bf16", train_iters=10**6, keep_last=2)
    with pytest.raises(UserError, match=r"the run will write [\d,.]+ GB more .*lower train.keep_last"):
        check_disk(tmp_path / "run", two, LLAMA_8B)
    written = tmp_path / "run" / "checkpoints" / "iter-0000001" / "weights"
    written.mkdir(parents=True)
    with (written / "__0_0.distcp").open("wb") as file:
        file.truncate(4 * checkpoint)
    check_disk(tmp_path / "run", two, LLAMA_8B)
    free_are(monkeypatch, checkpoint - 1)
    with pytest.raises(UserError, match="GB more"):
        check_disk(tmp_path / "run", two, LLAMA_8B)


def test_damaged_checkpoints_make_no_room(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    many = settings(precision="bf16", train_iters=10**6, keep_last=free // (14 * BYTES_8B) + 1)
    aside = tmp_path / "run" / "checkpoints" / "iter-0000001.damaged-2" / "weights"
    aside.mkdir(parents=True)
    with (aside / "__0_0.distcp").open("wb") as file:
        file.truncate(4 * 14 * BYTES_8B)
    with pytest.raises(UserError, match="GB more"):
        check_disk(tmp_path / "run", many, LLAMA_8B)


def test_the_sums_name_what_the_list_of_a_shared_folder_does_not_show_yet(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    write_sums(tmp_path, {"weights/__1_0.distcp": "0" * 64})
    assert list(read_sums(tmp_path)) == ["manifest.json", "weights/__1_0.distcp"]


def test_notes_beside_a_checkpoints_files_are_no_damage(tmp_path: Path) -> None:
    for name in ("manifest.json", "weights/.metadata", "weights/metadata.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    write_sums(tmp_path, {})
    (tmp_path / "NOTES.txt").touch()
    assert first_damage(tmp_path) is None


def test_the_link_to_the_best_goes_where_there_is_none(saved: Callable[..., list[Path]], tmp_path: Path) -> None:
    (only,) = saved([0.5])
    link = tmp_path / "checkpoints" / "best"
    _link(tmp_path, only)
    assert link.resolve() == only
    _link(tmp_path, None)
    assert not link.is_symlink()


def test_that_a_checkpoint_is_kept_is_said_only_where_one_is(saved: Callable[..., list[Path]], tmp_path: Path) -> None:
    saves = Saves(tmp_path, settings(), None, None)  # type: ignore[arg-type]  # neither is looked at
    with pytest.raises(NonFiniteError, match="not saved; no checkpoint was saved"), saves._says_what_is_kept():
        raise NonFiniteError("iter-0000001: the checkpoint was not saved.")
    (only,) = saved([None])
    with pytest.raises(NonFiniteError, match=f"the last good checkpoint is {only}"), saves._says_what_is_kept():
        raise NonFiniteError("iter-0000002: the checkpoint was not saved.")


def test_a_removal_that_does_not_end_is_left_to_itself(tmp_path: Path) -> None:
    saves = Saves(tmp_path, settings(rank_timeout_minutes=0.005), None, None)  # type: ignore[arg-type]
    ends = threading.Event()
    saves._removal = threading.Thread(target=ends.wait, daemon=True)
    saves._removal.start()
    saves.finish()
    assert not ends.is_set() and saves._removal is None
    ends.set()


def test_a_rank_that_waits_for_a_save_is_not_watched_and_afterwards_is_where_it_was() -> None:
    life.at("step 3, update", watched=True)
    before = life._here
    with pytest.raises(OSError), life.during("waiting for iter-0000003 to be written"):
        assert not life._here.watched
        raise OSError
    assert life._here is before


def test_the_longest_index_that_is_written_can_be_read(tmp_path: Path) -> None:
    """Its blocks have long names and many axes; pickletools counts their instructions."""
    shape, axes = (20, 100_000, 100_000, 100_000), range(20)
    names = [f"optimizer.state.exp_avg_sq.decoder.layers.{layer}.mlp.experts.{'x' * 60}" for layer in range(10)]
    stored = [
        StoredBox(name, shape, (row, 0, 0, 0), (1, *shape[1:]), torch.float32, f"__{row}_0.distcp", 10**10, 10**10)
        for name in names
        for row in axes
    ]
    write_index_of_boxes(tmp_path, stored, {})
    index = (tmp_path / ".metadata").read_bytes()
    assert len(list(pickletools.genops(index))) / len(stored) < MAX_INSTRUCTIONS / MAX_BLOCKS
    assert len(index) / len(stored) < MAX_BYTES / MAX_BLOCKS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"train": {}},
            "needs held-out pairs: set data.validation or data.validation_share; and checkpoints with an evaluation at "
            "each: set train.save_interval and train.eval_interval.$",
        ),
        (
            {"train": {"save_interval": 10, "export_interval": 15}},
            "set data.validation or data.validation_share; and an evaluation at every checkpoint of "
            "train.save_interval=10 and train.export_interval=15: set train.eval_interval=5, not 0.$",
        ),
        ({"train": {}, "data": {"validation": "v.jsonl"}}, "needs checkpoints with an evaluation at each: set train"),
        (
            {"train": {"save_interval": 10, "eval_interval": 4}, "data": {"validation": "v.jsonl"}},
            "every checkpoint of train.save_interval=10: set train.eval_interval=10, not 4",
        ),
        (
            {"train": {"save_interval": 8, "eval_interval": 0}, "data": {"validation": "v.jsonl"}},
            "set train.eval_interval=8, not 0",
        ),
        (
            {
                "train": {"save_interval": 4, "eval_interval": 4, "keep_best": "eval/rewards/margins"},
                "data": {"validation": "v.jsonl"},
                "loss": {"type": "sft"},
            },
            "loss.type=sft has no eval/rewards/margins",
        ),
    ],
)
def test_keep_best_needs_a_value_at_every_checkpoint(changes: dict[str, Any], words: str) -> None:
    base = {"loss": {"type": "dpo"}}
    train = {"keep_best": "eval/loss"} | changes["train"]
    with pytest.raises(UserError, match=words):
        complete(load(Config(), base | changes | {"train": train}, where="test"), where="test")
