"""Read a YAML file of settings or of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tgdpo_megatron.errors import UserError


def read_yaml(path: Path, *, what: str) -> Any:
    """What a YAML file holds.

    Args:
        what: What kind of file it is, for the sentence of a refusal.

    Raises:
        UserError: No such file, or it is not UTF-8 text or not YAML.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such {what}.")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{path}{f' line {mark.line + 1}' if mark else ''}: not valid YAML.") from None
