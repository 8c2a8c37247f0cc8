"""One configuration from four sources: defaults, recipe, YAML file, `key=value`. Each overrides those before it."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from recipes import large, tgdpo, tiny, treg
from tgdpo_megatron.bounded import parse_yaml, read_yaml
from tgdpo_megatron.commands import ROOT, as_called
from tgdpo_megatron.config import (
    ALTERNATIVES,
    COMMAND_LINE,
    Config,
    LossConfig,
    OptimizerConfig,
    ReportConfig,
    complete,
    explain_option,
    load,
)
from tgdpo_megatron.errors import CommandLine, UserError
from tgdpo_megatron.losses import LOSSES, check_declarations
from tgdpo_megatron.platform.nodes import Nodes, nodes_of
from tgdpo_megatron.report.terminal import Loudness
from tgdpo_megatron.run_folder import with_newest_checkpoints

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
        tgdpo.dpo_gemma2_2b,
        tgdpo.tgdpo_gemma2_2b,
        treg.dpo_reg_llama3_8b,
        treg.simpo_reg_llama3_8b,
        treg.simpo_reg_gemma2_9b,
        large.dpo_llama3_70b_4x8,
        large.tgdpo_llama3_70b_4x8,
        large.dpo_llama3_70b_8x8,
        large.tgdpo_llama3_70b_8x8,
        large.dpo_qwen25_72b_4x8,
        large.tgdpo_qwen25_72b_4x8,
        large.dpo_qwen25_72b_8x8,
        large.tgdpo_qwen25_72b_8x8,
    )
}

DEFAULT = "tgdpo_tiny"

UNREAD = {
    "recipes.score": {
        "loss": set(LossConfig.model_fields) - {"type", "token_rewards"},
        "scores": {"source", "reward_file", "validation_reward_file"},
        "data": {"shuffle", "weights"},
        "optimizer": set(OptimizerConfig.model_fields),
        "train": {
            *("output", "num_epochs", "train_iters", "global_batch_size", "fixed_micro_batches", "fp8", "fp8_recipe"),
            *("recompute", "log_interval", "eval_interval", "save_interval", "save_minutes", "report", "resume"),
            *("exit_after_minutes", "max_skipped_steps", "loss_spike_deviations"),
            *("keep_last", "keep_best", "async_save", "save_optimizer", "export_interval", "resume_with_changes"),
        },
        "report": set(ReportConfig.model_fields),
    }
}
"""Program -> group -> settings that change nothing there. They are accepted, since both programs take one experiment
file, and left out of --help."""


STARTS_NO_LAUNCHERS = {"recipes.align", "recipes.convert", "tools.plan", "tools.submit"}
"""Programs that are started once, on one node, and take no place among several."""


@dataclass(frozen=True)
class Command:
    """A program's command line.

    Attributes:
        config: The complete configuration.
        processes: How many ranks to start on this node.
        nodes: This node's place among those of the job.
        recipe: Name of the recipe.
        conf: The experiment file; None without one.
        experiment: The settings in it, by group.
        changes: The arguments of the form key=value.
        loudness: How much the program says.
    """

    config: Config
    processes: int
    nodes: Nodes
    recipe: str
    conf: Path | None
    experiment: dict[str, Any]
    changes: list[str]
    loudness: Loudness

    @property
    def ranks(self) -> int:
        """Number of ranks on all nodes of the job."""
        return (self.config.cluster.nodes or self.nodes.count) * self.processes

    def check_machines(self) -> None:
        """Check that the job has the nodes that the settings ask for.

        Raises:
            UserError: It has another number of them, or GPUs that no rank would use.
        """
        cluster, nodes = self.config.cluster, self.nodes.count
        if cluster.nodes not in (None, nodes):
            raise UserError(
                f"cluster.nodes={cluster.nodes}, but this job is started on {nodes}; queue it with tools.submit, which "
                f"asks for as many, or set cluster.nodes={nodes}."
            )
        given = os.environ.get("SLURM_GPUS_ON_NODE", "")
        if cluster.gpus_per_node == self.processes and given.isdigit() and int(given) > self.processes:
            raise UserError(
                f"cluster.gpus_per_node={self.processes}, but Slurm gave this job {given} of each node, some of "
                f"them for nothing; submit with --gpus-per-node={self.processes}, or set cluster.gpus_per_node={given}."
            )


def read_command_line(program: str, description: str, arguments: Sequence[str] | None = None) -> Command:
    """Parse a program's command line. With --help, print what there is to set, and exit.

    Raises:
        UserError: An unknown recipe, a file that cannot be read, or a setting that is refused.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = CommandLine(
        prog=f"python -m {program}",
        usage=argparse.SUPPRESS,  # the description has it
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    options = parser.add_argument_group("arguments")
    options.add_argument("changes", nargs="*", metavar="key=value", help="settings to change, such as loss.beta=0.05")
    options.add_argument(
        "--recipe", metavar="NAME", help=f"default: the recipe that the --conf file names, else {DEFAULT}"
    )
    options.add_argument(
        "--conf",
        type=Path,
        metavar="FILE",
        help="YAML file that names a recipe and the settings that differ from it",
    )
    options.add_argument(
        "--nproc-per-node",
        type=int,
        metavar="N",
        help="number of ranks to start on this node (default: cluster.gpus_per_node, else 1)",
    )
    if program not in STARTS_NO_LAUNCHERS:
        several = parser.add_argument_group("several nodes, on each of which the same command is given with its number")
        several.add_argument("--nnodes", type=int, metavar="N", help="number of nodes (default: 1)")
        several.add_argument("--node-rank", type=int, metavar="I", help="number of this node, 0 to N-1")
        several.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="node 0, and a port that is free there")
        several.add_argument("--rdzv-id", metavar="ID", help="name of the job, the same on all nodes")
    parser.set_defaults(nnodes=1, node_rank=None, rdzv_endpoint=None, rdzv_id=None)
    loudness = options.add_mutually_exclusive_group()
    loudness.add_argument("--quiet", action="store_true", help="say nothing but warnings and the result")
    loudness.add_argument("--verbose", action="store_true", help="show every setting and every line of metrics")
    options.add_argument(
        "-h", "--help", action="store_true", help="show this, with the values that the other arguments give"
    )
    _refuse_foreign_options(arguments)
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.nproc_per_node is not None and parsed.nproc_per_node < 1:
        raise UserError(f"--nproc-per-node must be at least 1, not {parsed.nproc_per_node}.")
    nodes = nodes_of(parsed.nnodes, parsed.node_rank, parsed.rdzv_endpoint, parsed.rdzv_id)
    check_declarations()
    experiment = {} if parsed.conf is None else _read_experiment(parsed.conf)
    recipe = _recipe(experiment.pop("recipe", None), parsed.recipe, parsed.conf)
    config = RECIPES[recipe]()
    if parsed.conf is not None:
        config = load(config, experiment, where=str(parsed.conf))
    config = with_newest_checkpoints(complete(changed(config, parsed.changes), where="the settings"))
    if parsed.help:
        print(as_called("\n".join([parser.format_help(), *_recipes(), "", *_settings(program, config)])))
        sys.exit()
    said = Loudness.QUIET if parsed.quiet else Loudness.VERBOSE if parsed.verbose else Loudness.NORMAL
    processes = parsed.nproc_per_node or config.cluster.gpus_per_node or 1
    return Command(config, processes, nodes, recipe, parsed.conf, experiment, parsed.changes, said)


