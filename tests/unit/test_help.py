"""--help: short at first, for each program its own, with the values that hold."""

from __future__ import annotations

import re

import pytest

from recipes.settings import RECIPES, STARTS_NO_LAUNCHERS, UNREAD, read_command_line
from tgdpo_megatron.config import Config, complete

USAGE = "Do something.\n\npython -m program (--recipe NAME | --conf FILE)\n"


def shown(capsys: pytest.CaptureFixture[str], program: str, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        read_command_line(program, USAGE, [*arguments, "--help"])
    assert not ended.value.code
    return capsys.readouterr().out


def values(text: str) -> dict[str, str | None]:
    """Setting -> its value as shown; None where it is not set."""
    groups = "|".join(Config.model_fields)
    found = re.findall(rf"^  ((?:{groups})\.\w+)(?:=(\S+))?", text, flags=re.MULTILINE)
    return {name: value or None for name, value in found}


def test_it_begins_with_the_usage_and_a_line_for_each_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "recipes.train")
    assert text.startswith(USAGE)
    begin, end = text.index("recipes:\n"), text.index("settings, with the values")
    assert text[:begin].count("\n") < 25
    lines = text[begin:end].strip().splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(RECIPES)
    said = [line.split(maxsplit=1)[1] for line in lines]
    assert len(set(said)) == len(said) and all(len(line) <= 120 for line in lines)


def test_training_shows_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    every = {f"{group}.{name}" for group, settings in Config() for name in type(settings).model_fields}
    assert set(values(shown(capsys, "recipes.train"))) == every


def test_scoring_leaves_out_what_only_training_reads(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "recipes.score")
    every = {f"{group}.{name}" for group, settings in Config() for name in type(settings).model_fields}
    left_out = {f"{group}.{name}" for group, names in UNREAD["recipes.score"].items() for name in names}
    assert set(values(text)) == every - left_out
    assert {"optimizer.lr", "train.output", "loss.beta"} <= left_out
    assert "python -m recipes.train --help" in text


@pytest.mark.parametrize("recipe", ["sft_tiny", "simpo_reg_llama3_8b"])
def test_the_values_are_those_that_the_command_gives(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the recipe, with the defaults of its loss filled in and the other arguments applied."""
    found = values(shown(capsys, "recipes.train", "--recipe", recipe, "train.seed=7"))
    config = complete(RECIPES[recipe](), where="here")
    for key, value in found.items():
        group, name = key.split(".")
        expected = 7 if key == "train.seed" else getattr(getattr(config, group), name)
        if isinstance(expected, bool):
            assert value == str(expected).lower(), key
        else:
            assert value == (None if expected is None else str(expected)), key


def test_a_value_that_is_filled_in_elsewhere_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    """Every setting that is not set says in its description what holds then, or has to be set, or is off."""
    text = shown(capsys, "recipes.train", "--recipe", "tgdpo_tiny")
    assert "model.reference  (not set)\n      Frozen reference checkpoint. Default: `model.checkpoint`" in text
    assert "loss.gamma  (not read by tgdpo)" in text


def test_a_mistake_is_refused_before_anything_is_shown() -> None:
    from tgdpo_megatron.errors import UserError

    with pytest.raises(UserError, match="did you mean 'loss.beta'"):
        read_command_line("recipes.train", USAGE, ["loss.betta=1", "--help"])


PLACE = ["--nnodes=2", "--node-rank=1", "--rdzv-endpoint=node-0:29400", "--rdzv-id=17"]


def test_training_and_scoring_take_a_place_among_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    for program in ("recipes.train", "recipes.score"):
        text = shown(capsys, program)
        assert all(option.partition("=")[0] in text for option in PLACE)
        assert read_command_line(program, USAGE, PLACE).nodes.rank == 1


@pytest.mark.parametrize("program", sorted(STARTS_NO_LAUNCHERS))
def test_a_program_that_starts_no_launchers_shows_and_takes_none(
    program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from tgdpo_megatron.errors import UserError

    text = shown(capsys, program)
    for option in PLACE:
        assert option.partition("=")[0] not in text
        with pytest.raises(UserError, match="not known here"):
            read_command_line(program, USAGE, [option])
