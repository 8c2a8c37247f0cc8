"""A checkpoint from a stranger cannot run code, whichever way it is read and whatever is in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.faults.fuzz import fuzz, table
from tests.support.hostile import index_beside_the_index, weight_as_object
from tests.support.program import run_ranks
from tgdpo_megatron.checkpoint.convert import megatron_to_hf
from tgdpo_megatron.errors import UserError

ATTACKS = {"a-weight-called-an-object": weight_as_object, "an-index-beside-a-false-one": index_beside_the_index}


def test_what_runs_code_in_torchs_own_reader_is_refused_and_runs_none(checkpoint: Path, tmp_path: Path) -> None:
    """At the export and where training loads weights."""
    strangers = {name: Path(shutil.copytree(checkpoint, tmp_path / name)) for name in ATTACKS}
    for name, attack in ATTACKS.items():
        attack(strangers[name], tmp_path / f"{name}-ran")
    said = run_ranks("tests.support.jobs", "loading_says", 1, folders=[str(folder) for folder in strangers.values()])
    for (name, folder), sentence in zip(strangers.items(), said, strict=True):
        assert f"{folder / 'weights' / '.metadata'}: the checkpoint's index is damaged" in sentence
        with pytest.raises(UserError, match="the checkpoint's index is damaged"):
            megatron_to_hf(folder, tmp_path / "hf")
        assert not (tmp_path / f"{name}-ran").exists() and not (tmp_path / "hf").exists()

        weights = {"embedding.word_embeddings.weight": torch.empty(330, 64)}
        dcp.load(weights, storage_reader=dcp.FileSystemReader(folder / "weights"), no_dist=True)
        assert (tmp_path / f"{name}-ran").exists(), "torch's own reader runs it"


def test_damaged_and_hostile_checkpoints_end_in_the_numbers_of_before_or_in_one_sentence() -> None:
    """Each kind of damage some times; `python -m tests.faults.fuzz` does it thousands of times."""
    rows = fuzz(mutations=280, seed=0)
    assert all(row.passed for row in rows), table(rows)
    assert sum(row.refused for row in rows) > 100 and sum(row.same for row in rows) > 20, table(rows)
