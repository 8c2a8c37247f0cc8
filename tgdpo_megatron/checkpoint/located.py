"""The models of a run by their roles: found, each checked, and converted where they are not yet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tgdpo_megatron.cache import mended_by_deletion
from tgdpo_megatron.checkpoint.certificate import check_certificate
from tgdpo_megatron.checkpoint.manifest import CheckpointManifest, describe, read_manifest
from tgdpo_megatron.checkpoint.sources import Source, check_unconverted, converted, find
from tgdpo_megatron.config import Config, required
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import check_fp8_sizes, check_model_layout
from tgdpo_megatron.model.families import read_description

if TYPE_CHECKING:
    from tgdpo_megatron.platform.processes import Ranks

ROLES = ("checkpoint", "reference", "guidance")
"""The settings of the group model that name a model."""


def find_models(config: Config, commits: Mapping[str, str] | None = None) -> dict[str, Source]:
    """Find every model that the configuration names, and check what can be checked before a conversion.

    Args:
        commits: What a name on a hub without a revision stands for: name -> commit.

    Returns:
        Role -> where the model was found.

    Raises:
        UserError: A model that is missing or cannot be used, or does not fit the layout.
    """
    required(config.model.checkpoint, "model.checkpoint", "the model to start from")
    found = _of_roles(config, commits)
    for source in found.values():
        if source.is_converted:
            read_manifest(source.folder, with_index=False)
        else:
            _check_description(source)
            check_unconverted(source)
    description = describe(found["checkpoint"].folder)
    check_model_layout(description, config.parallel)
    check_fp8_sizes(description, config)
    return found


def _of_roles(config: Config, commits: Mapping[str, str] | None) -> dict[str, Source]:
    given = {role: getattr(config.model, role) for role in ROLES}
    return {role: find(path, commit=(commits or {}).get(str(path))) for role, path in given.items() if path is not None}


def with_folders(config: Config, folders: Mapping[str, Path]) -> Config:
    """The same settings with other folders of models, by their role."""
    return config.model_copy(update={"model": config.model.model_copy(update=dict(folders))})


def _check_description(source: Source) -> None:
    """Refuse a HuggingFace folder whose model cannot be trained, before its weights are looked for."""
    try:
        read_description(source.folder)
    except UserError as error:
        raise source.refusal(str(error)) from None


def convert_models(
    config: Config, commits: Mapping[str, str] | None = None, *, quiet: bool = False
) -> tuple[Config, dict[str, Source]]:
    """Find every model, and convert those that are not yet, each once.

    Args:
        commits: As find_models.
        quiet: Whether to leave out the progress.

    Returns:
        The settings with the folder of a Megatron checkpoint for every model, and where each model was found.

    Raises:
        UserError: As find_models, or what the conversion refuses.
    """
    found = find_models(config, commits)
    folders = {role: converted(source, quiet=quiet) for role, source in found.items()}
    for role, source in found.items():
        if not source.is_converted:
            with mended_by_deletion(folders[role]):
                certified(folders[role], config, with_index=False)
    return with_folders(config, folders), found


def models_on_every_rank(
    config: Config, ranks: Ranks, commits: Mapping[str, str], *, quiet: bool = False
) -> tuple[Config, dict[str, Source]]:
    """As convert_models, done by the first rank. Collective.

    A rank whose machine does not see the first rank's cache uses its own: it finds and converts the models as well.
    """
    from tgdpo_megatron.platform.processes import on_first_rank  # late: it loads torch

    located: Config
    located, found = on_first_rank(ranks, partial(convert_models, config, commits, quiet=quiet))
    if all(getattr(located.model, role).is_dir() for role in found):
        return located, found
    return convert_models(config, commits, quiet=quiet)


@contextlib.contextmanager
def named_as_given(config: Config, found: Mapping[str, Source]) -> Iterator[None]:
    """Let refusals in here name a model as the user did, and not by its folder in the cache.

    Args:
        config: The settings, with the folder of a Megatron checkpoint for every model.
        found: Role -> where the model was found.
    """
    try:
        yield
    except UserError as error:
        sentence = str(error)
        for role, source in found.items():
            sentence = sentence.replace(str(getattr(config.model, role)), str(source))
        raise UserError(sentence) from None


def certified(folder: Path, config: Config, *, with_index: bool) -> CheckpointManifest:
    """The manifest of a checkpoint, whose certificate is valid unless none is required.

    Raises:
        UserError: As read_manifest and check_certificate.
    """
    manifest = read_manifest(folder, with_index=with_index)
    if config.model.require_certificate:
        check_certificate(folder, manifest)
    return manifest
