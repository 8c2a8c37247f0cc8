"""Trainings of one set of ranks that save on slow and on full disks, and checkpoints that are damaged afterwards."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recipes.settings import RECIPES
from tgdpo_megatron.config import complete, load
from tgdpo_megatron.errors import LostRankError, StoppedError, UserError
from tgdpo_megatron.platform.processes import Ranks, on_first_rank


def train_on_disks(ranks: Ranks, *, jobs: list[dict[str, Any]]) -> list[str]:
    """Run training jobs one after another; return the sentence each was refused with, or "".

    Beside its settings a job may have `slow`, seconds that every box of a checkpoint takes to be written, `full_after`,
    the number of boxes that the second rank can write, and `killed`, the folder of a run from whose copy it goes on as
    if that had been killed before its newest checkpoint was whole.
    """
    from megatron.core import parallel_state

    from tgdpo_megatron.train import train

    said = []
    for job in jobs:
        settings = dict(job)
        if killed := settings.pop("killed", None):
            on_first_rank(ranks, partial(_kill, Path(killed), Path(settings["train"]["output"])))
        slow, full_after = settings.pop("slow", 0.0), settings.pop("full_after", None)
        try:
            with _disk(slow, full_after if ranks.rank == 1 else None):
                train(complete(load(RECIPES["dpo_tiny"](), settings, where="test"), where="test"), ranks)
            said.append("")
        except (UserError, StoppedError) as end:
            said.append(str(end))
        parallel_state.destroy_model_parallel()
    return said


def _kill(run: Path, copy: Path) -> None:
    shutil.copytree(run, copy)
    newest = max((copy / "checkpoints").glob("iter-*"))
    (newest / "manifest.json").unlink()
    newest.rename(newest.with_name(newest.name + ".tmp"))


@contextlib.contextmanager
def _disk(slow: float, full_after: int | None) -> Iterator[None]:
    """torch.save takes some time, and finds the disk full after some tensors."""
    save, written = torch.save, 0

    def write(tensor: Any, file: Any, **options: Any) -> None:
        nonlocal written
        if isinstance(tensor, torch.Tensor):
            time.sleep(slow)
            if written == full_after:
                raise OSError(errno.ENOSPC, "No space left on device")
            written += 1
        save(tensor, file, **options)

    torch.save = write
    try:
        yield
    finally:
        torch.save = save


def save_slowly(ranks: Ranks, *, folder: str, seconds: float, patience: float) -> list[Any]:
    """Save a small tensor, of which each rank writes a row, and wait for it, while the second rank's disk is slow.

    Args:
        seconds: That the second rank takes.

    Returns:
        The longest time that a rank was in one collective, in seconds, and of each rank the error that it met, or "".
    """
    import torch.distributed as dist

    from tgdpo_megatron.checkpoint.manifest import CheckpointManifest
    from tgdpo_megatron.checkpoint.saving import Save
    from tgdpo_megatron.checkpoint.shards import Shard

    longest = 0.0

    def clocked(collective: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal longest
            began = time.monotonic()
            collective(*arguments, **options)
            longest = max(longest, time.monotonic() - began)

        return run

    names = ("all_reduce", "all_gather_object", "gather_object")
    before = {name: getattr(dist, name) for name in names}
    dist.barrier()
    for name in names:
        setattr(dist, name, clocked(before[name]))
    said = ""
    try:
        with _disk(seconds if ranks.rank == 1 else 0.0, None):
            save = Save(
                Path(folder),
                [Shard("row", (2, 4), (ranks.rank, 0), torch.full((1, 4), float(ranks.rank)))],
                {},
                CheckpointManifest("", "float32", None, None),
                add_files=lambda _: None,
                background=False,
                patience=patience,
                device=ranks.device,
            )
            save.finish()
    except UserError as error:
        said = str(error)
    finally:
        for name in names:
            setattr(dist, name, before[name])
    found: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(found, (longest, said))
    return [max(seconds for seconds, _ in found), [error for _, error in found]]


def fail_at_the_end(ranks: Ranks, *, folder: str) -> list[str]:
    """Save a tensor, and let the rank's main thread fail while another one adds the last files and renames the folder.

    Returns:
        The error, and afterwards what is wrong with the checkpoint, or "" where it is whole.
    """
    from tgdpo_megatron.checkpoint.manifest import CheckpointManifest
    from tgdpo_megatron.checkpoint.saving import Save
    from tgdpo_megatron.checkpoint.shards import Shard
    from tgdpo_megatron.checkpoint.sums import first_damage

    def fail(*_: Any) -> None:
        raise LostRankError("another rank ended")

    def last_files(_: Path) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(1)

    signal.signal(signal.SIGUSR1, fail)
    save = Save(
        Path(folder),
        [Shard("row", (1, 4), (0, 0), torch.ones(1, 4))],
        {},
        CheckpointManifest("", "float32", None, None),
        add_files=last_files,
        background=False,
        patience=60,
        device=ranks.device,
    )
    try:
        save.finish()
        said = ""
    except LostRankError as error:
        said = str(error)
    while save.is_writing:
        time.sleep(0.01)
    return [said, (first_damage(Path(folder)) or "") if Path(folder).exists() else "it is not there"]


def without_moments(ranks: Ranks, *, folder: str) -> list[list[float]]:
    """What is saved of Adam before its first update, where Adam makes its moments only there.

    Returns:
        For each tensor: how many of its elements are saved, how many it has, and the largest of them.
    """
    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.checkpoint.shards import optimizer_shards
    from tgdpo_megatron.checkpoint.state import megatron_layout, sharded_model_state
    from tgdpo_megatron.engine import build_engine
    from tgdpo_megatron.pair_losses import PreferenceLoss
    from tgdpo_megatron.platform.processes import initialize_model_parallel

    config = complete(load(RECIPES["dpo_tiny"](), {"train": {"train_iters": 1}}, where="test"), where="test")
    initialize_model_parallel(config.parallel, seed=1)
    engine = build_engine(config, describe(Path(folder)), loss=PreferenceLoss(config), start=Path(folder), frozen=[])
    (only,) = engine.optimizer.chained_optimizers
    for state in only.optimizer.state.values():
        del state["exp_avg"], state["exp_avg_sq"]
    shards, _ = optimizer_shards(engine.optimizer, sharded_model_state(engine.chunks)["0"], megatron_layout())
    of_keys: dict[str, list[float]] = {}
    for shard in shards:
        if ".exp_avg" in shard.key:
            found = of_keys.setdefault(shard.key, [0, math.prod(shard.shape), 0.0])
            found[0] += shard.data.numel()
            found[2] = max(found[2], float(shard.data.abs().max()))
    return list(of_keys.values())


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path, share: float) -> None:
    content = bytearray(path.read_bytes())
    place = int(share * len(content))
    content[place : place + 4] = bytes(byte ^ 0xFF for byte in content[place : place + 4])
    path.write_bytes(content)


def _keep_lines(path: Path, count: int) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))


def _take_out(path: Path, word: str) -> None:
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if word not in line))


def _change_step(path: Path, step: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"iteration": step}))


OF_A_RANK = "weights/__1_0.distcp"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{
        f"four bytes flipped at {share:.0%} of a rank's file": (
            lambda folder, share=share: _flip(folder / OF_A_RANK, share),
            f"{OF_A_RANK} is not as it was saved",
        )
        for share in (0.1, 0.35, 0.6, 0.85)
    },
    "a rank's file cut": (lambda folder: _cut(folder / OF_A_RANK), f"{OF_A_RANK} is not as it was saved"),
    "a rank's file deleted": (lambda folder: (folder / OF_A_RANK).unlink(), f"{OF_A_RANK} is missing"),
    "the index cut": (lambda folder: _cut(folder / "weights/.metadata"), "weights/.metadata is not as it was saved"),
    "the index deleted": (lambda folder: (folder / "weights/.metadata").unlink(), "weights/.metadata is missing"),
    "common.pt cut": (lambda folder: _cut(folder / "weights/common.pt"), "weights/common.pt is not as it was saved"),
    "a byte of the tokenizer flipped": (
        lambda folder: _flip(folder / "hf/tokenizer.json", 0.5),
        "hf/tokenizer.json is not as it was saved",
    ),
    "the settings deleted": (lambda folder: (folder / "config.yaml").unlink(), "config.yaml is missing"),
    "the manifest empty": (
        lambda folder: (folder / "manifest.json").write_text(""),
        "manifest.json is not as it was saved",
    ),
    "the manifest cut": (lambda folder: _cut(folder / "manifest.json"), "manifest.json is not as it was saved"),
    "the manifest deleted": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "the manifest of a wrong step": (
        lambda folder: _change_step(folder / "manifest.json", 3),
        "manifest.json is not as it was saved",
    ),
    "the manifest of a step that is a word": (
        lambda folder: _change_step(folder / "manifest.json", "four"),
        "manifest.json is not as it was saved",
    ),
    "the manifest of a step below 0": (
        lambda folder: _change_step(folder / "manifest.json", -4),
        "manifest.json is not as it was saved",
    ),
    "the checksums deleted": (lambda folder: (folder / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
    "the checksums cut": (
        lambda folder: (folder / "SHA256SUMS").write_text("0" * 70),
        "SHA256SUMS has the line",
    ),
    "the checksums empty": (lambda folder: (folder / "SHA256SUMS").write_text(""), "SHA256SUMS does not name"),
    "the checksums cut at the end of a line, and what they named deleted": (
        lambda folder: [_keep_lines(folder / "SHA256SUMS", 3), (folder / OF_A_RANK).unlink()],
        "SHA256SUMS does not name",
    ),
    "the line of a rank's file taken out of the checksums": (
        lambda folder: _take_out(folder / "SHA256SUMS", OF_A_RANK),
        f"SHA256SUMS does not name {OF_A_RANK}",
    ),
    "everything deleted": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], "manifest.json is missing"),
    "a copy of it under another step": (
        lambda folder: shutil.copytree(folder, folder.with_name("iter-9999999")),
        "its manifest is of step 4",
    ),
}
"""What happens to the newest checkpoint -> how, and what is said of it. The files are those of two ranks."""


OLD = "no checksums, as earlier versions saved"


def _as_earlier_versions(folder: Path) -> None:
    """Without checksums, and without what the manifest has learnt to say since."""
    (folder / "SHA256SUMS").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("weights_only", "held_out", "sums"):
        del manifest[name]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def damaged(ranks: Ranks, *, run: str, folder: str) -> dict[str, list[Any]]:
    """Damage the newest checkpoint of a run in every way; return where it would go on, what was said, what is there."""
    from tgdpo_megatron.resuming import find_start

    found = {}
    ways = {name: damage for name, (damage, _) in DAMAGES.items()} | {OLD: _as_earlier_versions}
    for number, (name, damage) in enumerate(ways.items()):
        copy = Path(folder) / str(number)
        on_first_rank(ranks, lambda copy=copy, damage=damage: _copied(Path(run), copy, damage))
        with contextlib.redirect_stderr(io.StringIO()) as said:
            start = find_start(copy, ranks)
        there = sorted(path.name for path in (copy / "checkpoints").iterdir())
        found[name] = [start and start.name, said.getvalue(), there]
    return found


def _copied(run: Path, copy: Path, damage: Callable[[Path], Any]) -> None:
    shutil.copytree(run, copy)
    damage(copy / "checkpoints" / "iter-0000004")


def disks_and_damages(ranks: Ranks, *, jobs: list[dict[str, Any]], run: str, folder: str) -> list[Any]:
    """Both of the above, for the price of one start."""
    said = train_on_disks(ranks, jobs=jobs)
    return [said, damaged(ranks, run=run, folder=folder)]
