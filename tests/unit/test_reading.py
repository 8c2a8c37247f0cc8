"""What a checkpoint's files hold is read as torch reads it; what is none of that is refused, and never run."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from tests.support.hostile import overlapping_blocks
from tgdpo_megatron.checkpoint.convert import megatron_to_hf
from tgdpo_megatron.checkpoint.index import StoredBlock, StoredTensor, _is_parted, read_index
from tgdpo_megatron.checkpoint.manifest import WEIGHTS, read_manifest
from tgdpo_megatron.checkpoint.pickled import Made, Name, Outside, read_pickle
from tgdpo_megatron.checkpoint.reading import read_into, read_plain, read_rows
from tgdpo_megatron.errors import UserError

EMBEDDING, NORM = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"


class Runs:
    """Unpickled plainly, calls something."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


# ---------------------------------------------------------------- pickles


PLAIN = [None, True, -1, 255, 70_000, 2**40, -(2**70), 1.5, "text", "ü" * 300, (), (1,), (1, 2, 3, 4), [], [[1], {}]]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_of_plain_data_is_read_as_python_reads_it(protocol: int) -> None:
    shared = ["shared"]
    content = {"values": PLAIN, "again": (shared, shared), 7: {f"key {place}": place for place in range(2000)}}
    assert read_pickle(pickle.dumps(content, protocol)) == content


def test_a_pickle_of_objects_is_read_as_a_record_of_what_it_asks_for() -> None:
    found = read_pickle(pickle.dumps(Runs(os.mkdir, "folder")))
    assert isinstance(found, Made)
    assert (found.of, found.arguments, found.state) == (Name(os.mkdir.__module__, "mkdir"), ("folder",), None)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_member_of_an_enum_is_of_its_class_whichever_python_wrote_it(protocol: int) -> None:
    """Those of 3.11.0 to 3.11.3 write `getattr` with the member's name, others the class with its value."""
    of_class = Name(Enum.__module__, "Enum"), ("VALUE",)
    for written in (Runs(getattr, Enum, "VALUE"), Runs(Enum, "VALUE")):
        found = read_pickle(pickle.dumps(written, protocol))
        assert isinstance(found, Made) and (found.of, found.arguments) == of_class and found.is_a("Enum")


@pytest.mark.parametrize("protocol", [2, 4])
def test_no_pickle_calls_anything(protocol: int, tmp_path: Path) -> None:
    victim = tmp_path / "made-by-the-pickle"
    content = pickle.dumps([Runs(os.mkdir, str(victim))], protocol)
    assert isinstance(read_pickle(content), list)
    assert not victim.exists()
    pickle.loads(content)
    assert victim.exists(), "Python's own reader would"


NEVER = {
    "an extension's code": b"\x80\x02\x82\x01.",
    "a class by its name and marked arguments": b"\x80\x02(S'x'\nios\nsystem\n.",
    "a persistent name in text": b"\x80\x02Pname\n.",
    "an object of a class on the stack": b"\x80\x02(cos\nsystem\no.",
    "keyword arguments": b"\x80\x04cos\nsystem\n)}\x92.",
    "bytes of a declared length": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".",
    "an integer of a declared length": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "text of a declared length": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b".",
    "an empty file": b"",
    "no end": b"\x80\x02N",
    "a tuple of more than there is": b"\x80\x02N\x87.",
    "a name made of numbers": b"\x80\x04K\x01K\x02\x93.",
    "an item for a number": b"\x80\x02K\x01K\x02K\x03s.",
    "a state for a name": b"\x80\x02cos\nsystem\n}b.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a tuple as a key": b"\x80\x02})K\x01s.",
    "protocol 0": pickle.dumps({"a": 1}, 0),
    "text of protocol 0": b"\x80\x02Vtext\n.",
}


@pytest.mark.parametrize("content", NEVER.values(), ids=NEVER)
def test_an_instruction_that_torch_does_not_write_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="the pickle"):
        read_pickle(content)


def test_a_deep_pickle_a_distant_memo_and_a_bomb_of_shared_lists_take_neither_time_nor_memory() -> None:
    deep = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    distant = b"\x80\x02Nr\xff\xff\xff\xff."
    bomb = b"\x80\x02]q\x00" + b"".join(b"](h\x00" + b"h\x00" * 9 + b"eq\x00" for _ in range(60)) + b"."
    started = time.process_time()
    depth, inner = 0, read_pickle(deep)
    while inner:
        depth, inner = depth + 1, inner[0]
    assert depth == 199_999 and read_pickle(distant) is None and len(read_pickle(bomb)) == 10
    assert time.process_time() - started < 2


