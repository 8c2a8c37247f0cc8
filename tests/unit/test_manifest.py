"""A checkpoint's index is a pickle; ours are read, others that would run code are refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from tgdpo_megatron.checkpoint.manifest import WEIGHTS, read_metadata
from tgdpo_megatron.errors import UserError


class _Runs:
    """Unpickled plainly, makes a folder."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def test_index_of_a_converted_checkpoint_is_read(checkpoint: Path) -> None:
    assert "embedding.word_embeddings.weight" in read_metadata(checkpoint / WEIGHTS).state_dict_metadata


def test_index_that_would_run_code_is_refused_before_it_runs(tmp_path: Path) -> None:
    victim = tmp_path / "made-by-the-pickle"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Runs(os.mkdir, str(victim))))
    with pytest.raises(UserError, match="which no index holds"):
        read_metadata(tmp_path)
    assert not victim.exists()


def test_function_of_an_allowed_module_is_refused(tmp_path: Path) -> None:
    import torch.distributed.checkpoint.format_utils as allowed_module

    call = _Runs(allowed_module.dcp_to_torch_save, "there", "here")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(call))
    with pytest.raises(UserError, match="which no index holds"):
        read_metadata(tmp_path)


def test_an_enums_member_may_be_looked_up_by_name_as_some_pythons_pickle_it(tmp_path: Path) -> None:
    """Python 3.11.2 writes getattr(Enum, name) where 3.11.7 writes Enum(value)."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as Encoding

    member = Encoding.TORCH_CONTIGUOUS_FORMAT
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Runs(getattr, Encoding, member.name)))
    assert read_metadata(tmp_path) is member


@pytest.mark.parametrize("name", ["__init__", "mro", "__subclasses__", "TORCH_NOTHING"])
def test_nothing_else_may_be_looked_up(name: str, tmp_path: Path) -> None:
    import torch
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as Encoding

    for owner in (Encoding, torch.Size):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(_Runs(getattr, owner, name)))
        with pytest.raises(UserError, match="which no index does"):
            read_metadata(tmp_path)
