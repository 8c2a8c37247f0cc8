"""The folder of a run: whether it can be used, and what is in it.

FOLDER/config.yaml                resolved settings, with the models as they were named
FOLDER/sources.json               where each model was found: its commit on a hub, its Megatron checkpoint
FOLDER/data/                      tokenised pairs
FOLDER/metrics.jsonl, tensorboard/
FOLDER/samples.jsonl, skipped.jsonl, spikes.jsonl  see report/journal.py
FOLDER/lock                       see run_lock.py
FOLDER/wandb.json, mlflow.json    the run's id in Weights & Biases and MLflow, see report/loggers.py
FOLDER/report.html                see report/run_report.py; answers.json is a part of it, where answers were asked for
FOLDER/logs/rank-0.log            all that a rank said, with TGDPO_DEBUG=1
FOLDER/checkpoints/iter-0000030/  see checkpoint/manifest.py
FOLDER/checkpoints/best           a link to one of them, with train.keep_best
FOLDER/hf/iter-0000030/           its export, with train.export_interval
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tgdpo_megatron.bounded import read_json, read_yaml
from tgdpo_megatron.cache import write_json
from tgdpo_megatron.checkpoint.located import ROLES, with_folders
from tgdpo_megatron.checkpoint.manifest import SETTINGS, read_manifest
from tgdpo_megatron.checkpoint.sources import Source
from tgdpo_megatron.config import Config
from tgdpo_megatron.data.hub_splits import at_commit
from tgdpo_megatron.errors import UserError, refusal
from tgdpo_megatron.quiet import debugging
from tgdpo_megatron.run_lock import LOCK, InUseError

REPORT = "report.html"
"""File in the folder of a run."""
ANSWERS = "answers.json"
"""Another: prompt, chosen answer, and the model's answers before and after training."""
CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints."""
DAMAGED = ".damaged"
"""Ends the name of a checkpoint that was found damaged. It is moved out of the way, and never deleted."""
EXPORTS = "hf"
"""Folder of a run's exports to HuggingFace."""


def export_of(checkpoint: Path) -> Path | None:
    """The HuggingFace model that a run made of one of its checkpoints, or None."""
    folder = checkpoint.parent.parent / EXPORTS / checkpoint.name
    return folder if folder.is_dir() else None


