"""Damage to the newest checkpoint of a run: it is noticed, and the run goes on from the checkpoint before."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.kills import SAVE_INTERVAL, STEPS, World, differences
from tests.support.forked import RANKS, Job

NEWEST, BEFORE = (f"iter-{STEPS - SAVE_INTERVAL * back:07d}" for back in (1, 2))


@dataclass
class Result:
    """What came of one damage."""

    damage: str
    file: str
    """Where, in the checkpoint."""
    said: str
    """What the program said of it."""
    differences: list[str]
    """What is then not as in the uninterrupted run."""

    @property
    def name(self) -> str:
        return f"{self.file}: {self.damage}"

    @property
    def passed(self) -> bool:
        return not self.differences


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


def run(world: World, whole: Path, seed: int = 0) -> Iterator[Result]:
    """Every damage to every file of the newest checkpoint.

    Args:
        whole: The folder of the uninterrupted run with cached scores.
    """
    chance = random.Random(seed)
    newest = whole / "checkpoints" / NEWEST
    for file in sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file()):
        for damage, apply in DAMAGES.items():
            yield _one(world, whole, damage, file, apply, chance)


def _one(
    world: World,
    whole: Path,
    damage: str,
    file: Path,
    apply: Callable[[Path, random.Random], None],
    chance: random.Random,
) -> Result:
    output = world.folder / "damaged"
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(whole, output)
    for checkpoint in (output / "checkpoints").glob("iter-*"):
        if checkpoint.name not in (NEWEST, BEFORE):
            shutil.rmtree(checkpoint)
    apply(output / "checkpoints" / NEWEST / file, chance)
    log = world.folder / "damaged.log"
    log.unlink(missing_ok=True)
    job = Job("recipes.train", world.command("cached", output), log)
    codes = job.end(patience=120)
    found = [f"ended with {codes}"] if codes != [0] * RANKS else list(differences(whole, output))
    spoken = [line for line in job.said().splitlines() if NEWEST in line]
    if len(spoken) != 1:
        found.append(f"{len(spoken)} lines about {NEWEST}, not one")
    return Result(damage, str(file), re.sub(r"\S*/checkpoints/", "", " ".join(spoken)), found)


def table(results: Sequence[Result]) -> str:
    """One line for each damage."""
    width = max(len(result.name) for result in results)
    lines = []
    for result in results:
        verdict = "caught" if result.passed else f"FAIL ({'; '.join(result.differences)})"
        lines.append(f"{result.name:{width}}  {verdict}: {result.said}")
    return "\n".join(lines)
