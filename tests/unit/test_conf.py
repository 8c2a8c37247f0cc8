"""Every YAML file loads on the recipe it is named for, and each of its lines changes something."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from recipes import tiny
from recipes.settings import RECIPES, read_command_line
from tgdpo_megatron.config import check_batch_layout

CONF = sorted((Path(__file__).resolve().parents[2] / "conf").glob("*.yaml"))


def recipe_of(path: Path) -> str:
    method, model, _ = path.stem.split("-")
    return f"{method}_{model}"


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_conf_loads_on_its_recipe_and_fits_eight_gpus(path: Path) -> None:
    arguments = ["--recipe", recipe_of(path), "--conf", str(path), "--nproc-per-node", "8"]
    config, processes = read_command_line("recipes.train", "", arguments)
    check_batch_layout(config, world_size=processes)


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_every_line_of_conf_changes_its_recipe(path: Path) -> None:
    recipe = RECIPES[recipe_of(path)]().model_dump(mode="json")
    for group, settings in yaml.safe_load(path.read_text()).items():
        for name, value in settings.items():
            assert recipe[group][name] != value, f"{group}.{name}"


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_conf_names_its_own_output_and_the_guidance_run_of_its_model(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert content["train"]["output"] == f"runs/{path.stem}"
    if path.stem.startswith("tgdpo-"):
        run = path.with_name(path.name.removeprefix("tg"))
        guidance = yaml.safe_load(run.read_text())
        last = f"iter-{RECIPES[recipe_of(run)]().train.train_iters:07d}"
        assert content["model"]["guidance"] == f"{guidance['train']['output']}/checkpoints/{last}"
        assert content["model"]["checkpoint"] == guidance["model"]["checkpoint"]
        assert content["data"] == guidance["data"]


def test_every_recipe_of_a_paper_has_an_experiment() -> None:
    assert {recipe_of(path) for path in CONF} == {
        name for name, recipe in RECIPES.items() if recipe.__module__ != tiny.__name__
    }
