"""One configuration from four sources: defaults, recipe, YAML file, `key=value`. Each overrides those before it."""

from __future__ import annotations

import argparse
import difflib
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from recipes import tgdpo, tiny, treg
from tgdpo_megatron.config import Config, complete, load
from tgdpo_megatron.config.yaml_files import read_yaml
from tgdpo_megatron.errors import CommandLine, UserError
from tgdpo_megatron.losses import check_declarations

RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        tiny.sft_tiny,
        tiny.dpo_tiny,
        tiny.tgdpo_tiny,
        tgdpo.dpo_llama3_8b_pairrm,
        tgdpo.tgdpo_llama3_8b_pairrm,
        tgdpo.dpo_llama3_8b_armorm,
        tgdpo.tgdpo_llama3_8b_armorm,
        tgdpo.dpo_llama32_3b,
        tgdpo.tgdpo_llama32_3b,
        treg.dpo_reg_llama3_8b,
        treg.simpo_reg_llama3_8b,
    )
}

DEFAULT = "tgdpo_tiny"


def read_command_line(program: str, description: str, arguments: Sequence[str] | None = None) -> tuple[Config, int]:
    """Parse a program's command line.

    Returns:
        The complete configuration, and how many ranks to start on this machine.

    Raises:
        UserError: An unknown recipe, a file that cannot be read, or a setting that is refused.
    """
    parser = CommandLine(
        prog=f"python -m {program}",
        description=description,
        epilog=_all_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe", help=f"one of {', '.join(RECIPES)}; default: the recipe that the --conf file names, else {DEFAULT}"
    )
    parser.add_argument("--conf", type=Path, help="YAML file that names a recipe and the settings that differ from it")
    parser.add_argument(
        "--nproc-per-node", type=int, default=1, help="number of ranks to start on this machine (default: %(default)s)"
    )
    parser.add_argument("changes", nargs="*", metavar="key=value", help="settings to change, such as loss.beta=0.05")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.nproc_per_node < 1:
        raise UserError(f"--nproc-per-node must be at least 1, not {parsed.nproc_per_node}.")
    check_declarations()
    experiment = {} if parsed.conf is None else _read_experiment(parsed.conf)
    config = _recipe(experiment.pop("recipe", None), parsed.recipe, parsed.conf)
    if parsed.conf is not None:
        config = load(config, experiment, where=str(parsed.conf))
    for change in parsed.changes:
        config = load(config, _nested(change), where="command line")
    return complete(config, where="the settings"), parsed.nproc_per_node


def _all_settings() -> str:
    """All settings with their defaults and meanings, for --help."""
    lines = ["settings:"]
    for group, field in Config.model_fields.items():
        for name, setting in field.annotation.model_fields.items():  # type: ignore[union-attr]
            lines.append(f"  {group}.{name}" + ("" if setting.default is None else f"={setting.default}"))
            for paragraph in (setting.description or "").split("\n\n"):
                words = " ".join(paragraph.split())
                lines += textwrap.wrap(words, 96, initial_indent=6 * " ", subsequent_indent=6 * " ")
    return "\n".join(lines)


def _recipe(named: Any, given: str | None, conf: Path | None) -> Config:
    """The configuration of the recipe that the experiment file or --recipe names.

    Args:
        named: The recipe that the file names; None without a file or a recipe in it.
        given: The recipe that --recipe names; None without it.

    Raises:
        UserError: The file names no recipe and the command line neither, they name different recipes, or there is no
            such recipe.
    """
    if named is not None and given is not None and named != given:
        raise UserError(f"{conf}: its recipe is {named}, but --recipe {given} was given; leave --recipe out.")
    if named is None and given is None and conf is not None:
        raise UserError(f"{conf}: names no recipe; add 'recipe: NAME' as its first key, one of {', '.join(RECIPES)}.")
    name = str(named or given or DEFAULT)
    if name not in RECIPES:
        begun = [known for known in RECIPES if known.startswith(name)]
        close = begun or difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"the recipes are {', '.join(RECIPES)}."
        where = f"{conf}: recipe: {name}" if named is not None else f"--recipe {name}"
        raise UserError(f"{where}: no such recipe; {hint}")
    return RECIPES[name]()


def _read_experiment(path: Path) -> dict[str, Any]:
    content = read_yaml(path, what="configuration file")
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected groups of settings, such as 'loss:' with 'beta: 0.05' below it.")
    return content


def _nested(change: str) -> dict[str, Any]:
    key, equals, text = change.partition("=")
    if not equals:
        raise UserError(f"command line: '{change}' is not of the form key=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    nested: dict[str, Any] = {}
    inner = nested
    *groups, name = key.split(".")
    for group in groups:
        inner = inner.setdefault(group, {})
    inner[name] = value
    return nested