def test_a_reference_to_numbers_outside_is_kept_as_such() -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", "0") if value is io else None

    file = io.BytesIO()
    Pickler(file, 2).dump([io])
    assert read_pickle(file.getvalue()) == [Outside(("storage", "0"))]


# ---------------------------------------------------------------- tensors


def test_every_tensor_is_what_torchs_own_reader_finds(checkpoint: Path) -> None:
    weights = checkpoint / WEIGHTS
    index = read_index(weights)
    theirs = {key: torch.empty(found.shape, dtype=getattr(torch, found.dtype)) for key, found in index.items()}
    dcp.load(theirs, storage_reader=dcp.FileSystemReader(weights), no_dist=True)
    assert len(index) == 15
    assert all(torch.equal(read_rows(weights, index, key, 0, whole.shape), whole) for key, whole in theirs.items())
    assert torch.equal(read_rows(weights, index, EMBEDDING, 100, (31, 64)), theirs[EMBEDDING][100:131])


SAVED = {
    "contiguous": torch.arange(24.0).view(4, 6),
    "transposed": torch.arange(24.0).view(6, 4).T,
    "part of a larger one": torch.arange(100.0).view(10, 10)[3:7, 2:8],
    "bf16": torch.arange(24.0).view(4, 6).bfloat16(),
    "half": torch.arange(24.0).view(4, 6).half(),
    "double": torch.arange(24.0).view(4, 6).double(),
    "int64": torch.arange(24).view(4, 6),
    "uint8": torch.arange(24, dtype=torch.uint8).view(4, 6),
    "a number": torch.tensor(3.5),
    "nothing": torch.empty(0, 5),
}


@pytest.mark.parametrize("tensor", SAVED.values(), ids=SAVED)
def test_plain_data_and_tensors_are_what_torch_loads(tensor: torch.Tensor, tmp_path: Path) -> None:
    content = {"step": 3, "betas": (0.9, 0.95), "groups": [{"lr": 1e-3, "name": None}], "state": tensor}
    torch.save(content, tmp_path / "common.pt")
    found, theirs = read_plain(tmp_path / "common.pt"), torch.load(tmp_path / "common.pt")
    assert torch.equal(found.pop("state"), theirs.pop("state")) and found == theirs


def test_the_same_regions_are_read_from_blocks_of_any_shape_and_stride(tmp_path: Path) -> None:
    """Every region of a 4 x 6 tensor that lies in four blocks, one of which was saved with its axes exchanged."""
    whole = torch.arange(24.0).view(4, 6)
    blocks = []
    with (tmp_path / "__0_0.distcp").open("wb") as file:
        for rows, columns in (((0, 1), (0, 6)), ((1, 4), (0, 2)), ((1, 3), (2, 6)), ((3, 4), (2, 6))):
            part = whole[slice(*rows), slice(*columns)].clone()
            start = file.tell()
            saved = io.BytesIO()
            torch.save(part.T.contiguous().T if rows == (1, 3) else part, saved)
            file.write(saved.getvalue())
            length = file.tell() - start
            blocks.append(StoredBlock((rows[0], columns[0]), tuple(part.shape), "__0_0.distcp", start, length))
    stored = StoredTensor("float32", (4, 6), tuple(blocks))
    for top, bottom in ((a, b) for b in range(1, 5) for a in range(b)):
        for left, right in ((a, b) for b in range(1, 7) for a in range(b)):
            target = torch.full((bottom - top, right - left), math.nan, dtype=torch.float64)
            read_into(target, tmp_path, stored, (top, left))
            assert torch.equal(target, whole[top:bottom, left:right].double())


def compressed(path: Path) -> None:
    """Write the zip file again, with its numbers compressed: a small file that stands for a large one."""
    with zipfile.ZipFile(path) as archive:
        content = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in content.items():
            archive.writestr(entry, data)


