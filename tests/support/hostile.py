"""Damage to a checkpoint, blind and with intent: what an accident, or somebody who wants code to run, does to a file.

Each kind of damage is a function (folder, random, marker) that changes a copy of a checkpoint in place. Whatever is
called to call makes the folder `marker`.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
)

Damage = Callable[[Path, random.Random, Path], None]


class Runs:
    """Unpickled plainly, calls something."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def saved(content: Any) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


# ---------------------------------------------------------------- the two attacks that once worked


def weight_as_object(folder: Path, marker: Path) -> None:
    """The index calls a weight an object of the weight's size; its bytes are those of a pickle that calls something."""
    key, index = "embedding.word_embeddings.weight", index_of(folder)
    instead: Any = BytesStorageMetadata()
    instead.size = index.state_dict_metadata[key].size  # which Megatron compares
    index.state_dict_metadata[key] = instead
    index.storage_data = {place: info for place, info in index.storage_data.items() if place.fqn != key}
    append(folder, saved(Runs(os.mkdir, str(marker))), index, MetadataIndex(key))
    write_index(folder, index)


def index_beside_the_index(folder: Path, marker: Path) -> None:
    """The index is empty, and so false, with an index's attributes; an index of the first rank calls something."""
    empty: Any = OrderedDict()
    empty.__dict__.update(vars(index_of(folder)))
    write_index(folder, empty)
    (folder / "weights" / "__0.metadata").write_bytes(pickle.dumps(Runs(os.mkdir, str(marker))))


# ---------------------------------------------------------------- blind damage


def flipped_bits(folder: Path, rng: random.Random, _: Path) -> None:
    """Some bits of a file."""
    path = some_file(folder, rng)
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flipped_heads(folder: Path, rng: random.Random, _: Path) -> None:
    """Some bits of what describes a tensor, an index or the state."""
    path = some_file(folder, rng)
    content = bytearray(path.read_bytes())
    start = 0
    if path.suffix == ".distcp":
        blocks = [info for info in index_of(folder).storage_data.values() if info.relative_path == path.name]
        block = rng.choice(blocks)
        start = block.offset if rng.random() < 0.5 else max(block.offset, block.offset + block.length - 700)
    for _ in range(rng.randint(1, 8)):
        content[min(len(content) - 1, start + rng.randrange(700))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def moved_bytes(folder: Path, rng: random.Random, _: Path) -> None:
    """A file that is cut, grown, partly overwritten, or has a part twice."""
    path = some_file(folder, rng)
    content = path.read_bytes()
    first, last = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
    middle = content[first:last]
    path.write_bytes(
        rng.choice(
            [
                content[:first],
                content[last:],
                content + rng.randbytes(rng.randint(1, 5000)),
                content[:first] + bytes(len(middle)) + content[last:],
                content[:first] + rng.randbytes(len(middle)) + content[last:],
                content[:last] + middle + content[last:],
                content[:first] + content[last:],
            ]
        )
    )


# ---------------------------------------------------------------- pickles


def inserted_instructions(folder: Path, rng: random.Random, marker: Path) -> None:
    """Instructions of a pickle, put between those of the index, of the plain state, or of a tensor's description."""

    def insert(content: bytes) -> bytes:
        places = [place for _, _, place in pickletools.genops(content)]
        place = rng.choice([*places[1:], places[-1]])
        return content[:place] + rng.choice(instructions(marker)) + content[place:]

    change_a_pickle(folder, rng, insert)


def instructions(marker: Path) -> list[bytes]:
    """Instructions that call something, or ask for much."""
    path = str(marker).encode()
    text = b"X" + struct.pack("<I", len(path)) + path
    calls = [pickle.dumps(Runs(os.mkdir, str(marker)), protocol)[2:-1] for protocol in (2, 3, 4, 5)]
    script = f"import os; os.mkdir({str(marker)!r})".encode()
    return [
        *calls,
        *(call + b"0" for call in calls),
        b"cposix\nmkdir\n(" + text + b"tR",
        b"\x8c\x05posix\x8c\x05mkdir\x93(" + text + b"tR",
        b"(" + text + b"iposix\nmkdir\n",
        b"(cposix\nmkdir\n" + text + b"o",
        b"cposix\nmkdir\n(" + text + b"t}\x92",
        b"cposix\nmkdir\n(" + text + b"t\x81",
        b"cbuiltins\nexec\n(X" + struct.pack("<I", len(script)) + script + b"tR0",
        b"cbuiltins\n__import__\nX\x04\x00\x00\x00this\x85R",
        b"ctorch.hub\nload\n(X\x01\x00\x00\x00atR",
        b"cbuiltins\ngetattr\ncos\nmkdir\nX\x08\x00\x00\x00__call__\x86R" + text + b"\x85R",
        b"ctorch.distributed.checkpoint.format_utils\ndcp_to_torch_save\n(tR",
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n}X\x08\x00\x00\x00__init__cposix\nmkdir\nsb",
        b"}X\x0c\x00\x00\x00__setstate__cposix\nmkdir\nsb",
        *(
            b"\x82\x01",
            b"\x83\x01\x00",
            b"\x84\x01\x00\x00\x00",
            b"Pname\n",
            b"Q",
            b"2",
            b"0",
            b"1",
            b".",
            b"b",
            b"R",
            b"u",
        ),
        b"\x8b" + struct.pack("<i", 2**31 - 1),
        b"\x8e" + struct.pack("<Q", 2**40),
        b"\x96" + struct.pack("<Q", 2**40),
        b"\x8d" + struct.pack("<Q", 2**62),
        b"X" + struct.pack("<I", 2**32 - 1),
        b"Nr\xff\xff\xff\xff0",
        b"N\x8a\xff" + b"\x7f" * 255 + b"0",
        b"(" * 100_000,
        b"]" * 100_000,
        b"]" * 100_000 + b"a" * 99_999,
        b"N" + b"\x85" * 100_000,
        b"]q\x00" + b"(h\x00h\x00h\x00h\x00h\x00eq\x00" * 50,
        b"]\x94" + b"](" + b"h\x00" * 100 + b"e\x94",
    ]


