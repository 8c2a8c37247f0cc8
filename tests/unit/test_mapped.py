"""Arrays that stay in their files are the arrays that were written, and a damaged file is refused when it is opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tgdpo_megatron.data.mapped import Scattered, map_arrays

ARRAYS = {
    "tokens": np.arange(7, dtype=np.int32),
    "starts": np.array([0, 3, 7]),
    "hashes": np.arange(64, dtype=np.uint8).reshape(2, 32),
    "scores": np.linspace(-1, 1, 5, dtype=np.float32),
    "nothing": np.empty((0, 8), dtype=np.uint8),
}


def test_mapped_arrays_are_those_that_the_library_reads_and_cannot_be_written(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "a.safetensors", metadata={"format": "np"})
    mapped, read = map_arrays(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")
    assert mapped.keys() == read.keys()
    for name, array in read.items():
        assert mapped[name].dtype == array.dtype and mapped[name].shape == array.shape
        assert np.array_equal(mapped[name], array)
    with pytest.raises(ValueError, match="read-only"):
        mapped["tokens"][0] = 1


def test_a_file_that_is_replaced_is_still_the_one_that_was_opened(tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 2)):
        save_file({"tokens": np.full(10_000, value, np.int32)}, tmp_path / name)
    mapped = map_arrays(tmp_path / "a")["tokens"]
    (tmp_path / "b").replace(tmp_path / "a")
    assert set(mapped.tolist()) == {1} and set(map_arrays(tmp_path / "a")["tokens"].tolist()) == {2}


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_file_that_was_cut_is_refused_when_it_is_opened(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(ARRAYS, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises((SafetensorError, ValueError)):
        map_arrays(path)


def test_a_scattered_array_is_the_pieces_in_their_order() -> None:
    """Five pieces of random lengths, two of them empty, in three parts, one of them empty, with gaps between."""
    flat = np.random.default_rng(0).normal(size=12).astype(np.float32)
    starts = np.array([0, 3, 3, 8, 12, 12])
    parts = [np.full(20, np.nan, np.float32), np.empty(0, np.float32), np.full(9, np.nan, np.float32)]
    parts[0][10:15], parts[2][1:5], parts[0][2:5] = flat[3:8], flat[8:12], flat[0:3]
    scattered = Scattered(parts, [20, 0, 9], starts, np.array([2, 0, 10, 21, 0]))
    assert len(scattered) == 12 and np.array_equal(np.asarray(scattered), flat)
    for begin, end in ((0, 3), (3, 8), (8, 12), (4, 6), (3, 3), (12, 12)):
        assert np.array_equal(scattered[begin:end], flat[begin:end])
    with pytest.raises(IndexError, match="not within a piece"):
        scattered[2:4]
