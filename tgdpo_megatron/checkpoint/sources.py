"""The models that a run is given: Megatron checkpoints, HuggingFace folders, or names on a hub.

A HuggingFace model is converted once, into a folder of the cache that is named by the content of its files. So the same
model is converted once, wherever it lies and whatever it is called. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tgdpo_megatron import hub
from tgdpo_megatron.cache import cache_folder, locked, sha256_of
from tgdpo_megatron.checkpoint.manifest import COMPANIONS, FORMAT, HF
from tgdpo_megatron.config import Config
from tgdpo_megatron.errors import USER_ERROR, UserError

ROLES = ("checkpoint", "reference", "guidance")
"""The settings of the group model that name a model."""

CONFIG = ("config.json",)
TOKENIZER = COMPANIONS
MODEL = (*COMPANIONS, "model*.safetensors", "model.safetensors.index.json")
"""What is downloaded of a model: for its shape, for its tokenizer, or all of it."""


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
        return self.folder / HF if self.is_converted else self.folder


def find(given: Path, *, needs: tuple[str, ...] = MODEL, commit: str | None = None) -> Source:
    """Find a model: a folder, else by its name in the cache of the hub, else on the hub itself.

    Args:
        needs: CONFIG, TOKENIZER or MODEL, whichever is enough.
        commit: Where a revision is not given: the commit to take, rather than the newest of the branch main.

    Raises:
        UserError: There is no such model.
    """
    if given.exists():
        return Source(given, given)
    named = hub.model_id(str(given))
    if named is None:
        raise UserError(f"{given}: no such checkpoint folder, and no name on a hub, which is {hub.FORM}.")
    if named.revision is None and commit is not None:
        named = hub.HubId(named.given, named.kind, named.repo, commit)

    def is_whole(folder: Path) -> bool:
        lacks = (needs == MODEL and missing_file(folder)) or (needs == TOKENIZER and _without_tokenizer(folder))
        return (folder / "config.json").is_file() and not lacks

    folder = hub.snapshot(named, needs, is_whole)
    if not (folder / "config.json").is_file():
        raise UserError(f"{given}: holds no config.json at commit {folder.name}; it is no model of transformers.")
    return Source(given, folder, commit=folder.name)


def missing_file(folder: Path) -> str | None:
    """The name of a file of weights that a HuggingFace folder lacks; None where all are there.

    Raises:
        UserError: The index of the shards is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return None if (folder / "model.safetensors").is_file() else "model.safetensors"
    return next((name for name in _shards(index) if not (folder / name).is_file()), None)


def _shards(index: Path) -> list[str]:
    """The names of the shards that an index lists.

    Raises:
        UserError: It is damaged, or leads out of its folder.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        names = []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{index}: the index of the weight shards is damaged; download it again.")
    return names


def _without_tokenizer(folder: Path) -> bool:
    return not (folder / "tokenizer.json").is_file()


def find_models(config: Config, commits: Mapping[str, str] | None = None) -> dict[str, Source]:
    """Every model that a configuration names, by its role.

    Args:
        commits: What a name on a hub without a revision stands for: name -> commit.

    Raises:
        UserError: One cannot be found.
    """
    given = {role: getattr(config.model, role) for role in ROLES}
    return {role: find(path, commit=(commits or {}).get(str(path))) for role, path in given.items() if path is not None}


def with_folders(config: Config, folders: Mapping[str, Path]) -> Config:
    """The same settings with other folders of models, by their role."""
    return config.model_copy(update={"model": config.model.model_copy(update=dict(folders))})


def content_hash(folder: Path) -> str:
    """SHA-256 of everything that a conversion reads of a HuggingFace folder, and of the format that it writes."""
    index = folder / "model.safetensors.index.json"
    weights = [index.name, *_shards(index)] if index.is_file() else ["model.safetensors"]
    names = sorted(name for name in {*COMPANIONS, *weights} if (folder / name).is_file())
    hashes = [[name, sha256_of(folder / name)] for name in names]
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
    if (target / "manifest.json").is_file():
        return target
    waiting = f"{source.given}: another program is converting it; waiting for {target}"
    with locked(target.with_name(f"{name}.lock"), waiting) as lock:
        if not (target / "manifest.json").is_file():
            if not quiet:
                print(f"{source.given}: converting once, to {target}", file=sys.stderr, flush=True)
            _convert(source, target, lock, quiet=quiet)
    return target


_OF_A_JOB = re.compile("(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME)|MASTER_.*|TORCHELASTIC_.*|TGDPO_LAUNCHED|SLURM_.*")
"""Variables that tell a process of a job its place in it. The conversion is a program of its own."""


def _convert(source: Source, target: Path, lock: int, *, quiet: bool) -> None:
    """Run the conversion on the CPU, as a program that holds the lock as well: it may outlive this one.

    Raises:
        UserError: It refused its input, or was ended.
    """
    command = [sys.executable, "-m", "tools.convert_hf_to_megatron", str(source.folder.absolute()), str(target)]
    environment = {name: value for name, value in os.environ.items() if not _OF_A_JOB.fullmatch(name)}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    error = ""
    with subprocess.Popen(
        command, env=environment, pass_fds=[lock], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0
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
