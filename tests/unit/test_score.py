"""What the writer of shards says when it cannot write."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tgdpo_megatron.data.batch import make_batch
from tgdpo_megatron.scores.store import Key, read_shards

PAIRS = [([1, 2], [4, 5], [6]), ([11], [13, 14, 15], [16, 17])]


@pytest.fixture
def work(prepared_by_hand: Callable[..., Any]) -> tuple[Any, list[Any], list[torch.Tensor]]:
    """Two pairs under a reference and a guidance model; the guidance scores of the first pair are there already."""
    from tgdpo_megatron.score import _Part, _plain_work

    data = prepared_by_hand(PAIRS)
    missing = {"reference": np.ones(4, bool), "guidance": np.array([False, False, True, True])}
    batch = make_batch(data, [1, 0])
    outputs = [torch.stack([-batch.labels.float(), -2 * batch.labels.float()])]
    return _plain_work(_Part(data, Path(), missing), ["reference", "guidance"]), [batch], outputs


def test_only_what_is_missing_is_written(work: Any, tmp_path: Path) -> None:
    from tgdpo_megatron.score import _write

    assert _write(tmp_path, *work) is None
    hashes = [work[0].data.hashes[pair].tobytes() for pair in (0, 1)]
    found = {key: values.tolist() for key, values in read_shards(tmp_path)}
    assert found == {
        Key(hashes[0], 0, "reference"): [-4, -5],
        Key(hashes[0], 1, "reference"): [-6],
        Key(hashes[1], 0, "reference"): [-13, -14, -15],
        Key(hashes[1], 1, "reference"): [-16, -17],
        Key(hashes[1], 0, "guidance"): [-26, -28, -30],
        Key(hashes[1], 1, "guidance"): [-32, -34],
    }


def test_a_log_prob_that_is_not_finite_is_said_and_nothing_is_written(work: Any, tmp_path: Path) -> None:
    from tgdpo_megatron.score import _write

    work[2][0][1, 2] = float("nan")
    assert _write(tmp_path, *work) == (
        "the scores of row 2 of by-hand.jsonl are not finite; check the frozen checkpoints."
    )
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence(work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tgdpo_megatron.score import _write

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    said = _write(tmp_path, *work)
    assert (
        said == f"{tmp_path}: the scores cannot be written (No space left on device); what was written before is kept."
    )


def test_a_refusal_is_heard_at_the_next_round_and_few_shards_wait_for_the_disk() -> None:
    from tgdpo_megatron.score import _finished

    slow = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as writer:
        pending = deque([writer.submit(lambda: None), writer.submit(lambda: "bad"), writer.submit(slow.wait, 30)])
        pending[1].result()
        assert _finished(pending, most=2) == "bad", "while a third is still being written"
        assert len(pending) == 1
        slow.set()
        _finished(pending, most=0)
        assert not pending


def test_every_finished_write_is_taken_away_also_after_one_that_failed() -> None:
    from tgdpo_megatron.score import _finished

    with ThreadPoolExecutor(max_workers=1) as writer:
        pending = deque([writer.submit(lambda: "bad"), writer.submit(lambda: "worse"), writer.submit(lambda: None)])
        pending[-1].result()
        assert _finished(pending, most=2) == "bad"
        assert not pending
