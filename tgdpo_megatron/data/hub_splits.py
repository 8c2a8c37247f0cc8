"""One split of a data set on a hub, as files of rows: `ORGANISATION/NAME[@REVISION][:[CONFIG/]SPLIT]`.

Which files make up a split is the rule of the `datasets` library: the data set's README says it, or else the names of
files and folders. That library only chooses the files. They are read as any others, and no code of the data set runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgdpo_megatron import hub
from tgdpo_megatron.bounded import read_json
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


def at_commit(given: Path, commits: Mapping[str, str]) -> Path:
    """A split at the commit that its name stood for; any other source, and a split with a revision, as it is.

    Args:
        commits: Name of a split, with or without a revision -> commit.
    """
    known = {name: commit for split, commit in commits.items() if (name := _without_revision(Path(split)))}
    name = None if given.exists() else _without_revision(given)
    wanted = hub_split(given) if name in known else None
    if wanted is None or wanted.named.revision is not None:
        return given
    return Path(str(given).replace(wanted.named.repo, f"{wanted.named.repo}@{known[str(name)]}", 1))


def _without_revision(given: Path) -> str | None:
    """The name of a split without its revision; None for another source."""
    wanted = hub_split(given)
    return json.dumps([wanted.named.repo, wanted.config, wanted.split]) if wanted else None


def find_split(wanted: HubSplit) -> Found:
    """The files of a split, found in the cache of the hub or downloaded into it. Other splits are not downloaded.

    The cache may hold some of a split's files only. So what is there counts as the split where a list of the data set's
    files says so, which a download leaves in the cache, or where the files number themselves.

    Raises:
        UserError: There is no such data set, configuration or split, one must be chosen, or it cannot be downloaded.
    """
    cached = hub.cached_snapshot(wanted.named)
    if cached is not None and (names := _listed(wanted, cached)):
        return _found(cached, names)
    try:
        hub.check_reachable(wanted.named)
    except UserError:
        if cached is not None and (names := _numbered(wanted, cached)):
            return _found(cached, names)
        raise
    hub.tell_of_download(wanted.named)
    card = _card(wanted.named, cached)
    commit = hub.at_commit(wanted.named, card.name)  # the branch may move meanwhile
    names = _choose(wanted, card, hub.list_files(commit))
    folder = hub.download(commit, names)
    _keep(wanted, folder.name, names)
    return _found(folder, names)


def _found(folder: Path, names: list[str]) -> Found:
    return Found([folder / name for name in names], folder.name)


def _card(named: hub.HubId, cached: Path | None) -> Path:
    """Download the README. Returns the folder of the commit: that of the cache, as long as the hub has it."""
    if cached is not None:
        with contextlib.suppress(UserError):
            return hub.download(hub.at_commit(named, cached.name), [_CARD])
    return hub.download(named, [_CARD])


def _listed(wanted: HubSplit, folder: Path) -> list[str] | None:
    """The files of a split by the list of the commit's files; None where the cache lacks one of them, or the list.

    Raises:
        UserError: The hub may not be asked, and the data set has no such split.
    """
    names = _remembered(wanted, folder.name)
    if not names:
        listed = hub.known_files(hub.at_commit(wanted.named, folder.name))
        if listed is None or (_CARD in listed and not (folder / _CARD).is_file()):
            return None
        try:
            names = _choose(wanted, folder, listed)
        except UserError:  # where the hub may be asked, it is asked once more
            if hub.is_offline():
                raise
            return None
        _keep(wanted, folder.name, names)
    return names if all((folder / name).is_file() for name in names) else None


def _numbered(wanted: HubSplit, folder: Path) -> list[str] | None:
    """The files of a split that the cache holds, where their names show that none is missing."""
    try:
        names = _choose(wanted, folder, [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()])
    except UserError:
        return None
    return names if _are_all(names) else None


_NUMBERED = re.compile(r"(?P<begin>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\..*)")


def _are_all(names: list[str]) -> bool:
    """Whether files number themselves, as in train-00000-of-00003.parquet, and none of the numbers is missing."""
    numbers: dict[tuple[str, ...], set[int]] = {}
    for name in names:
        found = _NUMBERED.fullmatch(name)
        if found is None:
            return False
        numbers.setdefault(found.group("begin", "count", "end"), set()).add(int(found["number"]))
    return all(found == set(range(int(count))) for (_, count, _), found in numbers.items())


def _record(wanted: HubSplit, commit: str) -> Path:
    """The file of the cache that remembers which files make up a split of a commit, which never changes."""
    text = json.dumps([wanted.named.repo, commit, wanted.config, wanted.split])
    return cache_folder() / "datasets" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _remembered(wanted: HubSplit, commit: str) -> list[str]:
    try:
        names = read_json(_record(wanted, commit), what="record of a split")["files"]
    except (UserError, KeyError, TypeError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _keep(wanted: HubSplit, commit: str, names: list[str]) -> None:
    record = _record(wanted, commit)
    if not record.is_file():
        write_json(record, {"given": wanted.named.given, "commit": commit, "files": names})


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