def changed(config: Config, changes: Sequence[str]) -> Config:
    """A configuration with changes of the form key=value applied, in their order.

    Raises:
        UserError: A change of another form, or one that load refuses.
    """
    names = {change.partition("=")[0] for change in changes}
    for group, one, other in ALTERNATIVES:
        if {f"{group}.{one}", f"{group}.{other}"} <= names:
            raise UserError(
                f"{COMMAND_LINE}: {group}.{one} and {group}.{other} say the same in two ways; give one of them."
            )
    for change in changes:
        config = load(config, _nested(change, config), where=COMMAND_LINE)
    return config


_OPTIONS = (
    *("--recipe", "--conf", "--quiet", "--verbose", "--help"),
    *("--nproc-per-node", "--nnodes", "--node-rank", "--rdzv-endpoint", "--rdzv-id"),
)


def _refuse_foreign_options(arguments: Sequence[str]) -> None:
    """Refuse an option such as `--learning_rate 1e-6`, which is a setting here."""
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if not option.startswith("--") or option in _OPTIONS:
            continue
        following = arguments[place + 1 : place + 2]
        if not equals and following and not following[0].startswith("--"):
            value = following[0]
        if said := explain_option(option, value):
            raise UserError(f"{COMMAND_LINE}: {said}.")


