"""A checkpoint on its way to the disk: written in a folder beside its own, by every rank, and current at one instant.

FOLDER.tmp/   while it is written; what a killed program leaves of it is removed by the next save
FOLDER/       once every file is whole, on the disk, and named in SHA256SUMS

A thread of each rank writes. With `background`, a rank copies its part into the host's memory first and goes on
training. Otherwise it asks the others again and again whether all have written: one collective that waits for the
slowest disk could take too long for a collective. A thread ends with its rank, whatever ends that. Megatron's own
asynchronous saves fork a process of each rank: with a CUDA context and the threads of a communication library in it,
and with a server for its results that outlives a rank that is killed.
"""

from __future__ import annotations

import copy
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tgdpo_megatron.checkpoint.failures import NotWrittenError, writable
from tgdpo_megatron.checkpoint.manifest import WEIGHTS, CheckpointManifest, write_manifest
from tgdpo_megatron.checkpoint.shards import Shard
from tgdpo_megatron.checkpoint.sums import SummedFile, write_sums
from tgdpo_megatron.checkpoint.torch_dist import StoredBox, write_index_of_boxes
from tgdpo_megatron.checkpoint.work import wait_for_disk
from tgdpo_megatron.errors import LostRankError, UserError

UNFINISHED = ".tmp"
"""Ends the name of a folder that is being written, or removed."""
_PAUSE = 0.02
"""Seconds between two questions whether all ranks have written their files."""


class StillWritingError(UserError):
    """A rank's write does not get on. Its files cannot be touched, nor those beside them."""