def checkpoint_folders(output: Path) -> list[Path]:
    """The folders named like checkpoints of a run, the earliest step first. They may be damaged."""
    return sorted((path for path in output.glob(f"{CHECKPOINTS}/iter-*") if _STEP.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint of a run was saved, by its name."""
    found = _STEP.fullmatch(checkpoint.name)
    assert found is not None, checkpoint
    return int(found[1])


_STEP = re.compile(r"iter-([0-9]{1,18})")


def whole_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, the earliest step first. Their files are not looked at."""
    return [folder for folder in checkpoint_folders(output) if (folder / "manifest.json").is_file()]


def newest_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None. Its files are not looked at."""
    return max(whole_checkpoints(output), key=step_of, default=None)


def is_finished(output: Path) -> bool:
    """Whether a run has done all its steps."""
    newest = newest_checkpoint(output)
    if newest is None or not (output / "config.yaml").is_file():
        return False
    steps = kept_settings(newest).get("train", {}).get("train_iters")
    last = steps if isinstance(steps, int) and steps else math.inf
    return (read_manifest(newest, with_index=False).iteration or 0) >= last


def checkpoint_of(folder: Path) -> Path:
    """The newest checkpoint where a folder is that of a run; else the folder itself.

    Raises:
        UserError: The run has saved none yet.
    """
    if not (folder / "config.yaml").is_file() or (folder / "manifest.json").is_file():
        return folder
    newest = newest_checkpoint(folder)
    if newest is None:
        raise UserError(f"{folder}: this run has saved no checkpoint yet; finish it first.")
    return newest


def with_newest_checkpoints(config: Config) -> Config:
    """Settings in which a model that is given by the folder of a run is given by its newest checkpoint.

    Raises:
        UserError: As checkpoint_of.
    """
    given = {role: getattr(config.model, role) for role in ROLES}
    named = {role: checkpoint_of(folder) for role, folder in given.items() if folder is not None}
    return with_folders(config, named)


def check_output(output: Path, config: Config) -> None:
    """Check that a run's folder can be used.

    Raises:
        UserError: It holds another run, or cannot be written.
    """
    others = ("data", "logs", LOCK)
    used = output.is_dir() and any(
        entry.name not in others and not entry.name.startswith(_PROBE) for entry in output.iterdir()
    )
    if used and not config.train.resume:
        raise UserError(
            f"{output}: already there and not empty; choose another train.output, or continue the run in it with "
            "train.resume=true."
        )
    if used and not checkpoint_folders(output) and not (output / "metrics.jsonl").is_file():
        raise UserError(f"{output}: holds no run that could be continued; choose another train.output.")
    check_writable(output)


def kept_settings(start: Path) -> dict[str, dict[str, Any]]:
    """The settings that a checkpoint of a run was saved with. Earlier versions kept them with the run alone.

    Raises:
        UserError: They cannot be read.
    """
    return read_settings(start / SETTINGS if (start / SETTINGS).is_file() else start.parent.parent / SETTINGS)


def read_settings(path: Path) -> dict[str, dict[str, Any]]:
    """The settings in a config.yaml that a run, or a scoring, has written.

    Raises:
        UserError: They are gone, cannot be read, or were altered to something else.
    """
    saved = read_yaml(path, what="settings file of a run")
    if not isinstance(saved, dict) or not all(isinstance(group, dict) for group in saved.values()):
        raise UserError(f"{path}: the settings of the run were altered; they are no groups of settings any more.")
    return saved


def keep_settings(output: Path, config: Config, found: Mapping[str, Source]) -> str:
    """Write the resolved configuration to config.yaml, and return it as text. Beside it: where the models were found.

    Args:
        config: The settings, with the folders of the checkpoints that the run reads.
        found: Role -> where the model was found, and how the user had named it.
    """
    kept = {
        role: {
            "given": str(source.given),
            "commit": source.commit,
            "checkpoint": str(getattr(config.model, role)),
        }
        for role, source in found.items()
    }
    write_json(output / _SOURCES, kept)
    settings = settings_text(config, found)
    part = output / "config.yaml.tmp"
    part.write_text(settings, encoding="utf-8")
    os.replace(part, output / "config.yaml")
    return settings


def settings_text(config: Config, found: Mapping[str, Source]) -> str:
    """The settings as YAML, with the models as the user named them."""
    text: str = yaml.safe_dump(as_given(config, found).model_dump(mode="json"), sort_keys=False)
    return text


def as_given(config: Config, found: Mapping[str, Source]) -> Config:
    """The same settings, with the models as the user named them."""
    return with_folders(config, {role: source.given for role, source in found.items()})


_SOURCES = "sources.json"


def kept_sources(output: Path) -> dict[str, Source]:
    """Role -> a model of a run or of a folder of scores: how it was named, and the Megatron checkpoint that was read.

    Empty where this was not kept, as in runs of earlier versions, whose settings name the checkpoints themselves.
    """
    try:
        kept = read_json(output / _SOURCES, what="list of models")
        return {
            role: Source(Path(of["given"]), Path(of["checkpoint"]), commit=of["commit"]) for role, of in kept.items()
        }
    except (UserError, KeyError, TypeError, AttributeError):
        return {}


def kept_commits(folder: Path | None) -> dict[str, str]:
    """The commits that names on a hub stood for in a run, or in a scoring, that is continued: name -> commit."""
    kept = kept_sources(folder).values() if folder is not None else []
    return {str(source.given): source.commit for source in kept if source.commit}


_SUMMARY_BYTES = 2**30
"""Largest summary of tokenised pairs that is read. It names every row that was left out."""


def with_kept_data(config: Config, folder: Path | None) -> Config:
    """The same settings, with data sets on a hub at the commits that a run has read that is continued.

    Only what is given without a revision changes. The commits are kept with the run's tokenised pairs.
    """
    if folder is None:
        return config
    commits: dict[str, str] = {}
    for path in sorted(folder.glob("data/*/summary.json"), key=lambda path: path.stat().st_mtime):
        with contextlib.suppress(UserError, KeyError, TypeError, AttributeError):  # they are made again
            summary = read_json(path, what="summary of tokenised pairs", limit=_SUMMARY_BYTES)
            commits |= {part["source"]: part["commit"] for part in (summary, *summary["parts"]) if part["commit"]}
    train = [at_commit(path, commits) for path in config.data.sources]
    kept: dict[str, Any] = {"train": train[0] if isinstance(config.data.train, Path) else train or None}
    if config.data.validation is not None:
        kept["validation"] = at_commit(config.data.validation, commits)
    return config.model_copy(update={"data": config.data.model_copy(update=kept)})


def what_is_kept(output: Path) -> str:
    """How an error says what is left of a run that failed."""
    newest = newest_checkpoint(output)
    return f"the last good checkpoint is {newest}" if newest else "no checkpoint was saved"


@contextlib.contextmanager
def removed_if_refused(folder: Path, *, is_first: bool) -> Iterator[None]:
    """If the block refuses its input, leave no folder behind that was not there before.

    So it is where the operating system refuses something, or memory runs out. A mistake of this program leaves the
    folder: what is in it may show the cause.
    """
    was_there = folder.exists()
    try:
        yield
    except Exception as error:
        if refusal(error) and is_first and not was_there and not isinstance(error, InUseError):
            shutil.rmtree(folder, ignore_errors=True)
        raise


_PROBE = ".writable-"


def check_writable(folder: Path) -> None:
    """Make a folder and try to write into it.

    Raises:
        UserError: It cannot be made or written.
    """
    if folder.is_file():
        raise UserError(f"{folder}: cannot be written (it is a file, not a folder).")
    probe = folder / f"{_PROBE}{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}).") from None


def keep_output(folder: Path, rank: int) -> None:
    """With TGDPO_DEBUG=1: write what this rank says from now on to FOLDER/logs/rank-N.log as well.

    All of it, also what C libraries and crashes write: another process copies both streams, and reads on to their end
    when this one is killed.
    """
    if not debugging():
        return
    path = folder / "logs" / f"rank-{rank}.log"
    path.parent.mkdir(exist_ok=True)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        # In a session of its own: what ends the ranks must not end it before it has copied their last words.
        copier = subprocess.Popen(
            ["tee", "--append", path], stdin=subprocess.PIPE, stdout=stream.fileno(), start_new_session=True
        )
        assert copier.stdin is not None
        os.dup2(copier.stdin.fileno(), stream.fileno())
        copier.stdin.close()
    print(f"rank {rank} is process {os.getpid()} on {socket.gethostname()}; its log is {path}", flush=True)
