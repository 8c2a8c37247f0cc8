"""Every YAML file loads on the recipe it is named for, and each of its lines changes something."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from recipes.settings import RECIPES
from tgdpo_megatron.config import Config, check_batch_layout, load

CONF = sorted((Path(__file__).resolve().parents[2] / "conf").glob("*.yaml"))


def recipe_of(path: Path) -> Config:
    method, model, _ = path.stem.split("-")
    return RECIPES[f"{method}_{model}"]()


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_conf_loads_on_its_recipe_and_fits_eight_gpus(path: Path) -> None:
    config = load(recipe_of(path), yaml.safe_load(path.read_text()), where=str(path))
    check_batch_layout(config, world_size=8)


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_every_line_of_conf_changes_its_recipe(path: Path) -> None:
    recipe = recipe_of(path).model_dump(mode="json")
    for group, settings in yaml.safe_load(path.read_text()).items():
        for name, value in settings.items():
            assert recipe[group][name] != value, f"{group}.{name}"
