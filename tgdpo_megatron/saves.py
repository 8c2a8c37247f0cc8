"""The checkpoints of a training that is under way: when one is saved, when it is current, which ones are kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from tgdpo_megatron import run_folder
from tgdpo_megatron.checkpoint.failures import NotWrittenError
from tgdpo_megatron.checkpoint.manifest import CheckpointManifest, read_manifest
from tgdpo_megatron.checkpoint.saving import UNFINISHED, Save
from tgdpo_megatron.checkpoint.state import begin_save
from tgdpo_megatron.config import Config
from tgdpo_megatron.engine import Engine
from tgdpo_megatron.errors import NonFiniteError, UserError
from tgdpo_megatron.platform import life

BEST = "best"
"""A link beside the checkpoints, to the one that train.keep_best keeps."""


@dataclass(frozen=True)
class Content:
    """What a run's checkpoints have in common, beside what is trained.

    Attributes:
        identity: The manifest, without fingerprints of weights and iteration.
        companions: Checkpoint folder whose hf/ files describe the model.
        template: Text of the chat template that takes the place of the tokenizer's own; None to keep that.
        settings: Text of config.yaml.
    """

    identity: CheckpointManifest
    companions: Path
    template: str | None
    settings: str


class Saves:
    """Saves checkpoints on the way. Every method that is not said to be local is collective."""

    def __init__(self, output: Path, config: Config, engine: Engine, content: Content) -> None:
        self.output, self.config, self.engine, self.content = output, config, engine, content
        self._saved_at = time.monotonic()
        self._under_way: Save | None = None
        self._removal: threading.Thread | None = None
        self.longest = 0.0
        """Seconds that a save has taken at most on this rank, from its beginning until it was current."""
        self._began = 0.0

    def due(self, done: int, *, stop: bool) -> bool:
        """Whether a checkpoint is saved after `done` steps, whatever the clock says. Local, and equal on all ranks."""
        train = self.config.train
        return stop or done == train.train_iters or any(is_due(done, every) for every in _intervals(self.config))

    @property
    def overdue(self) -> bool:
        """Whether train.save_minutes have passed on this rank. Local."""
        return 0 < self.config.train.save_minutes * 60 <= time.monotonic() - self._saved_at

    def save(self, done: int, held_out: Mapping[str, float], *, wait: bool, stop: bool) -> Path:
        """Save a checkpoint after `done` steps. It is current once `settle` or `finish` has found it whole.

        Args:
            held_out: Metrics of the held-out pairs after this step, which begin with `eval/`; empty without.
            wait: Whether to wait until it is current.
            stop: Whether the run ends here before its last step. Its checkpoint then holds the optimizer's state
                whatever train.save_optimizer says, since the run must be able to go on.

        Returns:
            The checkpoint's folder.

        Raises:
            NonFiniteError: A weight is not finite.
            NotWrittenError: The operating system refuses a file of this checkpoint, or of the one before.
            StillWritingError: As `settle`.
        """
        self.finish()
        wait = wait or not self.config.train.async_save
        train, content = self.config.train, self.content
        folder = self.output / run_folder.CHECKPOINTS / f"iter-{done:07d}"
        self._began = time.monotonic()
        self.engine.gather_weights()
        with self._says_what_is_kept():
            self._under_way = begin_save(
                folder,
                self.engine.chunks,
                self.engine.optimizer,
                self.engine.scheduler,
                companions=content.companions,
                template=content.template,
                settings=content.settings,
                manifest=replace(
                    content.identity,
                    iteration=done,
                    held_out=dict(held_out) or None,
                    weights_only=not train.save_optimizer and not stop,
                ),
                background=not wait,
                patience=60 * train.rank_timeout_minutes,
            )
        self._saved_at = time.monotonic()
        if wait:
            self.finish()
        return folder

    def settle(self) -> None:
        """Make the checkpoint that is under way current, if every rank's files are written.

        Raises:
            NotWrittenError: The operating system refused one of the files.
            StillWritingError: A rank has written nothing for train.rank_timeout_minutes, and is not done.
        """
        if self._under_way is not None and not self._under_way.any_rank_writes():
            self._complete()

    def finish(self) -> None:
        """Wait for the checkpoint that is under way, if there is one, and make it current.

        Raises:
            NotWrittenError: The operating system refused one of its files.
            StillWritingError: As `settle`.
        """
        if self._under_way is not None:
            self._complete()
        if self._removal is not None:
            with life.during("waiting until old checkpoints are removed"):
                # The next save needs their room. A removal that does not end is left to itself.
                self._removal.join(60 * self.config.train.rank_timeout_minutes)
            self._removal = None

    def what_is_kept(self) -> str:
        """How an error that every rank raises says what is left of the run. A save under way is finished first."""
        self.finish()
        return run_folder.what_is_kept(self.output)

    def _complete(self) -> None:
        save, self._under_way = self._under_way, None
        assert save is not None
        with life.during(f"waiting for {save.folder.name} to be written"), self._says_what_is_kept():
            save.finish()
        self.longest = max(self.longest, time.monotonic() - self._began)
        if dist.get_rank() == 0:
            self._tidy()

    @contextlib.contextmanager
    def _says_what_is_kept(self) -> Iterator[None]:
        try:
            yield
        except (NotWrittenError, NonFiniteError) as error:
            said = str(error).removesuffix(".")
            raise type(error)(f"{said}; {run_folder.what_is_kept(self.output)}.") from error

    def _tidy(self) -> None:
        """Point at the best checkpoint, and remove those that are not kept any more, without waiting. First rank."""
        found = run_folder.whole_checkpoints(self.output)
        train = self.config.train
        best = best_checkpoint(found, train.keep_best)
        _link(self.output, best)
        unwanted = [folder for folder in found if folder not in kept(found, train.keep_last, best)]
        for folder in unwanted:
            with contextlib.suppress(OSError):  # at once none of the run's checkpoints any more
                folder.rename(folder.with_name(folder.name + UNFINISHED))
        self._removal = threading.Thread(target=_remove, args=(unwanted,), name="removal", daemon=True)
        self._removal.start()


def is_due(done: int, interval: int) -> bool:
    """Whether something is due after `done` steps: every `interval` steps, or never with 0."""
    return interval > 0 and done % interval == 0


def kept(found: Sequence[Path], keep_last: int, best: Path | None) -> list[Path]:
    """The checkpoints that stay.

    Args:
        found: All, the oldest first.
        keep_last: How many of the newest stay; 0 for all.
        best: Another one that stays.
    """
    newest = found[-keep_last:] if keep_last else found
    return [folder for folder in found if folder in newest or folder == best]


def best_checkpoint(found: Sequence[Path], metric: str | None) -> Path | None:
    """The checkpoint with the best value of a metric of the held-out pairs; the earliest of several. None without one.

    Args:
        found: Checkpoints, the oldest first.
        metric: One of those that train.keep_best takes.
    """
    values: dict[Path, float] = {}
    for folder in found if metric is not None else []:
        with contextlib.suppress(UserError):  # a damaged one is not the best
            held_out = read_manifest(folder, with_index=False).held_out or {}
            if metric in held_out:
                values[folder] = held_out[metric] * (-1 if metric == "eval/loss" else 1)
    return max(values, key=lambda folder: values[folder], default=None)


def _intervals(config: Config) -> tuple[int, int]:
    return config.train.save_interval, config.train.export_interval


def _link(output: Path, best: Path | None) -> None:
    """Let checkpoints/best lead to a checkpoint, where the file system has links; to none where there is no best."""
    link = output / run_folder.CHECKPOINTS / BEST
    part = link.with_name(BEST + UNFINISHED)
    with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)
        if best is None:
            link.unlink(missing_ok=True)
            return
        part.symlink_to(best.name)
        os.replace(part, link)


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder.with_name(folder.name + UNFINISHED), ignore_errors=True)
