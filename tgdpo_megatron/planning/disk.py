"""How much disk a training takes: its checkpoints at their largest number, and its exports."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tgdpo_megatron import run_folder
from tgdpo_megatron.config import Config
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families import parameters


@dataclass(frozen=True)
class DiskNeed:
    """What a training writes, in bytes.

    Attributes:
        checkpoint: One checkpoint.
        checkpoints: How many there are at most at one time, the one that is being written included.
        at_a_stop: What the last checkpoint of a run that is stopped takes more than the others, without
            train.save_optimizer.
        export: One export.
        exports: How many there are in the end.
    """

    checkpoint: int
    checkpoints: int
    at_a_stop: int
    export: int
    exports: int

    def sentence(self) -> str:
        """The same in words."""
        said = f"{_gigabytes(self.checkpoint)} for each of at most {self.checkpoints} checkpoints at a time"
        if self.at_a_stop:
            said += f", {_gigabytes(self.at_a_stop)} more for the optimizer's state where the run is stopped"
        return said + (f", and {_gigabytes(self.export)} for each of {self.exports} exports" if self.exports else "")


def disk_need(config: Config, description: ModelDescription) -> DiskNeed:
    """What a training writes.

    A number of steps that is not known yet counts as enough for every checkpoint that may be kept.
    """
    train = config.train
    weight = 4 if train.precision == "fp32" else 2
    moments = 8 if weight == 4 and not config.optimizer.use_distributed_optimizer else 12  # with a copy of the weights
    state = parameters(description) * moments
    each = parameters(description) * weight + (state if train.save_optimizer else 0)
    steps = train.train_iters
    at_once = train.keep_last + 1 + (train.keep_best is not None)
    if steps is not None:
        every = [interval for interval in (train.save_interval, train.export_interval) if interval]
        planned = len({step for interval in every for step in range(interval, steps + 1, interval)} | {steps})
        saved = steps if train.save_minutes and train.keep_last else planned
        at_once = min(at_once, saved) if train.keep_last else saved
    exports = (
        len({*range(train.export_interval, (steps or 0) + 1, train.export_interval), steps})
        if (train.export_interval and steps)
        else 0
    )
    at_a_stop = 0 if train.save_optimizer else state
    return DiskNeed(each, at_once, at_a_stop, parameters(description) * weight, exports)


def check_disk(output: Path, config: Config, description: ModelDescription) -> None:
    """Refuse a training whose checkpoints and exports will not find room. What it has written before counts.

    Raises:
        UserError: A file system has less space left than the run will take there.
    """
    need = disk_need(config, description)
    wanted: dict[int, int] = {}
    places: dict[int, Path] = {}
    checkpoints = need.checkpoint * need.checkpoints + need.at_a_stop
    for name, total in (("checkpoints", checkpoints), ("hf", need.export * need.exports)):
        place = _existing(output / name)
        device = place.stat().st_dev
        places.setdefault(device, place)
        more = max(0, total - _bytes_below(output / name))
        if name == "checkpoints":
            more = max(more, need.checkpoint)  # what is not kept any more is removed after the next one is whole
        wanted[device] = wanted.get(device, 0) + more
    for device, more in wanted.items():
        free = shutil.disk_usage(places[device]).free
        if free < more:
            raise UserError(
                f"{output}: the run will write {_gigabytes(more)} more ({need.sentence()}), but only "
                f"{_gigabytes(free)} are free there; make room, choose another train.output, or lower train.keep_last "
                f"(now {config.train.keep_last})."
            )


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above that is there."""
    while not path.exists():
        path = path.parent
    return path


def _bytes_below(folder: Path) -> int:
    """What the run has written there. Checkpoints that were found damaged do not count: they never make room."""
    places = (Path(where) for where, _, _ in os.walk(folder) if run_folder.DAMAGED not in where)
    files = (path for place in places for path in place.iterdir() if not path.is_dir() or path.is_symlink())
    return sum(path.lstat().st_size for path in files)


def _gigabytes(amount: int) -> str:
    return f"{amount / 1e9:,.1f} GB" if amount >= 1e8 else f"{amount / 1e6:,.1f} MB"
