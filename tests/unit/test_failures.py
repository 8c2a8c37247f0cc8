"""Whose fault it is that a checkpoint cannot be read or written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from tgdpo_megatron.checkpoint.convert import megatron_to_hf
from tgdpo_megatron.checkpoint.failures import readable, writable
from tgdpo_megatron.errors import LostRankError, UserError


def collected(error: BaseException) -> CheckpointException:
    """As torch gives what happened on a rank."""
    return CheckpointException("load", {0: (error, None)})  # type: ignore[dict-item]


OF_THE_FILE = [
    FileNotFoundError("no such file"),
    EOFError(),
    ValueError("Expecting value"),
]
OTHERWISE = [
    AssertionError("ours"),
    TypeError("ours"),
    AttributeError("ours"),
    RuntimeError("The size of tensor a (2) must match"),
    RuntimeError("Connection closed by peer [127.0.0.1]:1234"),
    RuntimeError("CUDA out of memory"),
    MemoryError(),
]


@pytest.mark.parametrize("wrap", [lambda error: error, collected], ids=["bare", "collected"])
@pytest.mark.parametrize("error", OF_THE_FILE, ids=repr)
def test_what_a_damaged_file_raises_is_a_sentence(
    error: BaseException, wrap: Callable[[BaseException], BaseException]
) -> None:
    with pytest.raises(UserError, match=r"^a file cannot be read \("), readable("a file"):
        raise wrap(error)


@pytest.mark.parametrize("wrap", [lambda error: error, collected], ids=["bare", "collected"])
@pytest.mark.parametrize("error", OTHERWISE, ids=repr)
def test_anything_else_met_while_reading_stays_what_it_is(
    error: BaseException, wrap: Callable[[BaseException], BaseException]
) -> None:
    with pytest.raises(type(error)) as caught, readable("a file"):
        raise wrap(error)
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("Worker failure: [Errno 28] No space left on device"),
        RuntimeError("Worker failure: [enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ],
    ids=repr,
)
def test_what_a_full_disk_raises_while_writing_is_a_sentence(error: BaseException) -> None:
    words = r"^a file cannot be written \(.*; look at the space left there"
    with pytest.raises(UserError, match=words), writable("a file"):
        raise collected(error)


@pytest.mark.parametrize(
    "error", [AssertionError("ours"), UserError("a tensor is not finite"), RuntimeError("Worker failure: 'key'")]
)
def test_anything_else_met_while_writing_stays_what_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, writable("a file"):
        raise collected(error)
    assert caught.value is error


def test_a_failure_of_which_a_rank_knows_nothing_is_another_ranks() -> None:
    with pytest.raises(LostRankError, match="^another rank could not write its part"), writable("a file"):
        raise CheckpointException("write", {})


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "overwritten"])
def test_damaged_weights_are_not_exported(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "damaged")
    (shard,) = (tmp_path / "damaged" / "weights").glob("*.distcp")
    content = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes({"empty": b"", "truncated": content[:5000], "overwritten": os.urandom(len(content))}[damage])
    with pytest.raises(UserError, match=" cannot be read "):
        megatron_to_hf(tmp_path / "damaged", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