def _recipes() -> Iterator[str]:
    """Every recipe in a line, for --help."""
    yield "recipes:"
    width = max(map(len, RECIPES))
    for name, recipe in RECIPES.items():
        yield f"  {name:<{width}}  {(recipe.__doc__ or '').splitlines()[0]}"


def _settings(program: str, config: Config) -> Iterator[str]:
    """The settings that a program reads, each with its value and meaning, for --help."""
    unread = UNREAD.get(program, {})
    yield "settings, with the values that this command gives them:"
    if unread:
        yield "(What only training reads is taken as well, so that one experiment file is enough, and listed by"
        yield "python -m recipes.train --help.)"
    for group in Config.model_fields:
        settings: Any = getattr(config, group)
        read = [name for name in type(settings).model_fields if name not in unread.get(group, ())]
        if read:
            yield from ("", *textwrap.wrap(f"{group}: {(type(settings).__doc__ or '').splitlines()[0]}", 100))
        for name in read:
            field = type(settings).model_fields[name]
            yield f"  {group}.{name}{_value(config, group, name)}{_choices(field)}"
            for paragraph in (field.description or "").split("\n\n"):
                words = " ".join(paragraph.split())
                yield from textwrap.wrap(words, 100, initial_indent=6 * " ", subsequent_indent=6 * " ")


def _value(config: Config, group: str, name: str) -> str:
    value = getattr(getattr(config, group), name)
    if value is not None:
        return f"={str(value).lower() if isinstance(value, bool) else value}"
    of_losses = {option for loss in LOSSES.values() for option in loss.options}
    if group == "loss" and name in of_losses and name not in config.loss.method.options:
        return f"  (not read by {config.loss.type})"
    return "  (not set)"


def _choices(field: Any) -> str:
    """The values that a setting can have, where they are few and its description does not name them all."""
    for kind in (field.annotation, *get_args(field.annotation)):
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        if len(choices) in range(1, 6) and not all(f"`{choice}`" in field.description for choice in choices):
            return f"  ({', '.join(map(str, choices))})"
    return ""


def _recipe(named: Any, given: str | None, conf: Path | None) -> str:
    """The name of the recipe that the experiment file or --recipe names.

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
        raise UserError(f"{conf}: names no recipe; add 'recipe: NAME' as its first key (--help lists the recipes).")
    name = str(named or given or DEFAULT)
    if name not in RECIPES:
        begun = [known for known in RECIPES if known.startswith(name)]
        close = begun or difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "--help lists the recipes."
        where = f"{conf}: recipe: {name}" if named is not None else f"--recipe {name}"
        raise UserError(f"{where}: no such recipe; {hint}")
    return name


def _read_experiment(path: Path) -> dict[str, Any]:
    ours = ROOT / path  # conf/NAME.yaml, from whichever folder
    content = read_yaml(ours if ours.is_file() and not path.exists() else path, what="configuration file")
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected groups of settings, such as 'loss:' with 'beta: 0.05' below it.")
    return content


def _nested(change: str, config: Config) -> dict[str, Any]:
    """A change as groups of settings. `data.columns.prompt=ask` changes one entry of a setting that has several."""
    key, equals, text = change.partition("=")
    if not equals:
        raise UserError(f"{COMMAND_LINE}: '{change}' is not of the form key=value.")
    try:
        value = parse_yaml(text, where=f"{COMMAND_LINE}: {key}")
    except yaml.YAMLError:
        value = text
    nested: dict[str, Any] = {}
    inner = nested
    *groups, name = key.split(".")
    if len(groups) == 2 and isinstance(known := getattr(getattr(config, groups[0], None), groups[1], None), dict):
        *groups, name, value = *groups, {**known, name: value}
    for group in groups:
        inner = inner.setdefault(group, {})
    inner[name] = value
    return nested
