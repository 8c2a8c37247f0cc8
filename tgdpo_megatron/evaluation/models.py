"""The models of a comparison: found, and checked before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tgdpo_megatron.bounded import read_json, shown
from tgdpo_megatron.checkpoint.sources import Source, check_unconverted, content_hash, find
from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.errors import UserError


@dataclass(frozen=True)
class Model:
    """A model that is compared.

    Attributes:
        name: What tables call it.
        source: Its HuggingFace folder.
        tokenizer: With the chat template that it is asked with.
    """

    name: str
    source: Source
    tokenizer: Any

    @property
    def file(self) -> str:
        """The name of its file of answers."""
        return (re.sub(r"[^\w.-]+", "-", self.name).strip("-.") or "model") + ".jsonl"

    @cached_property
    def fingerprint(self) -> str:
        """As the lines of a file of its answers have it."""
        return content_hash(self.source.folder)


_LANGUAGE_MODELS = ("ForCausalLM", "ForConditionalGeneration", "LMHead")
"""What transformers' names of models that answer have in them."""


def find_models(given: Sequence[str], data: DataConfig, *, of_same_tokens: bool) -> list[Model]:
    """The models, the start first, each with its tokenizer.

    Args:
        given: Folders, or names on a hub, with another name for the tables before it where there is one: `dpo=FOLDER`.
        data: `template` and `chat_template_kwargs` are those of all models.
        of_same_tokens: Whether all have to read the same tokens, as of pairs.

    Raises:
        UserError: There are less than two, one cannot be used or is no language model, two have one name, or their
            tokens differ and must not.
    """
    from tgdpo_megatron.data.tokenizer import check_template, tokenizer_for

    if len(given) < 2:
        raise UserError("a comparison needs the model that was started from and at least one other; give both.")
    named = [_named(text) for text in given]
    sources = [_source(path) for _, path in named]
    models = [
        Model(name, source, tokenizer_for(source.folder, data))
        for (name, _), source in zip(named, sources, strict=True)
    ]
    for model in models:
        try:
            check_template(model.tokenizer)
        except UserError as error:
            raise UserError(f"{model.name}: {error}") from error
    start, *others = models
    files = {start.file}
    for model in others:
        if model.file in files:
            raise UserError(
                f"{model.name}: another model is called so, too; name one of them, as in NAME={model.name}."
            )
        files.add(model.file)
        if of_same_tokens and (difference := other_tokens(model, start)):
            raise UserError(f"{model.name}: {difference}.")
    return models


def other_tokens(model: Model, start: Model) -> str | None:
    """Why two models do not read the same tokens of the same texts, as the end of a sentence; None where they do."""
    from tgdpo_megatron.data.tokenizer import template_hash, tokenizer_hash

    if tokenizer_hash(model.tokenizer) != tokenizer_hash(start.tokenizer):
        return f"has another tokenizer than {start.name}, so their log-probs are not of the same tokens"
    if template_hash(model.tokenizer) != template_hash(start.tokenizer):
        return f"has another chat template than {start.name}; give both the same one with data.template=FILE.jinja"
    return None


def _named(given: str) -> tuple[str, Path]:
    """What tables call a model, and its folder or its name on a hub. The path of a folder may hold an `=` itself."""
    name, equals, path = given.partition("=")
    return (name, Path(path)) if equals and not Path(given).exists() else (given, Path(given))


def _source(given: Path) -> Source:
    """A HuggingFace model.

    Raises:
        UserError: It is none, or lacks something.
    """
    source = find(given)
    if (source.folder / "manifest.json").is_file():
        raise UserError(
            f"{given}: is a Megatron checkpoint; export it first (python -m tools.convert_megatron_to_hf {given} "
            "FOLDER), and compare the folder."
        )
    check_unconverted(source)
    config = read_json(source.folder / "config.json", what="configuration of a model")
    names = config.get("architectures") if isinstance(config, dict) else None
    if isinstance(names, list) and names and not any(kind in str(names[0]) for kind in _LANGUAGE_MODELS):
        raise UserError(
            f"{given}: holds {shown(names[0])}, which is no language model; give the models that answer, and a reward "
            "model with --scorer."
        )
    return source
