"""What an entry of the list is, and the commands that most entries share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class BadInput:
    """One mistake.

    A command runs in a folder of its own, which holds `pairs.jsonl`, `hf` (a HuggingFace model), `megatron` (the same,
    converted), `scores` (its scores of the pairs), `run` (a training of two steps), `scorer` (a reward model) and
    `answers.jsonl`. Names in `says` are relative to it; an absolute path to it is written FOLDER, one to the repository
    ROOT.

    Attributes:
        name: The mistake, in words.
        command: What follows `python -m`.
        says: The sentence, after `error: `. `*` stands for what differs from machine to machine.
        files: Files to write first: name -> text, bytes, or what is written as JSON.
        make: Makes what files alone cannot: gets the folder.
        environment: Variables that differ from the user's. None unsets one.
        limits: Limits of the system: name in `resource`, such as RLIMIT_FSIZE -> number.
        room: Bytes of a small disk that is mounted at `disk`.
        obeys: Whether the command has to obey permissions, which root does not.
        leaves: Files that may be there or changed afterwards, as patterns.
        late: Whether the work has begun when it is refused, which takes seconds: only `make faults` tries it.
        fresh: Whether Python itself must start anew: for several ranks, and for what is read when Python starts.
        seconds: How long it may take, the start of Python and torch left out.
        skip: Why it cannot be tried here, or None.
    """

    name: str
    command: tuple[str, ...]
    says: str
    files: Mapping[str, Any] = field(default_factory=dict)
    make: Callable[[Path], None] | None = None
    environment: Mapping[str, str | None] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    room: int | None = None
    obeys: bool = False
    leaves: tuple[str, ...] = ()
    late: bool = False
    fresh: bool = False
    seconds: float = 10
    skip: Callable[[], str | None] = lambda: None


SMALL = (
    "data.max_length=64",
    "train.train_iters=2",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "optimizer.lr_warmup_iters=0",
)


def train(*changes: str, given: tuple[str, ...] = ("model.checkpoint=megatron", "data.train=pairs.jsonl")) -> Any:
    """The command of a small training to `out`, with some settings changed."""
    recipe = () if any(change.startswith(("--conf", "--recipe")) for change in changes) else ("--recipe=dpo_tiny",)
    return ("recipes.train", *recipe, *given, "train.output=out", *SMALL, *changes)


def score(*changes: str) -> tuple[str, ...]:
    """The command of a small scoring to `out`, with some settings changed."""
    given = ("model.checkpoint=megatron", "data.train=pairs.jsonl", "scores.path=out", "data.max_length=64")
    return ("recipes.score", "--recipe=dpo_tiny", *given, *changes)


def convert(source: str = "hf") -> tuple[str, ...]:
    """The command of a conversion to `out`."""
    return ("tools.convert_hf_to_megatron", source, "out")


def export(source: str = "megatron") -> tuple[str, ...]:
    """The command of an export to `out`."""
    return ("tools.convert_megatron_to_hf", source, "out")


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    """Changes some fields of a JSON file. A field that becomes `...` is left out."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8")) | changes
        kept = {key: value for key, value in content.items() if value is not ...}
        (folder / name).write_text(json.dumps(kept), encoding="utf-8")

    return edit


def remove(name: str) -> Callable[[Path], None]:
    """Deletes a file."""
    return lambda folder: (folder / name).unlink()


def cut(name: str, share: float) -> Callable[[Path], None]:
    """Keeps only the first part of a file."""

    def make(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return make
