"""One split of a data set on a hub, as files of rows: `ORGANISATION/NAME[@REVISION][:[CONFIG/]SPLIT]`.

Which files make up a split is the rule of the `datasets` library: the data set's README says it, or else the names of
files and folders. That library only chooses the files. They are read as any others, and no code of the data set runs.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tgdpo_megatron import hub
from tgdpo_megatron.cache import cache_folder, write_json
from tgdpo_megatron.errors import UserError, in_short

FORM = "ORGANISATION/NAME[@REVISION][:[CONFIG/]SPLIT]"
_CARD = "README.md"
_SPLIT = re.compile(r"(?P<id>[^:]+)(?::(?:(?P<config>[\w.-]+)/)?(?P<split>[\w.]+))?", re.ASCII)
_ROWS = re.compile(r".*\.(json|jsonl|csv|tsv)(\.gz|\.zst)?|.*\.parquet")
"""Files that this program reads rows from."""


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set; None for a configuration or a split that was not given."""

    named: hub.HubId
    config: str | None
    split: str | None


@dataclass(frozen=True)
class Found:
    """The files of a split, in order, and the commit of the data set that they are from."""

    files: list[Path]
    commit: str


def hub_split(given: Path) -> HubSplit | None:
    """The split that a text of the form FORM names; None where it is another text, or the path of a file of rows."""
    parts = _SPLIT.fullmatch(str(given))
    model = hub.model_id(parts["id"]) if parts else None
    if parts is None or model is None or _ROWS.fullmatch(str(given)):
        return None
    return HubSplit(hub.HubId(str(given), "dataset", model.repo, model.revision), parts["config"], parts["split"])


def find_split(wanted: HubSplit) -> Found:
    """The files of a split, found in the cache of the hub or downloaded into it. Other splits are not downloaded.

    Raises:
        UserError: There is no such data set, configuration or split, one must be chosen, or it cannot be downloaded.
    """
    cached = hub.cached_snapshot(wanted.named)
    if cached is not None:
        try:
            names = _remembered(wanted, cached.name) or _choose(wanted, cached, _known_files(wanted, cached))
        except UserError:
            if hub.is_offline():
                raise
        else:
            if all((cached / name).is_file() for name in names):
                return _keep(wanted, cached, names)
    hub.check_reachable(wanted.named)
    hub.tell_of_download(wanted.named)
    card = hub.download(wanted.named, [_CARD])
    commit = replace(wanted.named, revision=card.name)  # the branch may move meanwhile
    names = _choose(wanted, card, hub.list_files(commit))
    return _keep(wanted, hub.download(commit, [glob.escape(name) for name in names]), names)


def _record(wanted: HubSplit, commit: str) -> Path:
    """The file of the cache that remembers which files make up a split of a commit, which never changes."""
    text = json.dumps([wanted.named.repo, commit, wanted.config, wanted.split])
    return cache_folder() / "datasets" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _remembered(wanted: HubSplit, commit: str) -> list[str]:
    try:
        names = json.loads(_record(wanted, commit).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _keep(wanted: HubSplit, folder: Path, names: list[str]) -> Found:
    record = _record(wanted, folder.name)
    if not record.is_file():
        write_json(record, {"given": wanted.named.given, "commit": folder.name, "files": names})
    return Found([folder / name for name in names], folder.name)


def _known_files(wanted: HubSplit, folder: Path) -> list[str]:
    """The files of a commit as far as the cache knows them: the hub's list where it was kept, else what is there."""
    there = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:  # an earlier huggingface_hub keeps no list
        return there
    try:
        return [
            file.path for file in get_cached_repo_tree(wanted.named.repo, repo_type="dataset", revision=folder.name)
        ]
    except CachedRepoTreeNotFoundError:
        return there


def _choose(wanted: HubSplit, folder: Path, listed: Iterable[str]) -> list[str]:
    """The files of the split, among those of the data set.

    Args:
        folder: Holds the README, if there is one.
        listed: The names of all files.

    Raises:
        UserError: There is no such configuration or split, or one must be chosen.
    """
    return _of_split(wanted, _splits(wanted, folder, [name for name in listed if _ROWS.fullmatch(name)]))


def _splits(wanted: HubSplit, folder: Path, names: list[str]) -> dict[str, list[str]]:
    """Split -> its files, by the rules of `datasets`, which looks at the names of empty files here.

    Raises:
        UserError: As _choose.
    """
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from datasets import get_dataset_config_names, load_dataset_builder

    given = wanted.named.given
    if not names:
        raise UserError(f"{given}: the data set holds no .parquet, .json, .jsonl or .csv file; convert it first.")
    with tempfile.TemporaryDirectory() as made:
        root = Path(made).resolve() / "data"
        for name in names:
            place = root / name
            if not place.resolve().is_relative_to(root):
                raise UserError(f"{given}: the data set names a file outside of itself ({name}).")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        if (folder / _CARD).is_file():
            _check_card(folder / _CARD, given)
            shutil.copyfile(folder / _CARD, root / _CARD)
        configs: list[str] = []
        try:
            configs = get_dataset_config_names(str(root))
            builder: Any = load_dataset_builder(str(root), name=wanted.config, cache_dir=str(Path(made) / "cache"))
            found = builder.config.data_files or {}
            return {
                str(split): [str(Path(file).resolve().relative_to(root)) for file in files]
                for split, files in found.items()
            }
        except Exception as error:  # only the library's code is in here: what it cannot read is the data set's fault
            if wanted.config is not None and configs and wanted.config not in configs:
                raise UserError(
                    f"{given}: no configuration '{wanted.config}'; there are {', '.join(configs)}."
                ) from None
            if wanted.config is None and len(configs) > 1:
                choice = f"such as {wanted.named.repo}:{configs[0]}/{wanted.split or 'train'}"
                raise UserError(f"{given}: has the configurations {', '.join(configs)}; give one, {choice}.") from None
            raise UserError(f"{given}: datasets does not find its splits ({in_short(error)}).") from error


def _check_card(card: Path, given: str) -> None:
    """Refuse a README that has `datasets` look for files elsewhere, on this machine or another."""
    from huggingface_hub import metadata_load

    try:
        configs = (metadata_load(card) or {}).get("configs")
    except Exception as error:  # whatever a parser of YAML says
        raise UserError(f"{given}: the head of its README cannot be read ({in_short(error)}).") from error
    if any(sign in json.dumps(configs, default=str) for sign in ("://", "::")):
        raise UserError(f"{given}: its README names files that are not the data set's own; download them yourself.")


def _of_split(wanted: HubSplit, splits: dict[str, list[str]]) -> list[str]:
    """The files of the split that is wanted: the only one where none was given.

    Raises:
        UserError: There is no such split, or one must be chosen.
    """
    given = wanted.named.given
    if wanted.split in splits:
        return splits[wanted.split]
    if wanted.split is not None:
        raise UserError(f"{given}: no split '{wanted.split}'; there are {', '.join(splits)}.")
    if len(splits) == 1:
        return next(iter(splits.values()))
    revision = f"@{wanted.named.revision}" if wanted.named.revision else ""
    example = f"{wanted.named.repo}{revision}:{wanted.config + '/' if wanted.config else ''}{next(iter(splits))}"
    raise UserError(f"{given}: holds the splits {', '.join(splits)}; give one of them, such as {example}.")
