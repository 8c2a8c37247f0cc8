"""The models of a comparison: found, and checked to be of one tokenizer and one chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgdpo_megatron.checkpoint.sources import Source, check_unconverted, find
from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.errors import UserError


@dataclass(frozen=True)
class Model:
    """A model that is compared.

    Attributes:
        name: What tables call it.
        source: Its HuggingFace folder.
        tokenizer: With the chat template that all models share.
    """

    name: str
    source: Source
    tokenizer: Any

    @property
    def file(self) -> str:
        """The name of its file of answers."""
        return (re.sub(r"[^\w.-]+", "-", self.name).strip("-.") or "model") + ".jsonl"


def find_models(given: Sequence[str], data: DataConfig) -> list[Model]:
    """The models, the start first, each with its tokenizer.

    Args:
        given: Folders, or names on a hub, with another name for the tables before it where there is one: `dpo=FOLDER`.
        data: `template` and `chat_template_kwargs` are those of all models.

    Raises:
        UserError: There are less than two, one cannot be used, two have one name, or their tokenizers or chat
            templates differ.
    """
    from tgdpo_megatron.data.tokenizer import check_template, template_hash, tokenizer_for, tokenizer_hash

    if len(given) < 2:
        raise UserError("a comparison needs the model that was started from and at least one other; give both.")
    named = [
        (name, Path(path)) if equals else (name, Path(name))
        for name, equals, path in (text.partition("=") for text in given)
    ]
    sources = [_source(path) for _, path in named]
    models = [
        Model(name, source, tokenizer_for(source.folder, data))
        for (name, _), source in zip(named, sources, strict=True)
    ]
    start, *others = models
    check_template(start.tokenizer)
    files = {start.file}
    for model in others:
        if model.file in files:
            raise UserError(
                f"{model.name}: another model is called so, too; name one of them, as in NAME={model.name}."
            )
        files.add(model.file)
        if tokenizer_hash(model.tokenizer) != tokenizer_hash(start.tokenizer):
            raise UserError(
                f"{model.name}: has another tokenizer than {start.name}, so their log-probs are not of the same tokens."
            )
        if template_hash(model.tokenizer) != template_hash(start.tokenizer):
            raise UserError(
                f"{model.name}: has another chat template than {start.name}; give both the same one with "
                "data.template=FILE.jinja."
            )
    return models


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
    return source