def rewritten(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Write the zip file again, with another pickle."""
    with zipfile.ZipFile(path) as archive:
        content = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in content.items():
            archive.writestr(entry, change(data) if entry.endswith("data.pkl") else data)


def test_a_saved_file_that_holds_more_than_data_is_refused(tmp_path: Path) -> None:
    victim, path = tmp_path / "made", tmp_path / "common.pt"
    bomb: list[Any] = []
    for _ in range(60):
        bomb = [bomb] * 10
    nested: list[Any] = []
    nested.append(nested)
    cases = {
        "which is no plain data": [{"a": Runs(os.mkdir, str(victim))}, {"a": os.mkdir}, {"a": torch.float32}],
        "more than plain data has": [bomb, nested],
        "as a key": [{Name: 1}],
    }
    for said, contents in cases.items():
        for content in contents:
            torch.save(content, path)
            with pytest.raises(ValueError, match=said):
                read_plain(path)
    torch.save({"a": torch.zeros(10**6)}, path)
    compressed(path)
    with pytest.raises(ValueError, match="as torch.save stores it"):
        read_plain(path)
    torch.save({"a": torch.arange(512)}, path)
    rewritten(path, lambda content: content.replace(b"M\x00\x02\x85", b"M\x00\x03\x85"))
    with pytest.raises(ValueError, match="larger than its numbers"):
        read_plain(path)
    path.write_bytes(pickle.dumps(Runs(os.mkdir, str(victim))))
    with pytest.raises(ValueError, match=r"not a file of torch\.save"):
        read_plain(path)
    assert not victim.exists()


def test_tensors_that_show_the_same_numbers_again_and_again_are_refused(tmp_path: Path) -> None:
    """A file of a few hundred bytes for each 4 MB that it would take in memory."""
    numbers = torch.zeros(10**6)
    torch.save([numbers.view(10**6)[:] for _ in range(50)], tmp_path / "common.pt")
    with pytest.raises(ValueError, match="larger than itself"):
        read_plain(tmp_path / "common.pt")
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "common.pt")
    with pytest.raises(ValueError, match="larger than its numbers"):
        read_plain(tmp_path / "common.pt")


# ---------------------------------------------------------------- the index


def changed(folder: Path, change: Callable[[Any], Any]) -> None:
    """Let a function change an index, or give another in its place."""
    path = folder / WEIGHTS / ".metadata"
    index = pickle.loads(path.read_bytes())
    instead = change(index)
    path.write_bytes(pickle.dumps(index if instead is None else instead))


def declared(**fields: Any) -> Callable[[Any], None]:
    """Declare something else of the embedding, or of its first block."""

    def change(index: Any) -> None:
        stored = index.state_dict_metadata[EMBEDDING]
        for name, value in fields.items():
            setattr(stored if hasattr(stored, name) else stored.chunks[0], name, value)

    return change


def placed(**fields: Any) -> Callable[[Any], None]:
    """Place the first block of the embedding elsewhere."""

    def change(index: Any) -> None:
        for name, value in fields.items():
            setattr(index.storage_data[MetadataIndex(EMBEDDING, (0, 0))], name, value)

    return change


def as_an_object(index: Any) -> None:
    index.state_dict_metadata[NORM] = BytesStorageMetadata()
    index.storage_data[MetadataIndex(NORM)] = index.storage_data.pop(MetadataIndex(NORM, (0,)))


def extra_object(index: Any) -> None:
    index.state_dict_metadata["extra"] = BytesStorageMetadata()
    index.storage_data[MetadataIndex("extra")] = _StorageInfo("__0_0.distcp", 0, 100)


def bomb(_: Any) -> Any:
    lists: list[Any] = []
    for _ in range(100):
        lists = [lists] * 10
    return lists


def falsy(index: Metadata) -> Any:
    """False, and with everything that an index has."""
    found: Any = OrderedDict()
    found.__dict__.update(vars(index))
    return found


WRONG_INDEXES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a weight that is an object": (as_an_object, f"it says that '{NORM}' is an object, and not a tensor"),
    "an object beside the weights": (extra_object, "it says that 'extra' is an object, and not a tensor"),
    "an empty dict that has an index's attributes": (falsy, "it has something else where a Metadata belongs"),
    "an empty dict": (lambda _: {}, "it has something else where a Metadata belongs"),
    "a bomb of lists": (bomb, "it has something else where a Metadata belongs"),
    "10^15 numbers": (declared(size=torch.Size((10**15, 64)), sizes=torch.Size((10**15, 64))), "more numbers than its"),
    "10^15 numbers that no block holds": (declared(size=torch.Size((10**15, 64))), "are not the whole tensor"),
    "a size below zero": (declared(size=torch.Size((-5, 64))), "it has the size -5"),
    "a size that is a word": (declared(size="long"), "where a torch.Size belongs"),
    "a block outside": (declared(offsets=torch.Size((300, 0))), "does not lie inside the tensor"),
    "a block elsewhere": (declared(sizes=torch.Size((1, 64)), offsets=torch.Size((7, 0))), "no place for a block"),
    "no block": (declared(chunks=[]), "are not the whole tensor"),
    "blocks without end": (declared(chunks=[None] * 10**6), "more blocks of"),
    "a block that is none": (declared(chunks=[3]), "where a ChunkStorageMetadata belongs"),
    "complex numbers": (
        lambda i: setattr(i.state_dict_metadata[EMBEDDING].properties, "dtype", torch.complex64),
        "dtype",
    ),
    "a file elsewhere": (placed(relative_path="/etc/passwd"), "'/etc/passwd' is not the name of a file"),
    "a file above": (placed(relative_path="../manifest.json"), "'../manifest.json' is not the name of a file"),
    "a place below zero": (placed(offset=-1), "it has the size -1"),
    "a place that is no number": (placed(offset="0"), "it has a str where a int belongs"),
    "a length beyond the file": (placed(length=2**62), "ends before a block that the index places in it"),
    "a file that is not there": (placed(relative_path="__7_0.distcp"), "__7_0.distcp: .* cannot be read .no such file"),
    "a transformed block": (placed(transform_descriptors=["zstd"]), "is not stored as it is"),
    "a block of no tensor": (lambda i: i.state_dict_metadata.pop(NORM) and None, "that no tensor has"),
    "no places": (lambda i: setattr(i, "storage_data", None), "more blocks of"),
    "no tensors": (lambda i: setattr(i, "state_dict_metadata", None), "it has a NoneType where a dict belongs"),
}


@pytest.mark.parametrize(("change", "said"), WRONG_INDEXES.values(), ids=WRONG_INDEXES)
def test_an_index_that_is_not_that_of_its_files_is_refused(
    change: Callable[[Any], Any], said: str, copy: Path, tmp_path: Path
) -> None:
    changed(copy, change)
    started = time.process_time()
    with pytest.raises(UserError, match=said):
        read_manifest(copy)
    with pytest.raises(UserError, match=said):
        megatron_to_hf(copy, tmp_path / "hf")
    assert time.process_time() - started < 2 and not (tmp_path / "hf").exists()


def test_blocks_that_overlap_and_leave_a_hole_are_refused(copy: Path, tmp_path: Path) -> None:
    """They have as many numbers as the tensor, so that counting does not notice; the hole would be what memory held."""
    overlapping_blocks(copy, random.Random(0), tmp_path)
    with pytest.raises(UserError, match="index is damaged .the blocks of '.*' are not the whole tensor"):
        megatron_to_hf(copy, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_boxes_part_a_tensor_where_each_number_is_counted_once() -> None:
    """Against counting in a mask, for random boxes, of which some part the tensor and some have its size by chance."""
    rng, whole = random.Random(0), (3, 4, 2)
    seen = {True: 0, False: 0}
    for _ in range(2000):
        boxes = random_boxes(rng, whole)
        mask = torch.zeros(whole, dtype=torch.int64)
        for offsets, sizes in boxes:
            mask[tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))] += 1
        parted = bool((mask == 1).all())
        assert _is_parted(whole, boxes) == parted, boxes
        seen[parted] += 1
    assert min(seen.values()) > 100
    assert _is_parted((), [((), ())]) and not _is_parted((), []) and not _is_parted((), [((), ()), ((), ())])
    assert _is_parted((0, 5), []) and _is_parted((0, 5), [((0, 0), (0, 5))])
    with pytest.raises(ValueError, match="cut along 4 axes"):
        _is_parted((2,) * 4, [((0,) * 4, (1,) * 4)])


def random_boxes(rng: random.Random, whole: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A tensor cut in two some times; then, half of the time, one box moved where another of its size may be."""
    boxes = [(tuple(0 for _ in whole), whole)]
    for _ in range(rng.randint(0, 6)):
        offsets, sizes = boxes.pop(rng.randrange(len(boxes)))
        axis = rng.randrange(len(whole))
        at = rng.randint(0, sizes[axis])
        for first, size in ((0, at), (at, sizes[axis] - at)):
            moved = (*offsets[:axis], offsets[axis] + first, *offsets[axis + 1 :])
            boxes.append((moved, (*sizes[:axis], size, *sizes[axis + 1 :])))
    if rng.random() < 0.5:
        _, sizes = boxes.pop(rng.randrange(len(boxes)))
        boxes.append((tuple(rng.randint(0, all_ - size) for all_, size in zip(whole, sizes, strict=True)), sizes))
    return boxes


def test_a_link_out_of_the_checkpoint_is_not_followed(copy: Path, tmp_path: Path) -> None:
    (file,) = (copy / WEIGHTS).glob("*.distcp")
    shutil.move(file, tmp_path / "elsewhere.distcp")
    file.symlink_to(tmp_path / "elsewhere.distcp")
    with pytest.raises(UserError, match="is a link to a file outside the checkpoint"):
        read_index(copy / WEIGHTS)


def test_a_link_that_leads_to_itself_is_refused(copy: Path) -> None:
    (file,) = (copy / WEIGHTS).glob("*.distcp")
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(UserError, match="cannot be read .no such file"):
        read_index(copy / WEIGHTS)


def test_weights_of_a_dtype_that_no_model_is_stored_in_are_not_exported(checkpoint: Path, tmp_path: Path) -> None:
    from tgdpo_megatron.checkpoint.convert import _check_stored
    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.model.families import family_of

    description = describe(checkpoint)
    index = read_index(checkpoint / WEIGHTS)
    index[NORM] = StoredTensor("float64", index[NORM].shape, index[NORM].blocks)
    with pytest.raises(UserError, match=f"{NORM} holds float64 numbers, which no weight is stored as"):
        _check_stored(family_of(description).tensors(description), index, checkpoint)


def test_a_block_that_holds_another_tensor_or_a_call_is_refused(copy: Path, tmp_path: Path) -> None:
    victim = tmp_path / "made"
    (file,) = (copy / WEIGHTS).glob("*.distcp")
    block = read_index(copy / WEIGHTS)[NORM].blocks[0]
    before = file.read_bytes()
    contents = {"another tensor": torch.zeros(32, 2), "where a tensor belongs": Runs(os.mkdir, str(victim))}
    for said, content in contents.items():
        saved = io.BytesIO()
        torch.save(content, saved)
        file.write_bytes(before + saved.getvalue())
        where, length = len(before), len(saved.getvalue())

        def moved(index: Any, where: int = where, length: int = length) -> None:
            index.storage_data[MetadataIndex(NORM, (0,))] = _StorageInfo(block.file, where, length)

        changed(copy, moved)
        with pytest.raises(UserError, match=said):
            megatron_to_hf(copy, tmp_path / "hf")
    assert not victim.exists() and not (tmp_path / "hf").exists()


def test_an_index_may_be_written_by_any_release_of_torch_and_python(checkpoint: Path, copy: Path) -> None:
    """Python 3.11.2 writes getattr(Enum, name) where 3.11.7 writes Enum(value); protocols differ."""
    whole = read_index(checkpoint / WEIGHTS)
    index = pickle.loads((checkpoint / WEIGHTS / ".metadata").read_bytes())
    for protocol in (2, 3, 4, 5):
        (copy / WEIGHTS / ".metadata").write_bytes(pickle.dumps(index, protocol))
        assert read_index(copy / WEIGHTS) == whole
    assert isinstance(index.state_dict_metadata[NORM], TensorStorageMetadata)


# ---------------------------------------------------------------- the manifest


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000, "not a checkpoint manifest"),
        ("[]", "not a checkpoint manifest"),
        ('{"weights": ' + "9" * 5000 + "}", "not a checkpoint manifest"),
        (None, "which is too much for a checkpoint manifest"),
        ({"iteration": "ten"}, "iteration cannot be 'ten'"),
        ({"iteration": -2}, "iteration cannot be -2"),
        ({"iteration": True}, "iteration cannot be True"),
        ({"weights": 7}, "weights cannot be 7"),
        ({"chat_template_kwargs": []}, r"chat_template_kwargs cannot be \[\]"),
    ],
    ids=["deep", "list", "digits", "huge", "word", "negative", "bool", "number", "no mapping"],
)
def test_a_manifest_of_other_things_is_refused(content: Any, said: str, copy: Path) -> None:
    path = copy / "manifest.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_text(" " * 17 * 1024**2 if content is None else content)
    with pytest.raises(UserError, match=said) as refused:
        read_manifest(copy)
    assert str(refused.value).startswith(str(path))
