"""Every experiment file names the recipe it is called after, loads alone, and changes something in each line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes import large, tiny
from recipes.settings import RECIPES, read_command_line
from tgdpo_megatron.config import check_batch_layout

CONF = sorted((Path(__file__).resolve().parents[2] / "conf").glob("*.yaml"))


def recipe_of(path: Path) -> str:
    method, model, _ = path.stem.split("-")
    return f"{method}_{model}"


def content_of(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_an_experiment_alone_is_enough_and_says_on_how_many_gpus_it_runs(path: Path) -> None:
    config = read_command_line("recipes.train", "", ["--conf", str(path)]).config
    nodes, gpus = config.cluster.nodes, config.cluster.gpus_per_node
    assert nodes is not None and gpus == 8
    check_batch_layout(config, world_size=nodes * gpus)
    assert config.loss.type == RECIPES[recipe_of(path)]().loss.type


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_the_first_key_of_an_experiment_is_the_recipe_of_its_name(path: Path) -> None:
    assert next(iter(content_of(path).items())) == ("recipe", recipe_of(path))


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_every_line_of_an_experiment_changes_its_recipe(path: Path) -> None:
    recipe = RECIPES[recipe_of(path)]().model_dump(mode="json")
    content = content_of(path)
    del content["recipe"]
    for group, settings in content.items():
        for name, value in settings.items():
            assert recipe[group][name] != value, f"{group}.{name}"


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_conf_names_its_own_output_and_the_guidance_run_of_its_model(path: Path) -> None:
    content = content_of(path)
    assert content["train"]["output"] == f"runs/{path.stem}"
    if path.stem.startswith("tgdpo-") and "guidance" in content["model"]:
        run = path.with_name(path.name.removeprefix("tg"))
        guidance = content_of(run)
        assert content["model"]["guidance"] == guidance["train"]["output"]
        assert content["model"]["checkpoint"] == guidance["model"]["checkpoint"]
        assert content["data"] == guidance["data"]


def test_every_recipe_of_a_paper_has_an_experiment_and_every_large_one_that_is_not_a_guidance() -> None:
    guidances = {name for name in RECIPES if RECIPES[name].__module__ == large.__name__ and name.startswith("dpo_")}
    of_tiny = {name for name, recipe in RECIPES.items() if recipe.__module__ == tiny.__name__}
    assert {recipe_of(path) for path in CONF} == set(RECIPES) - guidances - of_tiny
