"""The models that a run is given: Megatron checkpoints, HuggingFace folders, or names on a hub.

A HuggingFace model is converted once, into a folder of the cache that is named by the content of its files. So the same
model is converted once, wherever it lies and whatever it is called. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tgdpo_megatron import hub
from tgdpo_megatron.cache import cache_folder, locked, sha256_of
from tgdpo_megatron.checkpoint import shard_index
from tgdpo_megatron.checkpoint.certificate import check_certificate
from tgdpo_megatron.checkpoint.manifest import FORMAT, companions, hf_folder, is_companion, read_manifest
from tgdpo_megatron.errors import USER_ERROR, UserError
from tgdpo_megatron.platform import programs

Needs = Literal["config", "tokenizer", "model"]
"""What is needed of a model: its shape, its tokenizer as well, or all of it."""
_SPARE = ("generation_config.json", "tokenizer.model", "vocab.json", "merges.txt")
"""Files that change nothing here: tokenizer.json has all of a tokenizer."""


SINGLE = "model.safetensors"
"""The file of weights that are not in shards."""


@dataclass(frozen=True)
class Source:
    """Where a model that was given was found.

    Attributes:
        given: What the user wrote.
        folder: A Megatron checkpoint or a HuggingFace folder.
        commit: The commit on the hub that the name stands for; None for a local folder.
    """

    given: Path
    folder: Path
    commit: str | None = None

    def __str__(self) -> str:
        return f"{self.given} (commit {self.commit})" if self.commit else str(self.given)

    def refusal(self, sentence: str) -> UserError:
        """What is wrong with the folder, said of the model as the user knows it."""
        return UserError(sentence.replace(str(self.folder.absolute()), str(self)).replace(str(self.folder), str(self)))

    @property
    def is_converted(self) -> bool:
        """Whether this is a Megatron checkpoint, or a folder that must be refused as one; not a HuggingFace folder."""
        return (self.folder / "manifest.json").is_file() or not (self.folder / "config.json").is_file()

    @property
    def config_folder(self) -> Path:
        """The folder that holds config.json and the tokenizer."""
        return hf_folder(self.folder)


def _meant(given: Path) -> str:
    """A question for the folder that was meant, where one of nearly the same name is there; otherwise empty."""
    siblings = [path.name for path in given.parent.iterdir()] if given.parent.is_dir() else []
    close = difflib.get_close_matches(given.name, siblings, n=1, cutoff=0.8)
    return f"; did you mean {given.parent / close[0]}?" if close else ""


def find(given: Path, *, needs: Needs = "model", commit: str | None = None) -> Source:
    """Find a model: a folder, else by its name in the cache of the hub, else on the hub itself.

    Args:
        needs: What is enough.
        commit: Where a revision is not given: the commit to take, rather than the newest of the branch main.

    Raises:
        UserError: There is no such model.
    """
    if given.exists():
        return Source(given, given)
    named = hub.model_id(str(given))
    if named is None:
        raise UserError(f"{given}: no such folder{_meant(given)}; a model on a hub is named {hub.FORM}.")
    if _meant(given):  # asked of a hub, the name of a folder would leave this machine
        raise UserError(f"{given}: no such folder{_meant(given)}.")
    if named.revision is None and commit is not None:
        named = hub.at_commit(named, commit)
    folder = hub.cached_snapshot(named)
    if folder is not None and _can_be_used(hub.at_commit(named, folder.name), folder, needs):
        _complete(hub.at_commit(named, folder.name), folder, needs)
    else:
        hub.check_reachable(named)
        hub.tell_of_download(named)
        folder = hub.download(named, ["config.json", shard_index.NAME] if needs == "model" else ["config.json"])
        if (folder / "config.json").is_file():
            at = hub.at_commit(named, folder.name)  # a branch may move meanwhile
            hub.download(at, _wanted(hub.list_files(at), folder, needs))
    if not (folder / "config.json").is_file():
        raise UserError(f"{given}: holds no config.json at commit {folder.name}; it is no model of transformers.")
    return Source(given, folder, commit=folder.name)


def _can_be_used(named: hub.HubId, folder: Path, needs: Needs) -> bool:
    """Whether a folder in the cache has what no model lacks. More than that only a list of its files can tell."""
    if not (folder / "config.json").is_file() or (needs == "model" and missing_file(folder) is not None):
        return False
    has_tokenizer = needs == "config" or (folder / "tokenizer.json").is_file()
    return has_tokenizer or "tokenizer.json" not in (hub.known_files(named) or ["tokenizer.json"])


def _complete(named: hub.HubId, folder: Path, needs: Needs) -> None:
    """Download what the cache lacks of a commit, such as a chat template: other programs download parts of a model.

    A cache whose list of the commit's files is missing is taken as it is where the hub may not or cannot be asked.

    Raises:
        UserError: The cache lacks something that changes what the model reads or says, and the hub does not give it.
    """
    if needs == "config":
        return
    names = hub.known_files(named)
    if names is None:
        if hub.is_offline():
            return
        try:
            hub.check_reachable(named)
            hub.download(named, ["config.json"])  # which is there, so that only the list is fetched
            names = hub.list_files(named)
        except UserError:
            unknown = f"{hub.endpoint()} does not say which files it has"
            print(f"{named.given}: taken from the cache as it is; {unknown}", file=sys.stderr, flush=True)
            return
    missing = [name for name in _wanted(names, folder, needs) if not (folder / name).is_file()]
    if not missing:
        return
    try:
        hub.check_reachable(named)
    except UserError:
        if set(missing) <= set(_SPARE):
            return
        raise
    hub.tell_of_download(named)
    hub.download(named, missing)


def _wanted(names: Sequence[str], folder: Path, needs: Needs) -> list[str]:
    """The files to have, of those of a repository. Never code, and never pickles.

    Args:
        folder: Holds the index of the weights, if there is one.
    """
    if needs == "config":
        return ["config.json"]
    wanted = {name for name in names if is_companion(name)}
    if needs == "model":
        weights = [SINGLE] if SINGLE in names else _weights(folder)
        wanted |= {name for name in weights if name.endswith((".safetensors", ".json"))}
    return sorted(wanted & set(names))


def _weights(folder: Path) -> list[str]:
    """The files of the weights of a HuggingFace folder, and their index, whether or not they are there.

    Raises:
        UserError: The index is damaged.
    """
    if not has_index(folder):
        return [SINGLE]
    return [shard_index.NAME, *sorted(set(shard_index.read_index(folder / shard_index.NAME).values()))]


def has_index(folder: Path) -> bool:
    """Whether the weights of a HuggingFace folder are in several files. One whole file is read first, as transformers
    does."""
    return (folder / shard_index.NAME).is_file() and not (folder / SINGLE).is_file()


def missing_file(folder: Path) -> str | None:
    """The name of a file of weights that a HuggingFace folder lacks; None where all are there.

    Raises:
        UserError: The index of the shards is damaged.
    """
    return next((name for name in _weights(folder) if not (folder / name).is_file()), None)


def check_unconverted(source: Source, *, needs: Needs = "model") -> None:
    """Refuse a HuggingFace folder that lacks something, before its weights are read.

    Raises:
        UserError: What is missing.
    """
    if source.folder.is_file():
        raise UserError(f"{source.given}: is a file; give the folder that it is in, {source.given.parent}.")
    if not (source.folder / "config.json").is_file():
        exported = _exported_in(source.folder)
        meant = f"{exported}, which has one" if exported else "a folder with a HuggingFace model"
        raise UserError(f"{source.given}: no config.json there; give {meant}.")
    try:
        missing = missing_file(source.folder) if needs == "model" else None
    except UserError as error:
        raise source.refusal(str(error)) from None
    if missing is not None:
        raise UserError(
            f"{source.given}: the index of the weights names {missing}, which is not there; download it again."
            if has_index(source.folder)
            else f"{source.given}: no {missing} there; other formats than safetensors are not read, because they would "
            "have to be unpickled."
        )
    if not (source.folder / "tokenizer.json").is_file():
        raise UserError(f"{source.given}: no tokenizer.json there; save the tokenizer beside the model.")


def _exported_in(run: Path) -> Path | None:
    """The HuggingFace model in the folder of a run, the newest where there are several; None where there is none."""
    inside = (run / "hf", *sorted(run.glob("hf/*"), reverse=True))
    return next(
        (one for one in inside if (one / "config.json").is_file() and ((one / SINGLE).is_file() or has_index(one))),
        None,
    )


def content_hash(folder: Path) -> str:
    """SHA-256 of everything that a conversion reads of a HuggingFace folder, and of the format that it writes."""
    weights = [name for name in _weights(folder) if (folder / name).is_file()]
    hashes = [[name, sha256_of(folder / name)] for name in sorted({*companions(folder), *weights})]
    return hashlib.sha256(json.dumps([FORMAT, hashes]).encode()).hexdigest()


def converted(source: Source, *, quiet: bool = False) -> Path:
    """The Megatron checkpoint of a model: itself, or what it was converted to, in the cache; made if need be.

    The conversion keeps dtypes as they are stored.

    Args:
        quiet: Whether to say nothing of the progress.

    Raises:
        UserError: What the conversion refuses.
    """
    if source.is_converted:
        return source.folder
    name = content_hash(source.folder)[:32]
    target = cache_folder() / "checkpoints" / name
    if _is_readable(target):
        return target
    waiting = f"{source.given}: another program is converting it; waiting for {target}"
    with locked(target.with_name(f"{name}.lock"), waiting) as lock:
        if not _is_readable(target):
            if target.exists():  # damaged by hand, by a disk, or by a loss of power
                shutil.rmtree(target)
            if not quiet:
                print(f"{source.given}: converting once, to {target}", file=sys.stderr, flush=True)
            _convert(source, target, lock, quiet=quiet)
    return target


def _is_readable(folder: Path) -> bool:
    """Whether a folder of the cache holds a whole conversion, certificate included."""
    try:
        check_certificate(folder, read_manifest(folder, with_index=False))
    except UserError:
        return False
    return True


_PROCESSES = 1
"""One keeps up with the disk: it takes less time than a copy of the same bytes, and two took more (`make bench`)."""


def _convert(source: Source, target: Path, lock: int, *, quiet: bool) -> None:
    """Run the conversion on the CPU, as a program that holds the lock as well: it may outlive this one.

    Raises:
        UserError: It refused its input, or was ended.
    """
    command = programs.command("tgdpo_megatron.checkpoint", source.folder.absolute(), target, _PROCESSES)
    error = ""
    with subprocess.Popen(
        command,
        env=programs.environment(),
        pass_fds=[lock],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        bufsize=0,
    ) as program:
        assert program.stderr is not None
        try:
            pending = b""
            while block := program.stderr.read(4096):
                *lines, pending = re.split(rb"(?<=[\r\n])", pending + block)
                for line in lines:
                    error = error or _sentence_in(line)
                    if not quiet and not error:
                        sys.stderr.write(line.decode(errors="replace"))
                        sys.stderr.flush()
            error = error or _sentence_in(pending)
            code = program.wait()
        except BaseException:
            program.terminate()
            raise
    if code == USER_ERROR and error:
        raise source.refusal(error)
    if code < 0:
        raise UserError(
            f"{source.given}: the conversion was ended by {signal.Signals(-code).name}; where that is SIGKILL, memory "
            "may have run out."
        )
    if code:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {code}; what it said is above")


def _sentence_in(line: bytes) -> str:
    """The sentence of a program that refuses its input; empty for any other line."""
    return line.decode(errors="replace").strip().removeprefix("error: ") if line.startswith(b"error: ") else ""