class Save:
    """A save under way. Made on every rank. Collective.

    Args:
        folder: The checkpoint to make.
        shards: What this rank writes.
        common: What is no tensor. The first rank's is written.
        add_files: Adds the other files to the folder that is worked in. Called on the first rank.
        background: Whether to copy the shards and write the copies while this rank goes on. Otherwise nothing may
            change them until `finish` returns.
        patience: Seconds that a rank may take without writing anything.
        device: Where the ranks' collectives have their tensors.

    Raises:
        NotWrittenError: On every rank, if the operating system refuses the first rank the folder.
    """

    def __init__(
        self,
        folder: Path,
        shards: list[Shard],
        common: dict[str, Any],
        manifest: CheckpointManifest,
        *,
        add_files: Callable[[Path], None],
        background: bool,
        patience: float,
        device: torch.device,
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self._add_files, self._patience, self._device = add_files, patience, device
        self._common = copy.deepcopy(common)  # it is written last, and the optimizer counts its steps in place
        self._work = folder.with_name(folder.name + UNFINISHED)
        self._written: list[StoredBox] = []
        self._sums: dict[str, str] = {}
        self._failure: BaseException | None = self._begin() if dist.get_rank() == 0 else None
        self._agree()
        # Without a background, each shard is copied when its turn has come, and takes no memory for longer.
        todo = _emptied(deque([shard.copied() for shard in shards])) if background else _copies(shards)
        self._begin_thread(partial(self._write, todo))

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes. Local."""
        return self._thread.is_alive()

    def any_rank_writes(self) -> bool:
        """Whether a rank still writes. Collective.

        Raises:
            StillWritingError: On every rank, if one of them has written nothing for too long.
        """
        waited = torch.zeros(dist.get_world_size(), device=self._device)
        if self.is_writing:
            waited[dist.get_rank()] = 1 + time.monotonic() - self._moved  # 0 is for a rank that has written all
        dist.all_reduce(waited)
        seconds = [found - 1 for found in waited.tolist()]
        longest = max(seconds)
        if longest > self._patience:
            raise StillWritingError(
                f"{self.folder}: rank {seconds.index(longest)} has written nothing of this checkpoint for "
                f"{longest:.0f} s, and is not done; look at the disk there, and go on with train.resume=true from the "
                "checkpoint before, if there is one."
            )
        return longest >= 0

    def finish(self) -> CheckpointManifest:
        """Wait for every rank's files, and make the checkpoint current. Collective.

        Raises:
            NotWrittenError: On every rank, if the operating system refused one of them a file. Nothing is left then.
            StillWritingError: As any_rank_writes.
        """
        try:
            self._wait()
            self._agree()
            ranks = dist.get_world_size()
            parts: list[Any] | None = [None] * ranks if dist.get_rank() == 0 else None
            dist.gather_object((self._written, self._sums), parts)
            if parts is not None:
                self._begin_thread(partial(self._complete, parts))
            self._wait()
            self._agree()
        except StillWritingError:
            raise
        except BaseException:
            # A rank that lost another one comes here while its own thread may be about to rename the folder. That is
            # then left alone: whole, or for the next start to remove.
            if dist.get_rank() == 0 and not self.is_writing:
                shutil.rmtree(self._work, ignore_errors=True)
            raise
        return self.manifest

    def _begin_thread(self, work: Callable[[], None]) -> None:
        self._moved = time.monotonic()
        """When this rank last got on."""
        self._thread = threading.Thread(target=work, name="save", daemon=True)
        self._thread.start()

    def _gets_on(self) -> None:
        self._moved = time.monotonic()

    def _wait(self) -> None:
        while self.any_rank_writes():
            time.sleep(_PAUSE)

    def _begin(self) -> BaseException | None:
        try:
            with writable(f"{self.folder}: the checkpoint"):
                shutil.rmtree(self._work, ignore_errors=True)
                (self._work / WEIGHTS).mkdir(parents=True)
        except BaseException as error:  # the other ranks wait to hear of it
            return error
        return None

    def _write(self, shards: Iterable[Shard]) -> None:
        """Write this rank's file, and wait for the disk. A failure is kept for `finish`."""
        name = f"__{dist.get_rank()}_0.distcp"
        try:
            with writable(f"{self.folder}: the checkpoint"), (self._work / WEIGHTS / name).open("wb") as file:
                summed = SummedFile(file, self._gets_on)
                for shard in shards:
                    first = summed.tell()
                    torch.save(shard.data, summed)  # type: ignore[arg-type]
                    sizes, length = tuple(shard.data.shape), summed.tell() - first
                    self._written.append(
                        StoredBox(shard.key, shard.shape, shard.offset, sizes, shard.data.dtype, name, first, length)
                    )
                summed.wait_for_disk()
                self._sums[f"{WEIGHTS}/{name}"] = summed.hash.hexdigest()
        except BaseException as error:
            self._failure = error

    def _complete(self, parts: list[tuple[list[StoredBox], dict[str, str]]]) -> None:
        """On the first rank: add what one writes for all, and rename the folder. A failure is kept for `finish`."""
        try:
            with writable(f"{self.folder}: the checkpoint"):
                write_index_of_boxes(self._work / WEIGHTS, [box for boxes, _ in parts for box in boxes], self._common)
                self._add_files(self._work)
                write_manifest(self._work, self.manifest)
                known = {name: found for _, sums in parts for name, found in sums.items()}
                write_sums(self._work, known)
                for path in (*self._work.rglob("*"), self._work):
                    if str(path.relative_to(self._work)) not in known:  # their writers have waited already
                        wait_for_disk(path)
                        self._gets_on()
                self._work.rename(self.folder)
                wait_for_disk(self.folder.parent)
        except BaseException as error:
            self._failure = error

    def _agree(self) -> None:
        """Raise on every rank where one of them failed. Collective."""
        sentence = None if self._failure is None else str(self._failure) if isinstance(self._failure, UserError) else ""
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, sentence)
        if self._failure is not None:
            raise self._failure
        for sentence in filter(None, said):
            raise NotWrittenError(sentence)
        if "" in said:
            raise LostRankError("another rank could not write its part of a checkpoint; this one stops too.")


def _copies(shards: list[Shard]) -> Iterator[Shard]:
    return (shard.copied() for shard in shards)


def _emptied(shards: deque[Shard]) -> Iterator[Shard]:
    """Each shard in turn. Its memory is free once the next one is asked for."""
    while shards:
        yield shards.popleft()
