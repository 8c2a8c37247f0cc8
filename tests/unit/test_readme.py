"""The README's tables of methods, token rewards, metrics and recipes say what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.settings import RECIPES, read_command_line
from tgdpo_megatron.config import Config, LossConfig, ParallelConfig
from tgdpo_megatron.losses import LOSSES
from tgdpo_megatron.losses.rewards import REWARD_SOURCES
from tgdpo_megatron.report.metrics import averages, names_for

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table(first_column: str) -> list[dict[str, str]]:
    """Rows of the table whose first heading this is, by heading."""
    lines = README[README.index(f"| {first_column} |") :].split("\n\n")[0].splitlines()
    headings, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(headings, row, strict=True)) for row in rows]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def defaults(cell: str) -> dict[str, Any]:
    return {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in quoted(cell))}


def test_the_table_of_methods_has_every_type_with_its_parameters_and_defaults() -> None:
    rows = table("`loss.type`")
    written = {quoted(row["`loss.type`"])[0]: defaults(row["parameters and defaults"]) for row in rows}
    assert written == {name: dict(method.options) for name, method in LOSSES.items()}
    assert list(written) == list(LOSSES)


def test_the_files_of_the_methods_define_them() -> None:
    for row in table("`loss.type`"):
        name, path = re.fullmatch(r"\[`(\w+)`\]\(([^)]+)\)", row["`loss.type`"]).groups()  # type: ignore[union-attr]
        assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_the_golden_numbers_named_are_there(golden: Any) -> None:
    cells = [row["golden numbers"] for row in table("`loss.type`")]
    for cell in cells:
        assert cell == "by hand" or quoted(cell)[0] in golden["part_a_token_logprobs"]["methods"]
    assert f"def {quoted(README[README.index('test_part_a') - 1 :])[0].removesuffix('[NAME]')}(" in (
        ROOT / "tests/unit/test_losses.py"
    ).read_text(encoding="utf-8")


def test_the_table_of_token_rewards_has_every_source_with_its_settings_and_defaults() -> None:
    rows = table("`loss.token_rewards`")
    written = {quoted(row["`loss.token_rewards`"])[0]: defaults(row["settings and defaults"]) for row in rows}
    assert written == {name: dict(source.options) for name, source in REWARD_SOURCES.items()}


def test_the_table_of_token_rewards_says_whose_default_a_source_is() -> None:
    written = {
        quoted(row["`loss.token_rewards`"])[0]: quoted(row["default of"]) for row in table("`loss.token_rewards`")
    }
    assert written == {
        source: [name for name, method in LOSSES.items() if method.rewards == source] for source in REWARD_SOURCES
    }


def test_the_settings_that_give_token_rewards_exist() -> None:
    for row in table("`loss.token_rewards`"):
        for word in quoted(row["given by"]):
            group, dot, name = word.partition(".")
            if dot and group in Config.model_fields:
                assert hasattr(getattr(Config(), group), name), word


def test_the_table_of_metrics_has_every_metric_of_token_rewards() -> None:
    reported: set[str] = set()
    for name in LOSSES:
        sums = dict.fromkeys(names_for(LossConfig(type=name)), 1.0)
        reported |= {metric for metric in averages(sums) if metric.startswith(("token_rewards/", "tgdpo/", "treg/"))}
    written = {name for row in table("metric") for name in quoted(row["metric"])}
    assert written == {re.sub(r"share_.*", "share_A_to_B", metric) for metric in reported}


def test_the_table_of_settings_has_every_recipe_of_a_paper_and_its_layout() -> None:
    written = {name: row["layout on 8 × 80 GB"] for row in table("setting") for name in quoted(row["recipes"])}
    assert set(written) == {name for name in RECIPES if not name.endswith("_tiny")}
    for name, layout in written.items():
        parallel = RECIPES[name]().parallel
        tensor, ranks = parallel.tensor_model_parallel_size, 8 // parallel.model_parallel_size
        assert layout == (f"TP{tensor} DP{ranks}" if tensor > 1 else f"DP{ranks}")
        assert parallel == ParallelConfig(tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1)


@pytest.mark.parametrize(
    "command", re.findall(r"^python -m (recipes\.\w+ (?:[^\\\n]*\\\n)*[^\\\n]*)$", README, flags=re.MULTILINE)
)
def test_the_commands_shown_are_read(command: str) -> None:
    program, *arguments = command.partition("#")[0].replace("\\\n", " ").split()
    config, processes = read_command_line(program, "", arguments)
    assert config.model.checkpoint is not None and processes == (1 if "_tiny" in command else 8)
