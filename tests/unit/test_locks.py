"""The locks hold exactly what is needed: to run, and beside that to test."""

from __future__ import annotations

import os
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FROM_PYTHON = {"pip", "setuptools"}
"""In every virtual environment of Python 3.11."""


NOT_LOCKED = ("wandb", "mlflow", "judges")


def project() -> dict[str, list[str]]:
    """What pyproject.toml asks for: to run, and with each extra that the locks hold."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = content["optional-dependencies"]
    return {"run": content["dependencies"], **{name: extras[name] for name in extras if name not in NOT_LOCKED}}


def lock(name: str) -> dict[str, str]:
    """Package -> version."""
    lines = (ROOT / name).read_text().splitlines()
    pinned = [line.split("==") for line in lines if not line.startswith(("#", "-r "))]
    return {canonicalize_name(package): version for package, version in pinned}


def needed(asked: list[str]) -> set[str]:
    """Everything that is installed because of some requirements, by what the installed packages say of themselves."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in asked]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        package = canonicalize_name(requirement.name)
        for wanted in ("", *requirement.extras):
            if (package, wanted) in seen:
                continue
            seen.add((package, wanted))
            try:
                waiting += [(Requirement(text), wanted) for text in distribution(package).requires or []]
            except PackageNotFoundError:
                pytest.skip(f"{package} is not installed here, so what it needs is unknown")
        found.add(package)
    return found - FROM_PYTHON


def test_the_lock_holds_what_running_needs() -> None:
    assert set(lock("requirements.lock")) == needed(project()["run"])


def test_the_other_lock_adds_what_tests_and_tensorboard_need() -> None:
    lines = (ROOT / "requirements-dev.lock").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")][0] == "-r requirements.lock"
    asked = project()
    both = needed([text for extra in asked.values() for text in extra])
    assert set(lock("requirements-dev.lock")) == both - set(lock("requirements.lock"))


def test_the_versions_are_those_that_are_asked_for() -> None:
    pinned = lock("requirements.lock") | lock("requirements-dev.lock")
    for text in (text for extra in project().values() for text in extra):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text


def test_the_environment_is_made_again_when_a_lock_changes() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "\n$(STAMP): requirements.lock requirements-dev.lock\n" in makefile


@pytest.mark.parametrize(("target", "name"), [("setup", "requirements-dev.lock"), ("runtime", "requirements.lock")])
def test_torch_comes_first_where_its_build_is_asked_for(target: str, name: str) -> None:
    """pip then keeps it. Otherwise the package index decides."""

    def steps(*variables: str) -> list[str]:
        command = ["make", "--no-print-directory", "-n", target, "VENV=/nowhere", *variables]
        outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # `make test`
        done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    _, torch, locked, *_ = steps("TORCH=cpu")
    assert "--no-deps --torch-backend cpu " in torch and "torch= requirements.lock" in torch
    assert locked.endswith(f"-r {name}")
    assert not any("--torch-backend" in step for step in steps())
