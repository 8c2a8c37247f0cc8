"""What lies in the folder of a run, or of token scores: its settings, its tokenised pairs, its metrics."""

from __future__ import annotations

import json
from pathlib import Path

from tgdpo_megatron.checkpoint.located import with_folders
from tgdpo_megatron.checkpoint.sources import converted, find
from tgdpo_megatron.config import Config, load
from tgdpo_megatron.data.prepare import PreparedPairs, load_prepared
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.run_folder import kept_sources, read_settings


def settings_of(folder: Path) -> Config:
    """The settings that a run or a folder of scores was made with, with the checkpoints that it read.

    A model that is gone from the cache is found and converted again.

    Raises:
        UserError: The folder is neither, or a model is gone.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: neither a run nor a folder of scores (it has no config.yaml).")
    config = load(Config(), read_settings(path), where=str(path))
    folders = {
        role: source.folder if source.folder.is_dir() else converted(find(source.given, commit=source.commit))
        for role, source in kept_sources(folder).items()
        if source.given == getattr(config.model, role)  # else config.yaml was edited since
    }
    return with_folders(config, folders)


def pairs_of(folder: Path, config: Config, part: str) -> PreparedPairs:
    """The tokenised pairs of a run or of a folder of scores.

    Args:
        part: `train` or `validation`.

    Raises:
        UserError: It was made without such pairs, or they are gone.
    """
    if made := sorted((folder / "data").glob(f"{part}-*"), key=lambda path: path.stat().st_mtime):
        return load_prepared(made[-1])
    given = config.data.train if part == "train" else config.data.validation
    if not isinstance(given, Path):
        raise UserError(f"{folder}: was made without data.{part}, so there are no such pairs to show.")
    return load_prepared(given)


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl. A last line that a killed run left incomplete is dropped.

    Raises:
        UserError: There is no such file, or a line is something else.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; this is the folder of no run that has begun.")
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            found.append(dict(json.loads(line).items()))
        except (ValueError, RecursionError, AttributeError):
            raise UserError(f"{path} line {number}: these are no metrics of a step; delete the line.") from None
    return found