def change_a_pickle(folder: Path, rng: random.Random, change: Callable[[bytes], bytes]) -> None:
    """Change the index, the plain state's pickle, or that of a tensor, which then lies at the end of its file."""
    weights, where = folder / "weights", rng.choice(["index", "state", "tensor"])
    if where == "index":
        (weights / ".metadata").write_bytes(change((weights / ".metadata").read_bytes()))
    elif where == "state":
        path = weights / "common.pt"
        path.write_bytes(rewritten(path.read_bytes(), change))
    else:
        index = index_of(folder)
        place = rng.choice(list(index.storage_data))
        append(folder, rewritten(block_of(folder, index, place), change), index, place)
        write_index(folder, index)


def rewritten(zipped: bytes, change: Callable[[bytes], bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A file of torch.save with another pickle."""
    with zipfile.ZipFile(io.BytesIO(zipped)) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, change(data) if name.endswith("/data.pkl") else data)
    return result.getvalue()


# ---------------------------------------------------------------- the index


def other_index(folder: Path, rng: random.Random, _: Path) -> None:
    """An index that is whole, but says something else."""
    index = index_of(folder)
    rng.choice(_EDITS)(index, rng)
    (folder / "weights" / ".metadata").write_bytes(pickle.dumps(index, rng.randint(2, 5)))


NUMBERS: list[Any] = [-1, 0, 1, 2, 7, 10**6, 10**15, 2**31, 2**62, 2**63, 2**64, -(2**63), 2**200]
NUMBERS += [1.5, "1", None, True, [], (), b"1"]
PATHS = ["/etc/passwd", "../manifest.json", "../../x.distcp", "a/b.distcp", "", ".", "..", "common.pt", ".metadata"]
PATHS += ["__9_0.distcp", "/dev/zero", "x\0.distcp", "\x1b[2J.distcp", "__0_0.distcp/", "./__0_0.distcp", "é.distcp"]


def _tensor(index: Metadata, rng: random.Random) -> Any:
    return rng.choice(list(index.state_dict_metadata.values()))


def _sizes(rng: random.Random, before: Any) -> Any:
    """A torch.Size of other numbers, or no such thing."""
    number = rng.choice(NUMBERS)
    if type(number) is not int or not -(2**63) <= number < 2**63 or rng.random() < 0.2:
        return rng.choice([number, (number,), {}, torch.Size([1] * 40), torch.Size([2**62] * 3)])
    sizes = [*before] or [1]
    sizes[rng.randrange(len(sizes))] = number
    return torch.Size(sizes)


def _edit_size(index: Metadata, rng: random.Random) -> None:
    stored = _tensor(index, rng)
    stored.size = _sizes(rng, stored.size)


def _edit_block(index: Metadata, rng: random.Random) -> None:
    block, name = rng.choice(_tensor(index, rng).chunks), rng.choice(["sizes", "offsets"])
    setattr(block, name, _sizes(rng, getattr(block, name)))


def _edit_blocks(index: Metadata, rng: random.Random) -> None:
    stored = _tensor(index, rng)
    stored.chunks = rng.choice([[], None, stored.chunks * 2, [None] * 1000, {}, [stored], "chunks", (stored.chunks,)])


def _edit_dtype(index: Metadata, rng: random.Random) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.complex64, torch.bool, torch.uint8]
    _tensor(index, rng).properties.dtype = rng.choice([*dtypes, torch.float8_e4m3fn, "float32", None])


def _edit_place(index: Metadata, rng: random.Random) -> None:
    info = rng.choice(list(index.storage_data.values()))
    name = rng.choice(["relative_path", "offset", "length", "transform_descriptors"])
    object.__setattr__(info, name, rng.choice(PATHS if name == "relative_path" and rng.random() < 0.8 else NUMBERS))


def _edit_kind(index: Metadata, rng: random.Random) -> None:
    key = rng.choice(list(index.state_dict_metadata))
    index.state_dict_metadata[key] = rng.choice([BytesStorageMetadata(), None, {}, [], Runs(print), torch.Size, "x"])


def _edit_names(index: Metadata, rng: random.Random) -> None:
    key = rng.choice(list(index.state_dict_metadata))
    stored = index.state_dict_metadata.pop(key)
    if rng.random() < 0.7:
        index.state_dict_metadata[rng.choice([1, None, "x", "\x1b[31m" + str(key), ("a", 1), 1.5, "k" * 10**6])] = (
            stored
        )


def _edit_fields(index: Metadata, rng: random.Random) -> None:
    names = ["state_dict_metadata", "storage_data", "planner_data", "storage_meta", "version", "more"]
    setattr(index, rng.choice(names), rng.choice([None, {}, [], OrderedDict(), 7, "x", Runs(print), index]))


_EDITS = [_edit_size, _edit_block, _edit_blocks, _edit_dtype, _edit_place, _edit_kind, _edit_names, _edit_fields]


# ---------------------------------------------------------------- other files


def other_files(folder: Path, rng: random.Random, marker: Path) -> None:
    """A file that is replaced by, or gets beside it, one that is made to run code or to take memory."""
    weights, evil = folder / "weights", Runs(os.mkdir, str(marker))
    plain, zipped = pickle.dumps(evil, rng.randint(0, 5)), saved({"state": evil, "iteration": 1})
    empty: Any = OrderedDict()
    empty.__dict__.update(vars(index_of(folder)))
    bomb: list[Any] = []
    for _ in range(80):
        bomb = [bomb] * 10
    nested: Any = ()
    for _ in range(400):
        nested = (nested,)
    content = rng.choice([plain, zipped, b"", b"\0" * 4096, pickle.dumps(empty), pickle.dumps(bomb), pickle.dumps([])])
    name = rng.choice([".metadata", "common.pt", "__0_0.distcp", "metadata.json"])
    others = ["__0.metadata", "__1.metadata", ".metadata.bck", "model.pt", "__0_0.pt", "common.pt.bak"]
    state = rng.choice(
        [bomb, nested, [evil], {"a": {1.5: 2}}, {"a": b"bytes"}, {"a": {1, 2}}, torch.zeros(4), evil, ()]
    )
    rng.choice(
        [
            lambda: (weights / name).write_bytes(content),
            lambda: weight_as_object(folder, marker),
            lambda: index_beside_the_index(folder, marker),
            lambda: [(weights / other).write_bytes(plain) for other in others] and (weights / ".metadata").unlink(),
            lambda: [(weights / other).write_bytes(plain) for other in others],
            lambda: (weights / "common.pt").write_bytes(saved(state)),
            lambda: (weights / "common.pt").write_bytes(saved({"optimizer": state})),
            lambda: (weights / "common.pt").write_bytes(
                saved(torch.load(weights / "common.pt") | {"model": {"0": state}})
            ),
            lambda: _other_kind_of_file(weights / name, rng),
            lambda: (folder / "manifest.json").write_text(
                rng.choice(["[" * 100_000, "{}", "[]", "null", "9" * 5000, "NaN"])
            ),
        ]
    )()


def _other_kind_of_file(path: Path, rng: random.Random) -> None:
    """A folder, a pipe that nobody writes to, a link to endless zeros or out of the folder, a file with a huge hole."""
    elsewhere = path.parent.parent.parent / "elsewhere.distcp"
    path.rename(elsewhere)
    kind = rng.randrange(6)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.symlink_to(elsewhere)
    elif kind == 4:
        path.symlink_to(path)
    else:
        with path.open("wb") as file:
            file.truncate(2**40)


def other_blocks(folder: Path, rng: random.Random, marker: Path) -> None:
    """A block of a tensor in whose place something else lies, in a zip file that is whole or is not."""
    index = index_of(folder)
    place = rng.choice(list(index.storage_data))
    before = block_of(folder, index, place)
    tensor = torch.load(io.BytesIO(before))
    evil = Runs(os.mkdir, str(marker))
    contents: list[Callable[[], bytes]] = [
        lambda: saved(evil),
        lambda: pickle.dumps(evil),
        lambda: saved([tensor]),
        lambda: saved(torch.zeros(1).expand(tensor.shape)),
        lambda: saved(tensor.double()),
        lambda: saved(tensor.flatten()),
        lambda: saved(tensor.to_sparse()) if tensor.dim() else saved(3),
        lambda: saved(torch.nn.Parameter(tensor)),
        lambda: saved(torch.zeros(tensor.shape, device="meta")),
        lambda: rewritten(before, lambda content: content, zipfile.ZIP_DEFLATED),
        lambda: rewritten(before, lambda content: content + b"x" * 2 * 1024**2),
        lambda: rewritten(before, lambda content: content.replace(b"FloatStorage", b"BoolStorage")),
        lambda: rewritten(before, lambda content: content.replace(b"torch\n", b"posix\n")),
        lambda: rewritten(before, lambda content: _other_numbers(content, rng)),
        lambda: _many_files(before),
        lambda: _other_fields(before, rng),
    ]
    append(folder, rng.choice(contents)(), index, place)
    write_index(folder, index)


def overlapping_blocks(folder: Path, rng: random.Random, _: Path) -> None:
    """A block in two that have as many numbers as it has, where one row lies in both and the last in none."""
    index = index_of(folder)
    places = [place for place in index.storage_data if len(place.offset) and _rows(index, place) > 2]
    place = rng.choice(places)
    rows, tensor = _rows(index, place), torch.load(io.BytesIO(block_of(folder, index, place)))
    (chunk,) = (chunk for chunk in index.state_dict_metadata[place.fqn].chunks if chunk.offsets == place.offset)
    half, others = rows // 2, place.offset[1:]
    chunk.sizes = torch.Size((half, *chunk.sizes[1:]))
    moved = torch.Size((place.offset[0] + half - 1, *others))
    second = ChunkStorageMetadata(moved, torch.Size((rows - half, *chunk.sizes[1:])))
    index.state_dict_metadata[place.fqn].chunks.append(second)
    append(folder, saved(tensor[:half].clone()), index, place)
    append(folder, saved(tensor[half - 1 : rows - 1].clone()), index, MetadataIndex(place.fqn, moved))
    write_index(folder, index)


def _rows(index: Metadata, place: MetadataIndex) -> int:
    """Of a block."""
    chunks = index.state_dict_metadata[place.fqn].chunks
    return next(chunk.sizes[0] for chunk in chunks if chunk.offsets == place.offset)


def _other_numbers(content: bytes, rng: random.Random) -> bytes:
    """Other sizes, strides or offsets in the description of a tensor."""
    places = [
        (place, op.name, arg) for op, arg, place in pickletools.genops(content) if op.name in ("BININT1", "BININT2")
    ]
    place, name, _ = rng.choice(places)
    number = (
        b"J" + struct.pack("<i", rng.choice([-1, 0, 1, 255, 2**31 - 1]))
        if rng.random() < 0.5
        else b"\x8a\x08" + b"\x7f" * 8
    )
    return content[:place] + number + content[place + (2 if name == "BININT1" else 3) :]


def _many_files(zipped: bytes) -> bytes:
    """As many files in the zip file as make its list of files long."""
    file = io.BytesIO(zipped)
    with zipfile.ZipFile(file, "a") as archive:
        for number in range(3000):
            archive.writestr(f"{'x' * 400}{number}", b"")
    return file.getvalue()


def _other_fields(zipped: bytes, rng: random.Random) -> bytes:
    """Another number in a field of the zip file's list of files or of its end."""
    content = bytearray(zipped)
    listed = content.find(b"PK\1\2")
    place = rng.randrange(listed, len(content) - 4)
    content[place : place + 4] = struct.pack("<I", rng.choice([0, 1, 2**31 - 1, 2**32 - 1, rng.randrange(2**32)]))
    return bytes(content)


# ---------------------------------------------------------------- tools


def some_file(folder: Path, rng: random.Random) -> Path:
    """One of the files that a checkpoint is read from."""
    files = [path for path in sorted((folder / "weights").iterdir()) if path.is_file() and path.stat().st_size]
    return rng.choice([*files, folder / "manifest.json"])


def index_of(folder: Path) -> Metadata:
    """The index of a checkpoint that we made ourselves."""
    index: Metadata = pickle.loads((folder / "weights" / ".metadata").read_bytes())
    return index


def write_index(folder: Path, index: Any) -> None:
    """Put an index in the place of a checkpoint's."""
    (folder / "weights" / ".metadata").write_bytes(pickle.dumps(index))


def block_of(folder: Path, index: Metadata, place: MetadataIndex) -> bytes:
    """The bytes of a block."""
    info = index.storage_data[place]
    return (folder / "weights" / info.relative_path).read_bytes()[info.offset : info.offset + info.length]


def append(folder: Path, content: bytes, index: Metadata, place: MetadataIndex) -> None:
    """Write a block to the end of a file, and let the index place it there."""
    path = sorted((folder / "weights").glob("*.distcp"))[0]
    index.storage_data[place] = _StorageInfo(path.name, path.stat().st_size, len(content))
    with path.open("ab") as file:
        file.write(content)


KINDS: dict[str, Damage] = {
    "flipped bits": flipped_bits,
    "flipped bits of descriptions": flipped_heads,
    "bytes cut, moved, overwritten": moved_bytes,
    "instructions put into pickles": inserted_instructions,
    "an index that says other things": other_index,
    "other blocks": other_blocks,
    "blocks that overlap": overlapping_blocks,
    "other files": other_files,
}
REFUSED = ("blocks that overlap",)
"""The kinds after which no reading may give numbers at all."""
