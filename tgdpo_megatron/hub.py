"""Models and data sets by their name on a HuggingFace hub: found in the local cache, or downloaded into it.

Only files that the caller names are downloaded, never code and never pickles. huggingface_hub's own variables hold:
HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. What the cache holds is taken as it is, so a branch that has moved on
the hub is not looked for again.
"""

from __future__ import annotations

import contextlib
import glob
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tgdpo_megatron.errors import UserError, in_short

FORM = "ORGANISATION/NAME or ORGANISATION/NAME@REVISION"
SECONDS_TO_ANSWER = 10
"""Seconds in which a hub must answer the first question; huggingface_hub alone would wait as long as the network."""

_NAME = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[^\s@:]+))?", re.ASCII)


@dataclass(frozen=True)
class HubId:
    """A repository on a hub.

    Attributes:
        given: What the user wrote, for error messages.
        revision: Branch, tag or commit; None for the branch main.
    """

    given: str
    kind: Literal["model", "dataset"]
    repo: str
    revision: str | None = None

    @property
    def noun(self) -> str:
        """What the repository holds, in words."""
        return "model" if self.kind == "model" else "data set"


def model_id(given: str) -> HubId | None:
    """The repository that a text of the form FORM names; None for a text of another form."""
    found = _ID.fullmatch(given)
    return HubId(given, "model", found["repo"], found["revision"]) if found else None


def tell_of_download(named: HubId) -> None:
    """Say that files are downloaded; on stderr, since stdout may be a program's result."""
    print(f"{named.given}: downloading from {endpoint()}", file=sys.stderr, flush=True)


def download(named: HubId, names: Sequence[str]) -> Path:
    """Download files of a repository into the cache. Returns the folder of the commit there; its name is the commit.

    The cache also keeps the list of all files of the commit: see known_files.

    Args:
        names: The files to download. What the repository does not have is left out.

    Raises:
        UserError: The hub refuses them, or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    with explained(named):
        folder = snapshot_download(
            named.repo,
            repo_type=named.kind,
            revision=named.revision,
            allow_patterns=[glob.escape(name) for name in names],
            tqdm_class=_progress(),
        )
    return Path(folder)


def cached_snapshot(named: HubId) -> Path | None:
    """The folder of a repository's files in the local cache, whole or not; None where the cache has none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # Of the files, those that are needed are looked for by the caller.
        return Path(
            snapshot_download(
                named.repo, repo_type=named.kind, revision=named.revision, local_files_only=True, allow_patterns=[]
            )
        )
    except HFValidationError as error:
        raise UserError(f"{named.given}: no such file or folder, and no name on a hub ({in_short(error)}).") from None
    except LocalEntryNotFoundError:
        return None


def at_commit(named: HubId, commit: str) -> HubId:
    """The same repository at a commit of it."""
    return replace(named, revision=commit)


def known_files(named: HubId) -> list[str] | None:
    """The names of all files of a commit, as a download of this machine has listed them; None where none has."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return [file.path for file in get_cached_repo_tree(named.repo, repo_type=named.kind, revision=named.revision)]
    except CachedRepoTreeNotFoundError:
        return None


def check_reachable(named: HubId) -> None:
    """Ask the hub whether it has a repository.

    Raises:
        UserError: Nothing is to be downloaded here, the hub does not answer, or it has no such repository or revision.
    """
    from huggingface_hub import HfApi

    if is_offline():
        raise UserError(
            f"{_looked_for(named)}, and HF_HUB_OFFLINE=1 forbids asking {endpoint()}; set HF_HUB_OFFLINE=0, or fill "
            "the cache where there is a network."
        )
    with explained(named):
        HfApi().repo_info(named.repo, repo_type=named.kind, revision=named.revision, timeout=SECONDS_TO_ANSWER)


def list_files(named: HubId) -> list[str]:
    """The names of all files of a commit, as known_files knows them, or else as the hub does.

    Raises:
        UserError: The hub refuses it, or cannot be reached.
    """
    from huggingface_hub import HfApi

    known = known_files(named)
    if known is not None:
        return known
    with explained(named):
        return HfApi().list_repo_files(named.repo, repo_type=named.kind, revision=named.revision)


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE=1 forbids asking the hub."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def endpoint() -> str:
    """The address of the hub."""
    from huggingface_hub import constants

    return constants.ENDPOINT


@contextlib.contextmanager
def explained(named: HubId) -> Iterator[None]:
    """Turn what huggingface_hub raises in the block into a sentence about a repository.

    Raises:
        UserError: The hub refused it, or could not be reached.
    """
    try:
        yield
    except Exception as error:
        if said := _sentence(named, error):
            raise UserError(said) from error
        raise


def _sentence(named: HubId, error: Exception) -> str | None:
    """What is said of an error of huggingface_hub; None where it is none of a hub's or of a network's."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = f"{_looked_for(named)}, and {endpoint()}"
    page = f"{endpoint()}/{'datasets/' if named.kind == 'dataset' else ''}{named.repo}"
    if isinstance(error, GatedRepoError):
        return (
            f"{named.given}: the {named.noun} is gated; accept its terms at {page}, and set HF_TOKEN to a token of the "
            "account that has accepted them."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{named.given}: {page} has no revision '{named.revision}'; give a branch, a tag or a commit of it."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{asked} has no {named.noun} of that name, or a private one; mend the name, or set HF_TOKEN to a token "
            "that may read it."
        )
    if isinstance(error, HfHubHTTPError):
        return f"{asked} refuses to give it ({in_short(error)})."
    if isinstance(error, LocalEntryNotFoundError) or type(error).__module__.startswith(_OF_THE_NETWORK):
        return (
            f"{asked} cannot be reached ({in_short(error.__cause__ or error)}); fill the cache where there is a "
            "network, or set HF_ENDPOINT to a hub that can be reached."
        )
    return None


_OF_THE_NETWORK = ("httpx", "httpcore", "requests", "urllib3")
"""How modules begin whose errors are a network's; huggingface_hub has used one after the other."""


def _looked_for(named: HubId) -> str:
    """What was looked for on this machine, and where."""
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE) / f"{named.kind}s--{named.repo.replace('/', '--')}"
    what = "all that is needed" + (f" of revision {named.revision}" if named.revision else "")
    begun = f"{named.given}: no such file or folder"
    return f"{begun}, {place} does not hold {what}" if place.is_dir() else f"{begun}, no {place} in the hub's cache"


def _progress() -> type[Any]:
    """A progress bar of the bytes of a download. huggingface_hub's own are silenced with all that libraries say."""
    from tqdm import tqdm

    class Bytes(tqdm):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            # Of the bars that huggingface_hub makes, the one that counts what is written to the disk.
            hidden = not str(options.get("desc")).startswith("Reconstructing") or not sys.stderr.isatty()
            options |= {"desc": "downloading", "bar_format": None, "disable": hidden}
            options.pop("name", None)
            super().__init__(*arguments, **options)

        def set_description(self, *_: Any, **__: Any) -> None:
            """Keep the description."""

    return Bytes
