"""Every declared loss has golden numbers, rows of the parity matrix and a place in the documentation; and no
declaration contradicts its formula."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.parity.formulas import METHODS as WRITTEN_OUT
from tests.parity.rows import ROWS
from tests.unit.test_losses import METHODS as IN_GOLDEN_JSON
from tests.unit.test_losses import Tokens, needed, part_a  # noqa: F401  (part_a is a fixture)
from tgdpo_megatron.config import LossConfig
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.losses import LOSSES
from tgdpo_megatron.losses.declaration import Loss, Option, check_together
from tgdpo_megatron.pair_losses import pair_losses

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "tests/data/golden").glob("*.json"))}
SUMMED = """
def formula(policy, pairs, *, reference, beta):
    margin = pairs.difference(beta * (policy - reference))
    return -margin, margin
"""


# ---------------------------------------------------------------- what every loss has


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_golden_numbers(name: str) -> None:
    assert name in {config.type for config in IN_GOLDEN_JSON.values()} | set(GOLDEN), (
        f"python -m tests.support.golden {name} makes them from tests/parity/formulas.py"
    )


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_written_out_again_and_has_rows_in_the_parity_matrix(name: str) -> None:
    methods = [method for method, written in WRITTEN_OUT.items() if written.ours.type == name]
    assert methods, "tests/parity/formulas.py does not have it"
    assert {row.method for row in ROWS} >= set(methods)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_stands_in_the_documentation(name: str) -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| \[`{name}`\]", page, flags=re.MULTILINE), "make docs writes it there"


@pytest.mark.parametrize("name", GOLDEN)
def test_losses_and_gradients_are_those_of_the_golden_file(name: str, part_a: Tokens) -> None:  # noqa: F811
    """Losses to 1e-12; gradients to 1e-10, since the golden ones are central differences."""
    config = LossConfig(**GOLDEN[name]["settings"])
    pairs = GOLDEN[name]["pairs"]
    losses, _ = pair_losses(config, part_a.policy, part_a.pairs, **needed(config, part_a.scores))
    losses.mean().backward()
    assert losses.tolist() == pytest.approx([pair["loss"] for pair in pairs], rel=0, abs=1e-12)
    assert part_a.policy.grad is not None
    expected = [value for pair in pairs for side in ("grad_chosen", "grad_rejected") for value in pair[side]]
    assert part_a.policy.grad.tolist() == pytest.approx(expected, rel=0, abs=1e-10)


# ---------------------------------------------------------------- what follows from a declaration


def test_the_values_of_loss_type_are_the_declared_losses() -> None:
    assert set(LossConfig.model_fields["type"].annotation.__args__) == set(LOSSES)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", LOSSES)
def test_an_option_of_a_loss_is_a_setting_with_the_declared_range(name: str) -> None:
    for option, declared in LOSSES[name].options.items():
        if declared.choices:
            assert LossConfig(type=name, **{option: declared.choices[-1]}).options[option] == declared.choices[-1]
            outside: list[Any] = ["something else"]
        else:
            outside = [limit for limit in (declared.above, declared.below) if limit is not None]
            outside += [limit - 1e-6 for limit in (declared.at_least,) if limit is not None]
            outside += [limit + 1e-6 for limit in (declared.at_most,) if limit is not None]
        assert outside
        for value in outside:
            with pytest.raises(ValueError, match=option):
                LossConfig(type=name, **{option: value})


def test_the_help_names_every_loss_and_what_it_is() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "recipes.train", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    words = " ".join(done.stdout.split())
    for loss in LOSSES.values():
        assert f"`{loss.name}`: {loss.meaning}" in words
        for name, option in loss.options.items():
            assert f"loss.{name}" in words and option.meaning in words


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.report is not None])
def test_a_loss_reports_exactly_the_metrics_it_declares(name: str, part_a: Tokens) -> None:  # noqa: F811
    loss, config = LOSSES[name], LossConfig(type=name, token_rewards="guidance")
    assert loss.report is not None
    numbers = part_a.scores | {"rewards": torch.ones_like(part_a.policy)}
    read = {name: numbers[name].detach() for name in loss.reads}
    policy = part_a.policy.detach()
    found = loss.report(policy, part_a.pairs, torch.zeros(2, dtype=torch.float64), **read, **config.options)
    assert found.keys() == loss.metrics.keys()


# ---------------------------------------------------------------- declarations that are refused


@pytest.fixture
def formula(tmp_path: Path) -> Any:
    """A formula that reads the reference and takes the option beta, in a file of its own."""
    return _module(tmp_path / "toy.py", SUMMED).formula


def _module(path: Path, text: str) -> ModuleType:
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toy(formula: Any, **changes: Any) -> Loss:
    settings = {"options": {"beta": Option(0.1, "Inverse temperature.", above=0)}} | changes
    return Loss("toy", formula, meaning="A toy.", equation="−z", paper="–", **settings)


def test_a_declaration_that_agrees_with_its_formula_is_taken(formula: Any) -> None:
    toy(formula).check()
    assert toy(formula).reads == ("reference",)


def test_an_option_that_the_formula_does_not_read_is_refused(formula: Any) -> None:
    options = {"beta": Option(0.1, ""), "delta": Option(1.0, "")}
    with pytest.raises(UserError, match="toy.py: the loss toy declares the option delta, which its formula does not"):
        toy(formula, options=options).check()


def test_an_option_that_is_taken_and_then_not_used_is_refused(tmp_path: Path) -> None:
    idle = _module(tmp_path / "toy.py", SUMMED.replace("beta * ", "")).formula
    with pytest.raises(UserError, match="toy.py: the loss toy declares the option beta, which its formula does not"):
        toy(idle).check()


def test_an_argument_that_nothing_gives_is_refused(formula: Any) -> None:
    with pytest.raises(
        UserError, match="takes beta, which is neither one of its options nor one of reference, rewards"
    ):
        toy(formula, options={}).check()


def test_token_rewards_that_are_named_and_not_read_are_refused(formula: Any) -> None:
    with pytest.raises(UserError, match="must both take the argument rewards and name their source, or neither"):
        toy(formula, rewards="guidance").check()


def test_two_ranges_of_one_option_are_refused(formula: Any) -> None:
    other = toy(formula, options={"beta": Option(0.1, "", above=0, at_most=1)})
    with pytest.raises(UserError, match="gives the option beta another range than the loss dpo"):
        check_together([LOSSES["dpo"], other])


def test_a_second_loss_of_one_name_is_refused_and_both_files_named(formula: Any) -> None:
    with pytest.raises(UserError, match=r"toy.py: tgdpo_megatron/losses/dpo.py declares a loss dpo already"):
        check_together([LOSSES["dpo"], replace(toy(formula), name="dpo")])


def test_a_formula_that_is_no_plain_function_is_refused(formula: Any) -> None:
    with pytest.raises(UserError, match="the formula of the loss toy is not a plain function; write it with def"):
        toy(partial(formula, beta=0.1)).check()


def test_every_argument_of_a_formula_is_an_option_or_read() -> None:
    for name, loss in LOSSES.items():
        named = {*loss.options, *loss.reads}
        assert set(inspect.signature(loss.formula).parameters) == {"policy", "pairs", *named}, name
