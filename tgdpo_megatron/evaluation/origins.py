"""Whether files of answers are those of the models that they are given for, and made in the same way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tgdpo_megatron.errors import UserError
from tgdpo_megatron.evaluation.models import Model
from tgdpo_megatron.sampling.answers import Answered


def check_origins(
    models: Sequence[Model], answers: Mapping[str, Sequence[Answered]], files: Mapping[str, Path]
) -> list[str]:
    """Refuse answers of another model than the one that they are given for.

    Args:
        models: The start first.
        answers, files: By the names of the models; empty where there are none.

    Returns:
        Sentences on what no file tells, and on settings in which the files differ.

    Raises:
        UserError: A file has answers of another model.
    """
    if not files:
        return []
    notes = []
    for model in models:
        written_by = {line.model.get("fingerprint"): line.model.get("name") for line in answers[model.name]}
        told = [(fingerprint, name) for fingerprint, name in written_by.items() if fingerprint is not None]
        others = [name for fingerprint, name in told if fingerprint != model.fingerprint]
        if others:
            raise UserError(
                f"{files[model.name]}: has answers of {others[0]}, whose files are not those of {model.name} now; give "
                "one file for each model, in the order of the models, or sample the answers again."
            )
        if None in written_by:
            notes.append(
                f"{files[model.name]} does not tell whose answers it has, as a server answered: that they are those of "
                f"{model.name} is not checked."
            )
    return notes + _other_settings(answers)


def _other_settings(answers: Mapping[str, Sequence[Answered]]) -> list[str]:
    """A sentence for each model whose answers were sampled in another way than the start's."""
    (start, first), *others = ((name, _settings(some)) for name, some in answers.items())
    notes = []
    for name, settings in others:
        names = [key for key in {**first, **settings} if first.get(key) != settings.get(key)]
        if names:
            notes.append(f"The answers of {name} were sampled with another {', '.join(names)} than those of {start}.")
    return notes


def _settings(answers: Sequence[Answered]) -> dict[str, set[str]]:
    """Every setting of the sampling, with all values that it has in a file."""
    found: dict[str, set[str]] = {}
    for answered in answers:
        for name, value in answered.sampling.items():
            found.setdefault(name, set()).add(json.dumps(value))
    return found
