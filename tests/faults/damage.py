"""Damage to the newest checkpoint of a run: it is noticed, and the run goes on from the checkpoint before."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.kills import SAVE_INTERVAL, STEPS, World, differences
from tests.faults.rows import Row
from tests.support.forked import RANKS, Job

NEWEST, BEFORE = (f"iter-{STEPS - SAVE_INTERVAL * back:07d}" for back in (0, 1))


def _flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _cut(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def _overwrite(path: Path, chance: random.Random) -> None:
    path.write_bytes(chance.randbytes(path.stat().st_size))


def _delete(path: Path, _: random.Random) -> None:
    path.unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "one bit flipped": _flip,
    "cut": _cut,
    "other bytes": _overwrite,
    "deleted": _delete,
}


def damage(world: World, whole: Path, only: int | None = None, seed: int = 0) -> Iterator[Row]:
    """Every damage to every file of the newest checkpoint; one to those parts of the weights that are like the first.

    Args:
        whole: The folder of the uninterrupted run with cached scores.
        only: How many of them, drawn by chance; None for all.
    """
    chance = random.Random(seed)
    newest = whole / "checkpoints" / NEWEST
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    like_the_first = re.compile(r"__[1-9]\d*_0\.distcp")
    cases = [
        (file, name)
        for file in files
        for name in (["one bit flipped"] if like_the_first.fullmatch(file.name) else DAMAGES)
    ]
    for file, name in cases if only is None else chance.sample(cases, only):
        yield _one(world, whole, file, name, chance)


def _one(world: World, whole: Path, file: Path, name: str, chance: random.Random) -> Row:
    output, log, began = world.folder / "damaged", world.folder / "damaged.log", time.monotonic()
    shutil.rmtree(output, ignore_errors=True)
    log.unlink(missing_ok=True)
    shutil.copytree(whole, output)
    for checkpoint in (output / "checkpoints").glob("iter-*"):
        if checkpoint.name not in (NEWEST, BEFORE):
            shutil.rmtree(checkpoint)
    DAMAGES[name](output / "checkpoints" / NEWEST / file, chance)
    job = Job("recipes.train", world.command("cached", output), log)
    codes = job.end(patience=120)
    wrong = list(differences(whole, output)) if codes == [0] * RANKS else [f"ended with {codes}"]
    spoken = [line for line in job.said().splitlines() if line.startswith("warning: ") and NEWEST in line]
    if len(spoken) != 1:
        wrong.append(f"{len(spoken)} lines about the damage")
    said = re.sub(r"\S*/checkpoints/", "", " ".join(spoken))
    subject = "damage to the newest of two checkpoints"
    return Row(subject, f"{file}: {name}", not wrong, said, time.monotonic() - began, "; ".join(wrong))
